"""Rounds begin when something is due for somebody who is there; callers are who their certificate says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from medveil.coordinator.fleet.dispatcher import Dispatcher
from medveil.coordinator.pki import Caller
from medveil.coordinator.store import Delivery
from medveil.models.errors import ConfigurationError, RefusedError
from medveil.protos.fleet import Code

PULL = "pull-messages"


@dataclass
class SuperLink:
    """Registers and begins whatever it is asked to, or is down."""

    down: bool = False
    registered: dict[str, bytes] = field(default_factory=dict)
    begun: list[int] = field(default_factory=list)

    def register(self, site: str, key: bytes) -> None:
        self._answer()
        self.registered[site] = key

    def begin(self, round_number: int) -> None:
        self._answer()
        self.begun.append(round_number)

    def _answer(self) -> None:
        if self.down:
            raise ConfigurationError("superlink", "The SuperLink does not answer.")


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def dispatcher(coordinator: Any, superlink: SuperLink) -> Dispatcher:
    return Dispatcher(coordinator.store, superlink, coordinator.clock)


@dataclass
class Site:
    """A site and its node."""

    who: Caller
    key: bytes

    def asks(self, dispatcher: Dispatcher, call: str = PULL) -> None:
        dispatcher.admit(self.who, self.key, call)


@pytest.fixture
def offered(coordinator: Any, node_key: Callable[[], bytes]) -> Site:
    """The only site of the only campaign, which it was offered."""
    site = Site(coordinator.caller("a"), node_key())
    coordinator.campaign("a")
    return site


def ticks(coordinator: Any, dispatcher: Dispatcher, seconds: int = 4) -> None:
    for _ in range(seconds):
        dispatcher.tick()
        coordinator.clock.pass_by(1)


def told(coordinator: Any, site: str, state: str) -> None:
    time = coordinator.clock()
    coordinator.store.record_answer(1, site, Delivery(time, 0, 1, state, int(Code.DONE), 6, time))


def test_the_first_call_registers_the_node(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, node_key: Callable[[], bytes]
) -> None:
    who, key = coordinator.caller("a"), node_key()
    dispatcher.admit(who, key, "activate-node")
    assert superlink.registered == {"a": key}
    superlink.registered.clear()
    dispatcher.admit(who, key, PULL)
    assert superlink.registered == {}
    assert dispatcher.present() == {"a"}


def test_nobody_gets_in_who_is_not_a_joined_site(
    coordinator: Any, dispatcher: Dispatcher, node_key: Callable[[], bytes], operator: Caller
) -> None:
    with pytest.raises(RefusedError, match="certificate-unknown"):
        dispatcher.admit(operator, node_key(), PULL)
    who = coordinator.caller("a")
    coordinator.store.revoke("a", coordinator.clock())
    with pytest.raises(RefusedError, match="certificate-revoked"):
        dispatcher.admit(who, node_key(), PULL)
    assert dispatcher.present() == frozenset()


def test_a_site_cannot_use_another_ones_node_key(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, node_key: Callable[[], bytes]
) -> None:
    key = node_key()
    dispatcher.admit(coordinator.caller("a"), key, PULL)
    with pytest.raises(RefusedError, match="node-key"):
        dispatcher.admit(coordinator.caller("b"), key, PULL)
    assert superlink.registered == {"a": key}


def test_a_node_that_came_while_the_superlink_was_down_is_registered_later(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, node_key: Callable[[], bytes]
) -> None:
    who, key = coordinator.caller("a"), node_key()
    superlink.down = True
    with pytest.raises(ConfigurationError, match="superlink"):
        dispatcher.admit(who, key, PULL)
    superlink.down = False
    dispatcher.admit(who, key, PULL)
    assert superlink.registered == {"a": key}


def test_one_round_takes_all_sites_that_are_there(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, node_key: Callable[[], bytes]
) -> None:
    callers = [coordinator.caller(site) for site in ("a", "b", "c")]
    coordinator.campaign("a", "b", "c")
    for who in callers[:2]:  # the second comes a moment after the first
        dispatcher.admit(who, node_key(), PULL)
        dispatcher.tick()
        coordinator.clock.pass_by(2)
    ticks(coordinator, dispatcher, 10)  # nobody is asked twice at once
    assert superlink.begun == [1]
    assert [entry.sites for entry in coordinator.store.open_rounds()] == [("a", "b")]


def test_a_round_begins_at_once_when_nobody_is_missing(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, offered: Site
) -> None:
    offered.asks(dispatcher)
    dispatcher.tick()
    assert superlink.begun == [1]


def test_a_site_that_went_away_is_not_asked(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, offered: Site
) -> None:
    offered.asks(dispatcher)
    coordinator.clock.pass_by(31)
    ticks(coordinator, dispatcher)
    assert superlink.begun == []


def test_a_busy_node_is_there_but_is_sent_nothing_more(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, offered: Site
) -> None:
    offered.asks(dispatcher)
    for _ in range(4):
        coordinator.clock.pass_by(30)
        offered.asks(dispatcher, "send-node-heartbeat")
        ticks(coordinator, dispatcher)
        assert dispatcher.present() == {"a"}
    assert superlink.begun == []
    coordinator.clock.pass_by(75)
    assert dispatcher.present() == frozenset()


def test_nothing_runs_while_nothing_is_due(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, offered: Site
) -> None:
    told(coordinator, "a", "offered")
    for _ in range(100):
        coordinator.clock.pass_by(10)
        offered.asks(dispatcher)
        dispatcher.tick()
    assert superlink.begun == []
    coordinator.answer(1, "a")  # the campaign is running now, which the site has not been told
    ticks(coordinator, dispatcher)
    assert superlink.begun == [1]


def test_a_round_that_falls_silent_is_given_up_and_begun_anew(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, offered: Site
) -> None:
    offered.asks(dispatcher)
    ticks(coordinator, dispatcher)
    coordinator.store.beat_round(1, coordinator.clock())
    coordinator.clock.pass_by(31)
    offered.asks(dispatcher)
    ticks(coordinator, dispatcher)
    assert superlink.begun == [1, 2]


def test_a_new_process_begins_what_the_one_before_left(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, offered: Site
) -> None:
    offered.asks(dispatcher)
    ticks(coordinator, dispatcher)
    again = Dispatcher(coordinator.store, superlink, coordinator.clock)
    offered.asks(again)
    ticks(coordinator, again)
    assert superlink.begun == [1, 2]
    assert [entry.number for entry in coordinator.store.open_rounds()] == [2]


def test_a_superlink_that_is_down_is_not_asked_every_second(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, offered: Site
) -> None:
    offered.asks(dispatcher)
    superlink.down = True
    ticks(coordinator, dispatcher, 4)
    assert coordinator.store.deliveries(1)["a"].attempts == 1
    superlink.down = False
    ticks(coordinator, dispatcher, 5)
    assert len(superlink.begun) == 1


def test_a_site_that_was_away_for_days_is_asked_within_seconds_of_its_return(
    coordinator: Any, superlink: SuperLink, dispatcher: Dispatcher, offered: Site
) -> None:
    for _ in range(72):
        coordinator.clock.pass_by(3600)
        dispatcher.tick()
    assert superlink.begun == []
    offered.asks(dispatcher)
    ticks(coordinator, dispatcher, 5)
    assert superlink.begun == [1]
