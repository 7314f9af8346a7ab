"""The ServerApp: one round with the sites that are online, each in a thread of its own with its own deadline.

Flower's ``send_and_receive`` isn't used: a site that announces a reply and never uploads it holds it for 186 s, and
a pull for a site that is offline eats the message. Here a slow site delays nobody, a site that isn't online is sent
nothing, and whoever doesn't answer in time is late, not failed: the next round finds in the store what it lacks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from medveil.coordinator.fleet.conversation import bring_up_to_date
from medveil.coordinator.fleet.layout import HOME_VARIABLE, Layout
from medveil.coordinator.store import Round, Store
from medveil.models.errors import ConfigurationError, InputError, MedveilError
from medveil.protos.fleet import (
    ACK_RECORD,
    MESSAGE_TYPE,
    ORDER_RECORD,
    PART_ARRAY,
    PART_RECORD,
    Ack,
    Order,
    ack_from,
)

__all__ = ["GridLine", "app", "take_round"]

_LOG: Final = logging.getLogger(__name__)
_ANSWER_S: Final = 300.0
"""Our choice: the largest part takes 130 s over a line of 1 Mbit/s. A dead node is reported after 60 s at most."""
_BACK_S: Final = 30.0
"""For a node that took its leave; our choice, several times what a SuperNode needs to start. A killed one is not
admitted so soon."""
_PULL_S: Final = 1.0
_BEAT_S: Final = 2.0


class NodeGrid(Protocol):
    """What is used of Flower's grid. ``get_nodes`` is of its HTTP grid only."""

    def get_nodes(self) -> Any:
        """Return the nodes that are online, each with ``node_id`` and ``public_key``."""

    def push_messages(self, messages: list[Message]) -> Any:
        """Return a message's id, or None for one that wasn't taken."""

    def pull_messages(self, message_ids: list[str]) -> Any:
        """Return the replies that are there."""


app = ServerApp()


@app.main()
def _main(grid: Grid, context: Context) -> None:
    layout = Layout(Path(os.environ[HOME_VARIABLE]))
    number = int(context.run_config["round"])
    with Store(layout.store) as store:
        take_round(store, grid, layout.bundles, number, lambda: datetime.now(UTC))


def take_round(store: Store, grid: NodeGrid, bundles: Path, number: int, now: Callable[[], datetime]) -> None:
    """Bring the sites of a round up to date, as far as they are online and answer.

    Args:
        store: open store.
        grid: connected to the SuperLink.
        bundles: folder of the offered bundles.
        number: the round's.
        now: the clock.

    Raises:
        ConfigurationError: ``no-round``: nobody waits for it.
    """
    this = next((entry for entry in store.open_rounds() if entry.number == number), None)
    if this is None:
        raise ConfigurationError("no-round", "This round has ended already.")
    store.beat_round(number, now())
    keys = store.node_keys()
    nodes = {keys[node.public_key]: int(node.node_id) for node in grid.get_nodes() if node.public_key in keys}
    line = GridLine(grid, nodes)
    threads = [_talk(store, line, bundles, this, site, now) for site in this.sites if site in nodes]
    for absent in set(this.sites) - nodes.keys():
        store.leave_round(number, absent)
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(_BEAT_S, _PULL_S))
        store.beat_round(number, now())
    store.beat_round(number, now(), ended=True)


def _talk(
    store: Store, line: GridLine, bundles: Path, this: Round, site: str, now: Callable[[], datetime]
) -> threading.Thread:
    def talk() -> None:
        try:
            bring_up_to_date(store, line, bundles, this.campaign, site, now)
        except MedveilError as exc:
            _LOG.error("site %s: %s %s", site, exc, exc.private)
        except Exception:
            _LOG.exception("site %s", site)
        finally:
            store.leave_round(this.number, site)

    # A daemon: a reply that is never uploaded holds its thread for minutes, and must not hold a process that is told
    # to end.
    thread = threading.Thread(target=talk, name=site, daemon=True)
    thread.start()
    return thread


class GridLine:
    """A line over Flower. A reply is found by the message that it answers: an error reply names no sender."""

    def __init__(self, grid: NodeGrid, nodes: Mapping[str, int], *, answer_s: float = _ANSWER_S) -> None:
        """Take the nodes that are online, by site."""
        self._grid, self._nodes, self._answer_s = grid, nodes, answer_s
        self._pushing = threading.Lock()

    def ask(self, site: str, order: Order, part: bytes | None) -> Ack | None:
        """Send an order and wait for its acknowledgement; None: late, gone, or not understood.

        A node that takes its leave with the order, as one does whose client app died, is back within seconds and is
        asked once more: another round would begin only after it.
        """
        reply = self._asked(site, order, part)
        if reply is not None and _has_left(reply) and self._is_back(site):
            reply = self._asked(site, order, part)
        return None if reply is None else _ack(site, order, reply)

    def _asked(self, site: str, order: Order, part: bytes | None) -> Message | None:
        content = RecordDict({ORDER_RECORD: ConfigRecord(dict(order.record()))})
        if part is not None:
            content[PART_RECORD] = ArrayRecord({PART_ARRAY: Array(np.frombuffer(part, np.uint8))})
        # Twice the wait: what is answered after it is of no use, and must not lie around for 12 hours.
        message = Message(content, self._nodes[site], MESSAGE_TYPE, ttl=2 * self._answer_s)
        with self._pushing:
            pushed = list(self._grid.push_messages([message]))
        if pushed == [None] or not pushed:
            return None
        deadline = time.monotonic() + self._answer_s
        while time.monotonic() < deadline:
            replies: list[Message] = list(self._grid.pull_messages(pushed))
            if replies:
                return replies[0]
            time.sleep(_PULL_S)
        return None

    def _is_back(self, site: str) -> bool:
        """Wait until a site's node is online again; return whether it is."""
        deadline = time.monotonic() + _BACK_S
        while time.monotonic() < deadline:
            if self._nodes[site] in {int(node.node_id) for node in self._grid.get_nodes()}:
                return True
            time.sleep(_PULL_S)
        return False


def _has_left(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def _ack(site: str, order: Order, reply: Message) -> Ack | None:
    """Read a reply; whatever isn't an acknowledgement of this order counts as none."""
    if reply.has_error():
        _LOG.warning("site %s: Flower reports error %d", site, reply.error.code)
        return None
    record = reply.content.get(ACK_RECORD)
    if len(reply.content) != 1 or not isinstance(record, MetricRecord):
        _LOG.warning("site %s: a reply of another shape", site)
        return None
    try:
        ack = ack_from(dict(record))
    except InputError as exc:
        _LOG.warning("site %s: %s %s", site, exc, exc.private)
        return None
    if ack.held_bytes > order.bundle_bytes or (ack.campaign, ack.revision) not in {
        (order.campaign, order.revision),
        (0, 0),
    }:
        _LOG.warning("site %s: an answer to something else", site)
        return None
    return ack
