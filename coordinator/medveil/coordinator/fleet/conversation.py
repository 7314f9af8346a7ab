"""What is said to one site until it knows how the campaign stands and holds the bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from medveil.coordinator import operations
from medveil.coordinator.fleet.bundles import read_part
from medveil.coordinator.fleet.due import needs_bundle
from medveil.coordinator.store import Delivery, Store
from medveil.protos.fleet import Ack, Code, Order, Step
from medveil.protos.v1 import campaign_pb2

__all__ = ["Line", "bring_up_to_date"]


class Line(Protocol):
    """Orders go out, an acknowledgement comes back, or nothing does."""

    def ask(self, site: str, order: Order, part: bytes | None) -> Ack | None:
        """Send an order, with the bytes of a part for BUNDLE; None: no usable answer in time."""


@dataclass(frozen=True, slots=True)
class _Talk:
    store: Store
    line: Line
    number: int
    site: str
    now: Callable[[], datetime]

    def ask(self, order: Order, part: bytes | None, state: str) -> Delivery | None:
        """Ask, and store what came back before anything else happens."""
        self.store.record_order(self.number, self.site, self.now())
        ack = self.line.ask(self.site, order, part)
        if ack is None:
            return None
        time = self.now()
        answer = Delivery(time, 0, order.revision, state, ack.code, ack.held_bytes, time)
        self.store.record_answer(self.number, self.site, answer)
        return answer


def bring_up_to_date(
    store: Store, line: Line, bundles: Path, number: int, site: str, now: Callable[[], datetime]
) -> None:
    """Tell a site how a campaign stands, then send what it lacks of the bundle. Stops where the site stops.

    Args:
        store: where every answer is recorded as it comes.
        line: the way to the site.
        bundles: folder of the offered bundles.
        number: the campaign's.
        site: whom to talk to.
        now: the clock.

    Raises:
        StorageError: ``bundle-missing``: the offered bundle can't be read.
    """
    talk = _Talk(store, line, number, site, now)
    offer = operations.current_offer(store, number)
    state = str(store.campaign(number).state)
    answer = talk.ask(
        _order(Step.STATE, offer, text=offer.SerializeToString(deterministic=True)), None, state
    )
    while answer is not None and answer.code in (Code.DONE, Code.OFFSET):
        campaign, held = store.campaign(number), answer.held_bytes
        if not needs_bundle(campaign, site, offer.bundle_size_bytes, answer):
            return
        part = read_part(bundles, offer.bundle_sha256, held)
        answer = talk.ask(_order(Step.BUNDLE, offer, offset=held), part, state)
        if answer is not None and answer.code is Code.DONE and answer.held_bytes <= held:
            # Or it would be sent the same part without end.
            store.record_answer(number, site, replace(answer, code=Code.UNEXPECTED))
            return


def _order(step: Step, offer: campaign_pb2.Offer, *, text: bytes = b"", offset: int = 0) -> Order:
    return Order(
        step, offer.campaign, offer.revision, offer.bundle_sha256, offer.bundle_size_bytes, text, offset
    )
