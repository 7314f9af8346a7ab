"""What passes the gate: the messages that Flower itself makes, and nothing that was put into them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fab_pb2, fleet_pb2, message_pb2, node_pb2, recorddict_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from medveil.agent.fleet.passage import Passage
from medveil.models.errors import RefusedError
from medveil.protos.fleet import (
    ACK_RECORD,
    FAB_ID,
    FAB_SHA256,
    FAB_VERSION,
    FLEET_PREFIX,
    MESSAGE_TYPE,
    Ack,
    Code,
)

KEY = b"-----BEGIN PUBLIC KEY-----\n"
CANARY = "DOE^JANE"
ACK = Ack(campaign=1, revision=1, code=Code.DONE, held_bytes=7).record()


@pytest.fixture
def passage(monkeypatch: pytest.MonkeyPatch) -> Passage:
    monkeypatch.setattr(TaskIdentity, "_run_id", 3)  # as in a client app's process
    monkeypatch.setattr(TaskIdentity, "_node_id", 7)
    monkeypatch.setattr(TaskIdentity, "_task_id", 5)
    return Passage(KEY)


def order() -> Message:
    message = Message(
        RecordDict({"order": ConfigRecord({"step": "state"})}), dst_node_id=7, message_type=MESSAGE_TYPE
    )
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def answered(content: RecordDict | Error) -> Message:
    reply = Message(content, reply_to=order())
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def announcement(reply: Message) -> bytes:
    proto = message_to_proto(remove_content_from_message(reply) if reply.has_content() else reply)
    return fleet_pb2.PushMessagesRequest(
        node=node_pb2.Node(node_id=7),
        messages_list=[proto],
        message_object_trees=[get_object_tree(reply)],
        clientapp_runtime_list=[1.23456],
    ).SerializeToString()


def pushed(name: str, content: bytes) -> bytes:
    return message_pb2.PushObjectRequest(
        node=node_pb2.Node(node_id=7), run_id=3, object_id=name, object_content=content, session_id="abc"
    ).SerializeToString()


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(RefusedError) as refused:
        call()
    assert CANARY not in refused.value.public
    return refused.value.code


def test_an_acknowledgement_made_by_flower_passes_whole(passage: Passage) -> None:
    reply = answered(RecordDict({ACK_RECORD: MetricRecord(dict(ACK))}))
    out = fleet_pb2.PushMessagesRequest.FromString(
        passage.outward(f"{FLEET_PREFIX}push-messages", announcement(reply))
    )
    assert out.messages_list[0] == message_to_proto(remove_content_from_message(reply))
    assert out.message_object_trees[0] == get_object_tree(reply)
    objects = get_all_nested_objects(reply)
    assert len(objects) == 3
    for name, item in objects.items():
        body = pushed(name, item.deflate())
        assert passage.outward(f"{FLEET_PREFIX}push-object", body) == body


@pytest.mark.parametrize(
    "content",
    [
        {ACK_RECORD: MetricRecord({**ACK, "accuracy": 1})},
        {ACK_RECORD: MetricRecord({key: value for key, value in ACK.items() if key != "code"})},
        {ACK_RECORD: MetricRecord({**ACK, "held_bytes": [1, 2, 3]})},
        {ACK_RECORD: MetricRecord({**ACK, "held_bytes": 0.5})},
        {ACK_RECORD: ConfigRecord({"note": CANARY})},
        {ACK_RECORD: ArrayRecord({"pixels": Array(np.zeros(9, np.uint8))})},
        {CANARY: MetricRecord(dict(ACK))},
        {ACK_RECORD: MetricRecord(dict(ACK)), "more": MetricRecord(dict(ACK))},
    ],
    ids=["more keys", "fewer keys", "a list", "a fraction", "text", "pixels", "another name", "two records"],
)
def test_any_other_content_of_an_answer_stays(passage: Passage, content: Any) -> None:
    reply = answered(RecordDict(content))
    attempts = [(f"{FLEET_PREFIX}push-messages", announcement(reply))]
    attempts += [
        (f"{FLEET_PREFIX}push-object", pushed(name, item.deflate()))
        for name, item in get_all_nested_objects(reply).items()
    ]
    refused = 0
    for path, body in attempts:
        try:
            assert CANARY.encode() not in passage.outward(path, body)
        except RefusedError as error:
            refused += error.code == "gate-message"
    assert refused


def test_an_errors_text_stays_and_its_number_goes_under_a_name_that_fits(passage: Passage) -> None:
    reply = answered(Error(6, f"FileNotFoundError: /data/{CANARY}.dcm"))
    ((name, item),) = get_all_nested_objects(reply).items()
    assert CANARY.encode() in item.deflate()
    sent = passage.outward(f"{FLEET_PREFIX}push-messages", announcement(reply))
    announced = fleet_pb2.PushMessagesRequest.FromString(sent)
    new = announced.message_object_trees[0].object_id
    assert (announced.messages_list[0].error.code, announced.messages_list[0].metadata.message_id) == (6, new)
    assert CANARY.encode() not in sent

    asked = fleet_pb2.PushMessagesResponse(objects_to_push=[new], session_id="abc").SerializeToString()
    wanted = passage.inward(f"{FLEET_PREFIX}push-messages", asked)
    assert list(fleet_pb2.PushMessagesResponse.FromString(wanted).objects_to_push) == [name]

    body = message_pb2.PushObjectRequest.FromString(
        passage.outward(f"{FLEET_PREFIX}push-object", pushed(name, item.deflate()))
    )
    assert body.object_id == new == hashlib.sha256(body.object_content).hexdigest()
    inflated = Message.inflate(body.object_content)
    assert (inflated.error.code, CANARY in inflated.error.reason) == (6, False)


def test_what_is_added_to_a_known_message_is_dropped_or_refused(passage: Passage) -> None:
    stray = b"\xfa\x7d\x08" + CANARY.encode()  # field 2015, length-delimited: no field of any request
    body = fleet_pb2.PullMessagesRequest(
        node=node_pb2.Node(node_id=7), message_ids=[CANARY]
    ).SerializeToString()
    for call in ("pull-messages", "get-run", "send-node-heartbeat", "deactivate-node"):
        assert CANARY.encode() not in passage.outward(f"{FLEET_PREFIX}{call}", body + stray)
    record = recorddict_pb2.MetricRecord.FromString(
        next(
            item.deflate().partition(b"\x00")[2]
            for item in get_all_nested_objects(
                answered(RecordDict({ACK_RECORD: MetricRecord(dict(ACK))}))
            ).values()
            if isinstance(item, MetricRecord)
        )
    ).SerializeToString()
    content = f"MetricRecord  {len(record + stray)}".encode() + b"\x00" + record + stray
    name = hashlib.sha256(content).hexdigest()
    assert (
        code_of(lambda: passage.outward(f"{FLEET_PREFIX}push-object", pushed(name, content)))
        == "gate-message"
    )


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        f"{FLEET_PREFIX}../control/list-runs",
        f"{FLEET_PREFIX}register-node",
        "/",
        FLEET_PREFIX,
    ],
)
def test_only_fleet_calls_go_out(passage: Passage, path: str) -> None:
    assert code_of(lambda: passage.outward(path, b"")) == "gate-path"


def test_another_key_and_a_large_message_stay(passage: Passage) -> None:
    other = fleet_pb2.ActivateNodeRequest(public_key=b"other", heartbeat_interval=30).SerializeToString()
    assert code_of(lambda: passage.outward(f"{FLEET_PREFIX}activate-node", other)) == "gate-key"
    assert code_of(lambda: passage.outward(f"{FLEET_PREFIX}push-object", b"x" * 70_000)) == "gate-size"
    assert code_of(lambda: passage.outward(f"{FLEET_PREFIX}get-run", b"\xff\xff")) == "gate-message"


def run_of(**changes: str) -> bytes:
    run = {"fab_hash": FAB_SHA256, "fab_id": FAB_ID, "fab_version": FAB_VERSION, **changes}
    return run_pb2.GetRunResponse(run=run_pb2.Run(**run)).SerializeToString()


def test_only_the_pinned_app_comes_in(passage: Passage) -> None:
    assert passage.inward(f"{FLEET_PREFIX}get-run", run_of()) == run_of()
    for change in ({"fab_hash": "0" * 64}, {"fab_id": "mallory/app"}, {"fab_version": "9.9.9"}):
        assert (
            code_of(lambda change=change: passage.inward(f"{FLEET_PREFIX}get-run", run_of(**change))) == "fab"
        )
    forged = fab_pb2.GetFabResponse(fab=fab_pb2.Fab(hash_str=FAB_SHA256, content=b"code")).SerializeToString()
    assert code_of(lambda: passage.inward(f"{FLEET_PREFIX}get-fab", forged)) == "fab"
    asked = fab_pb2.GetFabRequest(hash_str="0" * 64).SerializeToString()
    assert code_of(lambda: passage.outward(f"{FLEET_PREFIX}get-fab", asked)) == "fab"


def test_only_the_known_message_type_comes_in(passage: Passage) -> None:
    foreign = fleet_pb2.PullMessagesResponse(
        messages_list=[message_pb2.Message(metadata=message_pb2.Metadata(message_type="train"))]
    ).SerializeToString()
    assert code_of(lambda: passage.inward(f"{FLEET_PREFIX}pull-messages", foreign)) == "gate-message"
    empty = fleet_pb2.PullMessagesResponse().SerializeToString()
    assert passage.inward(f"{FLEET_PREFIX}pull-messages", empty) == empty
