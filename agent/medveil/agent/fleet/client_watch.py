"""Notices a client app that died with an order in its hands.

SuperNode waits for its answer until 60 s after the app's last sign of life, does nothing else meanwhile, and has no
way to be told (flwr 1.41: a task that was handed out once isn't handed out again). Stopped and started anew, it takes
leave of the coordinator, which hears at once that the order is lost, and sends it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

__all__ = ["ClientAppWatch"]

_GONE_S: Final = 2.0
"""Without its client app, and without a word from SuperNode, before an order counts as lost; our choice: SuperNode
looks for an answer twice a second and hands it on at once."""
_UNSEEN_S: Final = 10.0
"""The same where no client app was seen: it died as it began, or SuperExec hasn't come to start it; our choice."""


class Orders(Protocol):
    """What is asked of the gate."""

    @property
    def open_order(self) -> int:
        """The number of the message that SuperNode is at work on; 0: none."""

    @property
    def quiet_s(self) -> float:
        """Seconds since anything but a heartbeat passed; 0 while something passes."""


class ClientAppWatch:
    """Ask it once or twice a second. Linux only: elsewhere it sees no process, and Flower's 60 s remain."""

    def __init__(
        self,
        orders: Orders,
        *,
        lives: Callable[[int], bool] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the gate; `lives` says whether a process has a living child."""
        self._orders, self._lives, self._now = orders, lives or _has_living_child, now
        self._seen_order, self._seen_at, self._lost_order = 0, 0.0, 0

    def has_died(self, superexec: int | None) -> bool:
        """Return whether the client app of the open order is gone without an answer; true once per order.

        Args:
            superexec: process that starts client apps; None: it doesn't run, and so none of them does.
        """
        order, now = self._orders.open_order, self._now()
        if superexec is not None and self._lives(superexec):
            self._seen_order, self._seen_at = order, now
            return False
        if order in (0, self._lost_order):
            return False
        was_seen = order == self._seen_order
        gone_s = min(now - self._seen_at, self._orders.quiet_s) if was_seen else self._orders.quiet_s
        is_lost = gone_s >= (_GONE_S if was_seen else _UNSEEN_S)
        self._lost_order = order if is_lost else self._lost_order
        return is_lost


def _has_living_child(pid: int) -> bool:
    """Return whether a process has a child that runs; a killed one stays a zombie until its parent asks for it."""
    children = ""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return any(_runs(int(child)) for child in children.split())


def _runs(pid: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False
