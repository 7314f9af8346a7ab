"""Starts rounds as long as something is due, and decides who may call the SuperLink under which node key."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final, Protocol

from medveil.coordinator import operations
from medveil.coordinator.fleet.due import due_sites
from medveil.coordinator.pki import Caller, Role
from medveil.coordinator.store import Round, Store
from medveil.models.errors import MedveilError

__all__ = ["Dispatcher", "Gateway"]

_LOG: Final = logging.getLogger(__name__)
_ASKS_FOR_WORK: Final = "pull-messages"
_GATHER: Final = timedelta(seconds=3)
"""How long a round waits while others that it concerns aren't ready: each round is a process."""
_READY: Final = timedelta(seconds=30)
"""A SuperNode that is not busy asks for messages every 3 s; after ten times that it is sent none."""
_PRESENT: Final = timedelta(seconds=75)
"""A busy one sends a heartbeat every 30 s; after two of them it counts as away."""
_STARTING: Final = timedelta(seconds=180)
"""How long a round may take to its first beat; a process starts for it, which took 60 s on a machine with a load
of twelve per core."""
_SILENT: Final = timedelta(seconds=30)
"""Fifteen missed beats of a round: whoever ran it is gone."""
_MAX_ROUNDS: Final = 4
"""Running at once, one of which waits for every slow site; our choice: each is a process of 130 MB."""


class Gateway(Protocol):
    """What is asked of the SuperLink (`control.Control`)."""

    def register(self, site: str, key: bytes) -> None:
        """Let a node take part."""

    def begin(self, round_number: int) -> None:
        """Ask for the Flower run of a round."""


class Dispatcher:
    """Its methods may be called from several threads."""

    def __init__(self, store: Store, gateway: Gateway, now: Callable[[], datetime]) -> None:
        """Take over: rounds of a process before this one ended with it."""
        self._store, self._gateway, self._now = store, gateway, now
        self._registering = threading.Lock()
        self._nodes: dict[str, bytes] = {}  # registered since this process began
        self._called: dict[str, datetime] = {}
        self._asked: dict[str, datetime] = {}  # for messages
        self._gathering: dict[int, datetime] = {}  # campaigns with something due, since when
        for left in store.open_rounds():
            store.beat_round(left.number, now(), ended=True)

    def admit(self, who: Caller, key: bytes, call: str) -> None:
        """Let a site's call through to the SuperLink; at its first one the node is registered there.

        Raises:
            RefusedError: as `operations.identify`; ``node-key``: another site's, or none that Flower takes.
            ConfigurationError: ``superlink``: it doesn't answer just now.
        """
        operations.identify(self._store, who, Role.SITE, self._now())
        if self._nodes.get(who.name) != key:
            with self._registering:
                self._store.bind_node(who.name, key, self._now())
                self._gateway.register(who.name, key)
                self._nodes[who.name] = key
        self._called[who.name] = self._now()
        if call == _ASKS_FOR_WORK:
            self._asked[who.name] = self._now()

    def present(self) -> frozenset[str]:
        """Return the sites whose node is there, busy or not."""
        return _within(_PRESENT, self._called, self._now())

    def tick(self) -> None:
        """Begin a round for every campaign that has something due for a site that is present."""
        now = self._now()
        rounds = [entry for entry in self._store.open_rounds() if not self._is_lost(entry, now)]
        busy = {(entry.campaign, site) for entry in rounds for site in entry.sites}
        ready = _within(_READY, self._asked, now)
        for number in self._store.campaign_numbers():
            due = tuple(site for site in self._due(number, now) if (number, site) not in busy)
            sites = tuple(site for site in due if site in ready)
            if not sites:
                self._gathering.pop(number, None)
                continue
            waited = abs(now - self._gathering.setdefault(number, now))
            if (sites == due or waited >= _GATHER) and len(rounds) < _MAX_ROUNDS:
                del self._gathering[number]
                rounds.append(self._begin(number, sites, now))

    def _due(self, number: int, now: datetime) -> tuple[str, ...]:
        offer = operations.current_offer(self._store, number)
        campaign = self._store.campaign(number)
        deliveries = self._store.deliveries(number)
        return due_sites(campaign, offer.revision, offer.bundle_size_bytes, deliveries, now)

    def _begin(self, number: int, sites: tuple[str, ...], now: datetime) -> Round:
        begun = self._store.begin_round(number, sites, now)
        try:
            self._gateway.begin(begun.number)
        except MedveilError as exc:
            _LOG.warning("round %d: %s %s", begun.number, exc, exc.private)
            self._store.beat_round(begun.number, now, ended=True)
            for site in sites:  # or the next tick would try again, a second later, and so on
                self._store.record_order(number, site, now)
        return begun

    def _is_lost(self, entry: Round, now: datetime) -> bool:
        patience = _STARTING if entry.beat == entry.begun else _SILENT
        if abs(now - entry.beat) < patience:
            return False
        _LOG.warning("round %d fell silent; what it did not deliver is sent again", entry.number)
        self._store.beat_round(entry.number, now, ended=True)
        return True


def _within(span: timedelta, times: dict[str, datetime], now: datetime) -> frozenset[str]:
    # A time in the future was taken before the clock was set back, and says nothing.
    return frozenset(site for site, time in times.copy().items() if abs(now - time) < span)
