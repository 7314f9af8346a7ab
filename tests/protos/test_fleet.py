"""The two messages that travel over Flower: what is written is read back, and nothing else is taken."""

from __future__ import annotations

import pytest

from medveil.models.errors import InputError
from medveil.protos.fleet import Ack, Code, Order, Step, ack_from, order_from

STATE = Order(Step.STATE, 3, 2, bytes(32), 1000, offer=b"offer")
PART = Order(Step.BUNDLE, 3, 2, bytes(range(32)), 1000, offset=999)
ACK = Ack(3, 2, Code.BUNDLE_SIGNATURE, 500)


@pytest.mark.parametrize("order", [STATE, PART])
def test_an_order_is_read_as_it_was_written(order: Order) -> None:
    assert order_from(order.record()) == order


@pytest.mark.parametrize("code", list(Code))
def test_an_acknowledgement_is_read_as_it_was_written(code: Code) -> None:
    ack = Ack(3, 2, code, 500)
    assert ack_from(ack.record()) == ack


def test_an_acknowledgement_holds_whole_numbers_and_nothing_else() -> None:
    assert {type(value) for value in ACK.record().values()} == {int}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"step": "train"},
        {"campaign": 0},
        {"revision": 0},
        {"bundle_sha256": bytes(31)},
        {"bundle_bytes": 0},
        {"offer": b""},
        {"offset": 1},
        {"campaign": True},
        {"campaign": 3.0},
        {"more": 1},
    ],
)
def test_a_foreign_order_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="fleet-message"):
        order_from({**STATE.record(), **change})


@pytest.mark.parametrize("change", [{"offset": -1}, {"offset": 1000}, {"offer": b"offer"}])
def test_a_part_lies_inside_its_bundle_and_carries_no_offer(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="fleet-message"):
        order_from({**PART.record(), **change})


@pytest.mark.parametrize(
    "change", [{"code": 99}, {"held_bytes": -1}, {"version": 0}, {"held_bytes": 0.5}, {"name": "x"}]
)
def test_a_foreign_acknowledgement_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="fleet-message"):
        ack_from({**ACK.record(), **change})


def test_a_message_without_one_of_its_fields_is_refused() -> None:
    for key in ACK.record():
        with pytest.raises(InputError, match="fleet-message"):
            ack_from({name: value for name, value in ACK.record().items() if name != key})
