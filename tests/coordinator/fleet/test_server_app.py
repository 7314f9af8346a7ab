"""One round over a grid that behaves like Flower's: who is offline is left alone, who is late is late."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.routers.fleet.router import router

from medveil.coordinator.fleet import server_app
from medveil.coordinator.fleet.control import campaign_bundle, check_flower
from medveil.coordinator.fleet.server_app import GridLine, take_round
from medveil.models.errors import ConfigurationError
from medveil.protos.fleet import (
    FAB_SHA256,
    FLEET_CALLS,
    FLEET_PREFIX,
    FLWR_VERSION,
    MESSAGE_TYPE,
    ORDER_RECORD,
    PART_ARRAY,
    PART_RECORD,
    Ack,
    Code,
    Order,
    Step,
    order_from,
)

ORDER = Order(Step.STATE, 1, 1, bytes(32), 6, offer=b"offer")


@dataclass
class Grid:
    """Carries messages to functions, one per node."""

    keys: dict[int, bytes]
    nodes: dict[int, Callable[[Message], Message | None]]
    replies: dict[str, Message] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=node, public_key=key) for node, key in self.keys.items()]

    def push_messages(self, messages: list[Message]) -> list[str]:
        ids = []
        for message in messages:
            self.sent.append(message)
            ids.append(f"m{len(self.sent)}")
            reply = self.nodes[message.metadata.dst_node_id](message)
            if reply is not None:
                self.replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: list[str]) -> list[Message]:
        return [self.replies.pop(each) for each in message_ids if each in self.replies]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "_PULL_S", 0.01)
    monkeypatch.setattr(server_app, "_BEAT_S", 0.01)
    for name in ("_task_id", "_run_id", "_node_id"):  # as in a process that Flower has begun
        monkeypatch.setattr(TaskIdentity, name, 1)


def reply(message: Message, content: dict[str, Any]) -> Message:
    return Message(RecordDict(content), reply_to=message)


def keeping(held: bytearray) -> Callable[[Message], Message]:
    """A node whose site keeps the bundle."""

    def node(message: Message) -> Message:
        order = order_from(dict(message.content[ORDER_RECORD]))
        if order.step is Step.BUNDLE:
            held.extend(message.content[PART_RECORD][PART_ARRAY].numpy().tobytes())
        ack = Ack(order.campaign, order.revision, Code.DONE, len(held))
        return reply(message, {"ack": MetricRecord(dict(ack.record()))})

    return node


def test_a_round_brings_the_sites_up_to_date_that_are_online(
    coordinator: Any, node_key: Callable[[], bytes]
) -> None:
    keys = {site: node_key() for site in ("a", "b", "c")}
    for site, key in keys.items():
        coordinator.join(site)
        coordinator.store.bind_node(site, key, coordinator.clock())
    coordinator.campaign("a", "b", "c", bundle=b"the bundle")
    begun = coordinator.store.begin_round(1, ("a", "b", "c"), coordinator.clock())
    one, two = bytearray(), bytearray()
    # b is offline; a node of nobody's is online
    grid = Grid({7: keys["a"], 9: keys["c"], 11: b"stranger"}, {7: keeping(one), 9: keeping(two)})
    take_round(coordinator.store, grid, coordinator.bundles, begun.number, coordinator.clock)
    assert (bytes(one), bytes(two)) == (b"the bundle", b"the bundle")
    assert {message.metadata.message_type for message in grid.sent} == {MESSAGE_TYPE}
    assert {message.metadata.dst_node_id for message in grid.sent} == {7, 9}
    deliveries = coordinator.store.deliveries(1)
    assert deliveries.keys() == {"a", "c"}  # to b nothing was sent: it would have been lost
    assert {delivery.held_bytes for delivery in deliveries.values()} == {len(b"the bundle")}
    assert coordinator.store.open_rounds() == []


@pytest.mark.parametrize(("returns_after", "asked"), [(3, 2), (None, 1)], ids=["back", "away"])
def test_a_node_that_took_its_leave_with_an_order_is_asked_once_more_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, returns_after: int | None, asked: int
) -> None:
    monkeypatch.setattr(server_app, "_BACK_S", 0.2)
    looks = 0

    def node(message: Message) -> Message:
        if len(grid.sent) == 1:
            grid.keys.clear()
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
        assert grid.keys
        return keeping(bytearray())(message)

    class Leaving(Grid):
        def get_nodes(self) -> list[Any]:
            nonlocal looks
            looks += 1
            if looks == returns_after:
                self.keys[7] = b"key"
            return super().get_nodes()

    grid = Leaving({7: b"key"}, {7: node})
    answer = GridLine(grid, {"a": 7}).ask("a", ORDER, None)
    assert len(grid.sent) == asked
    assert (answer is not None) == (returns_after is not None)


def test_a_site_that_never_answers_delays_nobody_else(
    coordinator: Any, node_key: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app.GridLine.__init__, "__kwdefaults__", {"answer_s": 2.0})
    keys = {site: node_key() for site in ("a", "b")}
    for site, key in keys.items():
        coordinator.join(site)
        coordinator.store.bind_node(site, key, coordinator.clock())
    coordinator.campaign("a", "b")
    begun = coordinator.store.begin_round(1, ("a", "b"), coordinator.clock())
    held, still_in = bytearray(), []
    grid = Grid({7: keys["a"], 9: keys["b"]}, {7: lambda message: None, 9: keeping(held)})

    def looking(message_ids: list[str]) -> list[Message]:
        still_in.append(coordinator.store.open_rounds()[0].sites)
        return Grid.pull_messages(grid, message_ids)

    monkeypatch.setattr(grid, "pull_messages", looking)
    take_round(coordinator.store, grid, coordinator.bundles, begun.number, coordinator.clock)
    assert bytes(held) == b"bundle"
    assert still_in[-1] == ("a",)  # b was free for the next round while this one waited for a
    deliveries = coordinator.store.deliveries(1)
    assert (deliveries["a"].attempts, deliveries["a"].code) == (1, None)  # late, not failed
    assert deliveries["b"].code == Code.DONE


def test_a_round_that_was_given_up_does_nothing(coordinator: Any) -> None:
    coordinator.join("a")
    coordinator.campaign("a")
    begun = coordinator.store.begin_round(1, ("a",), coordinator.clock())
    coordinator.store.beat_round(begun.number, coordinator.clock(), ended=True)
    with pytest.raises(ConfigurationError, match="no-round"):
        take_round(coordinator.store, Grid({}, {}), coordinator.bundles, begun.number, coordinator.clock)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"ack": MetricRecord({"version": 1})},
        {"other": MetricRecord(dict(Ack(1, 1, Code.DONE, 0).record()))},
        {
            "ack": MetricRecord(dict(Ack(1, 1, Code.DONE, 0).record())),
            "more": MetricRecord({"age": 61}),
        },
        {"ack": MetricRecord(dict(Ack(2, 1, Code.DONE, 0).record()))},
        {"ack": MetricRecord(dict(Ack(1, 1, Code.DONE, 7).record()))},
    ],
)
def test_a_reply_of_another_shape_counts_as_none(content: dict[str, Any]) -> None:
    line = GridLine(Grid({}, {7: lambda message: reply(message, content)}), {"a": 7}, answer_s=5)
    assert line.ask("a", ORDER, None) is None


def test_an_error_of_flowers_ends_the_wait_at_once() -> None:
    def dead(message: Message) -> Message:
        return Message(Error(code=ErrorCode.CLIENT_APP_CRASHED, reason="a patient's name"), reply_to=message)

    begun = time.monotonic()
    assert GridLine(Grid({}, {7: dead}), {"a": 7}, answer_s=60).ask("a", ORDER, None) is None
    assert time.monotonic() - begun < 30


def test_a_message_does_not_outlive_its_use() -> None:
    grid = Grid({}, {7: keeping(bytearray())})
    GridLine(grid, {"a": 7}, answer_s=10).ask("a", ORDER, None)
    assert grid.sent[0].metadata.ttl == 20


@pytest.mark.filterwarnings(
    "ignore:GitWildMatchPattern:DeprecationWarning"
)  # Flower's, of a library of its own
def test_the_app_bundle_is_the_one_that_sites_pin() -> None:
    assert hashlib.sha256(campaign_bundle()).hexdigest() == FAB_SHA256


def test_flower_is_the_one_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version("flwr") == FLWR_VERSION
    check_flower()
    monkeypatch.setattr("medveil.coordinator.fleet.control.version", lambda name: "1.42.0")
    with pytest.raises(ConfigurationError, match="flower-version"):
        check_flower()


def test_the_fleet_calls_are_all_that_a_supernode_knows() -> None:
    assert {route.path for route in router.routes} == {FLEET_PREFIX + call for call in FLEET_CALLS}
