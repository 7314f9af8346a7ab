"""What the store keeps about Flower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from medveil.coordinator.store import Delivery, Store
from medveil.models.errors import RefusedError


def test_a_node_key_belongs_to_one_site(coordinator: Any, node_key: Callable[[], bytes]) -> None:
    store, now = coordinator.store, coordinator.clock()
    coordinator.join("a")
    coordinator.join("b")
    first, second = node_key(), node_key()
    store.bind_node("a", first, now)
    with pytest.raises(RefusedError, match="node-key"):
        store.bind_node("b", first, now)
    store.bind_node("a", second, now)  # a site that was installed anew
    assert store.node_keys() == {second: "a"}
    store.bind_node("b", first, now)
    assert store.node_keys() == {second: "a", first: "b"}


def test_attempts_count_until_an_answer(coordinator: Any) -> None:
    store, clock = coordinator.store, coordinator.clock
    coordinator.join("a")
    coordinator.campaign("a")
    store.record_order(1, "a", clock())
    store.record_order(1, "a", clock())
    assert store.deliveries(1)["a"].attempts == 2
    answer = Delivery(clock(), 0, 1, "offered", 0, 6, clock())
    store.record_answer(1, "a", answer)
    assert store.deliveries(1) == {"a": answer}
    store.record_order(1, "a", clock())
    assert store.deliveries(1) == {"a": replace(answer, attempts=1)}


def test_what_travelled_survives_the_process(coordinator: Any, node_key: Callable[[], bytes]) -> None:
    coordinator.join("a")
    coordinator.campaign("a")
    coordinator.store.bind_node("a", node_key(), coordinator.clock())
    coordinator.store.record_order(1, "a", coordinator.clock())
    begun = coordinator.store.begin_round(1, ("a",), coordinator.clock())
    with Store(coordinator.folder / "coordinator.sqlite") as again:
        assert again.node_keys() == coordinator.store.node_keys()
        assert again.deliveries(1) == coordinator.store.deliveries(1)
        assert again.open_rounds() == [begun]
        again.beat_round(begun.number, coordinator.clock(), ended=True)
    assert coordinator.store.open_rounds() == []


def test_a_round_that_was_given_up_stays_ended(coordinator: Any) -> None:
    coordinator.join("a")
    coordinator.campaign("a")
    begun = coordinator.store.begin_round(1, ("a",), coordinator.clock())
    coordinator.store.beat_round(begun.number, coordinator.clock(), ended=True)
    coordinator.store.beat_round(begun.number, coordinator.clock())
    assert coordinator.store.open_rounds() == []
