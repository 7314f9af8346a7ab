"""The installed client app: whatever comes, an acknowledgement of whole numbers goes back, and never an exception."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from medveil.agent.campaign_work.book import Book, book_path
from medveil.agent.campaign_work.places import federation_folder
from medveil.agent.fleet import client_app
from medveil.protos.fleet import (
    ACK_RECORD,
    MESSAGE_TYPE,
    ORDER_RECORD,
    PART_ARRAY,
    PART_RECORD,
    Ack,
    Code,
    Order,
    Step,
    ack_from,
)
from medveil.protos.v1 import campaign_pb2

DIGEST = bytes(range(32))
OFFER = campaign_pb2.Offer(
    campaign=3, revision=1, name="chest", task="classification", method="salm", bundle_sha256=DIGEST,
    bundle_size_bytes=10, minimum_group_size=5, state=campaign_pb2.CAMPAIGN_STATE_OFFERED,
)  # fmt: skip
STATE = Order(Step.STATE, 3, 1, DIGEST, 10, OFFER.SerializeToString())


@pytest.fixture(autouse=True)
def _in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("_run_id", 3), ("_node_id", 7), ("_task_id", 5)):
        monkeypatch.setattr(TaskIdentity, name, number)
    monkeypatch.delenv("MEDVEIL_POLICY", raising=False)


def answer(**records: object) -> Ack:
    message = Message(RecordDict(records), dst_node_id=7, message_type=MESSAGE_TYPE)
    message.metadata.__dict__["_message_id"] = message.object_id
    context = Context(run_id=3, node_id=7, node_config={}, state=RecordDict(), run_config={})
    reply = client_app.app(message, context)
    assert list(reply.content) == [ACK_RECORD]
    return ack_from(dict(reply.content[ACK_RECORD]))


def part(*values: int) -> ArrayRecord:
    return ArrayRecord({PART_ARRAY: Array(np.array(values, np.uint8))})


def test_an_offer_is_recorded_for_the_steward() -> None:
    assert answer(**{ORDER_RECORD: ConfigRecord(STATE.record())}) == Ack(3, 1, Code.DONE, 0)
    with Book(book_path(federation_folder())) as book:
        assert [campaign.offer.name for campaign in book.campaigns()] == ["chest"]


def test_parts_of_a_bundle_are_appended() -> None:
    answer(**{ORDER_RECORD: ConfigRecord(STATE.record())})
    bundle = Order(Step.BUNDLE, 3, 1, DIGEST, 10, b"", 0)
    sent = {ORDER_RECORD: ConfigRecord(bundle.record()), PART_RECORD: part(1, 2, 3)}
    assert answer(**sent) == Ack(3, 1, Code.DONE, 3)
    assert answer(**sent) == Ack(3, 1, Code.OFFSET, 3)


@pytest.mark.parametrize(
    "records",
    [
        {},
        {ORDER_RECORD: part(1)},
        {ORDER_RECORD: ConfigRecord({"step": "state"})},
        {ORDER_RECORD: ConfigRecord(STATE.record()), PART_RECORD: part(1)},
        {ORDER_RECORD: ConfigRecord(STATE.record()), "more": ConfigRecord({})},
        {ORDER_RECORD: ConfigRecord(Order(Step.BUNDLE, 3, 1, DIGEST, 10).record())},
        {
            ORDER_RECORD: ConfigRecord(Order(Step.BUNDLE, 3, 1, DIGEST, 10).record()),
            PART_RECORD: ArrayRecord({PART_ARRAY: Array(np.zeros(3, np.float64))}),
        },
    ],
    ids=[
        "nothing",
        "no order",
        "half an order",
        "a part too many",
        "a record too many",
        "no part",
        "no bytes",
    ],
)
def test_what_is_no_order_is_answered_as_such(records: dict[str, object]) -> None:
    assert answer(**records).code is Code.MESSAGE


def test_a_bug_is_a_number_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/data/DOE^JANE.dcm")

    monkeypatch.setattr(client_app, "carry_out", fail)
    assert answer(**{ORDER_RECORD: ConfigRecord(STATE.record())}) == Ack(3, 1, Code.UNEXPECTED, 0)
