"""What may pass the gate, message by message: pure functions over the bytes of Flower's fleet calls.

Outward, a request is taken apart and built anew from the fields that the site lets out: calls and message types on a
list, this site's own key, whole numbers under known keys (`medveil.protos.fleet.Ack`). The text of an error stays
here; its number goes. Inward, only the pinned FAB and the known message type come in; what a message says is the
client app's to judge.

Flower names every object by the SHA-256 of its bytes and sends an announcement before the objects themselves. So an
error whose text is taken out gets another name, and the gate remembers both (`Passage`).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, node_pb2, recorddict_pb2, run_pb2
from google.protobuf.message import DecodeError, Message

from medveil.models.errors import InputError, RefusedError
from medveil.protos.fleet import (
    ACK_RECORD,
    FAB_ID,
    FAB_SHA256,
    FAB_VERSION,
    FLEET_PREFIX,
    MESSAGE_TYPE,
    ack_from,
)
from medveil.protos.v1.conventions import MAX_MESSAGE_BYTES

__all__ = ["CARRIES_CONTENT", "Passage", "brings_work"]

CARRIES_CONTENT: Final = frozenset({"activate-node", "push-messages", "push-object"})
"""Calls with more in them than numbers that Flower counts with; the egress log keeps each of these."""

_WITHHELD: Final = "withheld by the site"
_OBJECT_ID: Final = re.compile(r"[0-9a-f]{64}")
_GROUP: Final = re.compile(r"[0-9A-Za-z._-]{0,64}")  # chosen by the coordinator, and only said back to it
_SESSION: Final = re.compile(r"[0-9A-Za-z_-]{0,128}")  # likewise
_DIVIDER: Final = b"\x00"  # flwr.supercore.constant.HEAD_BODY_DIVIDER
_REMEMBERED: Final = 64
"""Errors whose second name is kept; a node handles one message at a time."""


class Passage:
    """The rules, with the little that they have to remember; any thread may ask."""

    def __init__(self, node_public_key: bytes) -> None:
        """Take the only key that this site shows (PEM)."""
        self._key = node_public_key
        self._guard = threading.Lock()
        self._renamed: dict[str, tuple[str, bytes]] = {}
        self._outward: Mapping[str, Callable[[bytes], Message]] = {
            "activate-node": self._activate,
            "deactivate-node": _deactivate,
            "send-node-heartbeat": _heartbeat,
            "pull-messages": _pull_messages,
            "get-run": _get_run,
            "get-fab": _get_fab,
            "pull-object": _pull_object,
            "confirm-message-received": _confirm,
            "push-messages": self._push_messages,
            "push-object": self._push_object,
        }
        self._inward: Mapping[str, Callable[[bytes], bytes]] = {
            "pull-messages": _messages_in,
            "get-run": _run_in,
            "get-fab": _fab_in,
            "push-messages": self._announced_in,
        }

    def outward(self, path: str, body: bytes) -> bytes:
        """Return the bytes that may go out for a request.

        Raises:
            RefusedError: ``gate-path``, ``gate-size``, ``gate-message``, ``gate-key``, ``fab``.
        """
        call = path.removeprefix(FLEET_PREFIX)
        rule = self._outward.get(call) if path.startswith(FLEET_PREFIX) else None
        if rule is None:
            raise RefusedError("gate-path", "The gate lets only Flower's fleet calls out.")
        if len(body) > MAX_MESSAGE_BYTES:
            raise RefusedError("gate-size", "The message is larger than 64 KiB and stays here.")
        return bytes(rule(body).SerializeToString(deterministic=True))

    def inward(self, path: str, body: bytes) -> bytes:
        """Return the bytes of a reply that may come in.

        Raises:
            RefusedError: ``fab``: the coordinator wants another app run here; ``gate-message``.
        """
        rule = self._inward.get(path.removeprefix(FLEET_PREFIX))
        return body if rule is None else rule(body)

    # Who this site is

    def _activate(self, body: bytes) -> Message:
        request = _parsed(fleet_pb2.ActivateNodeRequest, body)
        if request.public_key != self._key:
            raise RefusedError("gate-key", "A program behind the gate showed a key that is not this site's.")
        return fleet_pb2.ActivateNodeRequest(
            public_key=self._key, heartbeat_interval=round(request.heartbeat_interval)
        )

    # What this site answers

    def _push_messages(self, body: bytes) -> Message:
        request = _parsed(fleet_pb2.PushMessagesRequest, body)
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise _foreign("one message at a time")
        message, tree = request.messages_list[0], request.message_object_trees[0]
        if message.HasField("error"):
            message, tree = self._without_text(message)
        else:
            _check_tree(tree)
        return fleet_pb2.PushMessagesRequest(
            node=_node(request.node),
            messages_list=[_announcement(message)],
            message_object_trees=[tree],
            # A duration: rounded to seconds, because how long an answer took says something about the data.
            clientapp_runtime_list=[float(round(s)) for s in request.clientapp_runtime_list[:1]],
        )

    def _without_text(self, message: message_pb2.Message) -> tuple[message_pb2.Message, Any]:
        """Return an error with its number only, under the name that it has then."""
        silent = message_pb2.Message(metadata=_metadata(message.metadata))
        silent.error.code, silent.error.reason = message.error.code, _WITHHELD
        silent.metadata.message_id = ""
        content = _packed("Message", silent.SerializeToString(deterministic=True))
        name = hashlib.sha256(content).hexdigest()
        with self._guard:
            self._renamed[_object_id(message.metadata.message_id)] = (name, content)
            while len(self._renamed) > _REMEMBERED:
                del self._renamed[next(iter(self._renamed))]
        silent.metadata.message_id = name
        return silent, message_pb2.ObjectTree(object_id=name)

    def _announced_in(self, body: bytes) -> bytes:
        """Ask for an error's object under the name by which the SuperNode has it."""
        reply = _parsed(fleet_pb2.PushMessagesResponse, body)
        with self._guard:
            known = {name: old for old, (name, _) in self._renamed.items()}
        wanted = [known.get(item, item) for item in reply.objects_to_push]
        del reply.objects_to_push[:]
        reply.objects_to_push.extend(wanted)
        return bytes(reply.SerializeToString())

    def _push_object(self, body: bytes) -> Message:
        request = _parsed(message_pb2.PushObjectRequest, body)
        name, content = _object_id(request.object_id), request.object_content
        with self._guard:
            substitute = self._renamed.get(name)
        if substitute is not None:
            name, content = substitute
        else:
            _check_object(content)
        if hashlib.sha256(content).hexdigest() != name:
            raise _foreign("object under another name")
        if not _SESSION.fullmatch(request.session_id):
            raise _foreign("session")
        return message_pb2.PushObjectRequest(
            node=_node(request.node),
            run_id=request.run_id,
            object_id=name,
            object_content=content,
            session_id=request.session_id,
        )


def brings_work(reply: bytes) -> bool:
    """Return whether a reply to ``pull-messages`` that may come in holds a message."""
    return len(fleet_pb2.PullMessagesResponse.FromString(reply).messages_list) > 0


# Requests of numbers and names that the coordinator gave
# ------------------------------------------------------------------------------------------------


def _deactivate(body: bytes) -> Message:
    return fleet_pb2.DeactivateNodeRequest(node_id=_parsed(fleet_pb2.DeactivateNodeRequest, body).node_id)


def _heartbeat(body: bytes) -> Message:
    request = _parsed(heartbeat_pb2.SendNodeHeartbeatRequest, body)
    return heartbeat_pb2.SendNodeHeartbeatRequest(
        node=_node(request.node), heartbeat_interval=round(request.heartbeat_interval)
    )


def _pull_messages(body: bytes) -> Message:
    return fleet_pb2.PullMessagesRequest(node=_node(_parsed(fleet_pb2.PullMessagesRequest, body).node))


def _get_run(body: bytes) -> Message:
    request = _parsed(run_pb2.GetRunRequest, body)
    return run_pb2.GetRunRequest(node=_node(request.node), run_id=request.run_id)


def _get_fab(body: bytes) -> Message:
    request = _parsed(fab_pb2.GetFabRequest, body)
    if request.hash_str != FAB_SHA256:
        raise _other_fab()
    return fab_pb2.GetFabRequest(node=_node(request.node), hash_str=FAB_SHA256, run_id=request.run_id)


def _pull_object(body: bytes) -> Message:
    request = _parsed(message_pb2.PullObjectRequest, body)
    return message_pb2.PullObjectRequest(
        node=_node(request.node), run_id=request.run_id, object_id=_object_id(request.object_id)
    )


def _confirm(body: bytes) -> Message:
    request = _parsed(message_pb2.ConfirmMessageReceivedRequest, body)
    return message_pb2.ConfirmMessageReceivedRequest(
        node=_node(request.node),
        run_id=request.run_id,
        message_object_id=_object_id(request.message_object_id),
    )


def _node(node: node_pb2.Node) -> node_pb2.Node:
    return node_pb2.Node(node_id=node.node_id)


# Answers
# ------------------------------------------------------------------------------------------------


def _announcement(message: message_pb2.Message) -> message_pb2.Message:
    """Return a message as Flower announces it, before its objects: its content is empty, and said to be there."""
    if message.content.ByteSize():
        raise _foreign("content in the announcement")
    announced = message_pb2.Message(metadata=_metadata(message.metadata))
    if message.HasField("content"):
        announced.content.SetInParent()
    announced.metadata.message_id = _object_id(message.metadata.message_id)
    if message.HasField("error"):
        announced.error.CopyFrom(message.error)
    return announced


def _metadata(given: message_pb2.Metadata) -> message_pb2.Metadata:
    if given.message_type != MESSAGE_TYPE or not _GROUP.fullmatch(given.group_id):
        raise _foreign("message type or group")
    tasks = {name: getattr(given, name) for name in ("src_task_id", "dst_task_id") if given.HasField(name)}
    return message_pb2.Metadata(
        run_id=given.run_id,
        src_node_id=given.src_node_id,
        dst_node_id=given.dst_node_id,
        reply_to_message_id=_object_id(given.reply_to_message_id),
        group_id=given.group_id,
        ttl=given.ttl,
        message_type=given.message_type,
        created_at=given.created_at,
        **tasks,
    )


def _check_tree(tree: message_pb2.ObjectTree) -> None:
    """Refuse whatever is not a message that holds one record dictionary that holds one record."""
    depth = 0
    while True:
        _object_id(tree.object_id)
        depth += 1
        if not tree.children:
            break
        (tree, *more) = tree.children
        if more:
            raise _foreign("more than one record")
    if depth != 3:
        raise _foreign("object tree")


def _check_object(content: bytes) -> None:
    head, divider, body = content.partition(_DIVIDER)
    kind, _, rest = head.decode("ascii", "replace").partition(" ")
    children, _, size = rest.rpartition(" ")
    if not divider or size != str(len(body)):
        raise _foreign("object head")
    match kind:
        case "Message":
            _object_id(children)
            message = _parsed(message_pb2.Message, body)
            allowed = message_pb2.Message(metadata=_metadata(message.metadata))
            _check_same(allowed, body)
        case "RecordDict":
            if body != json.dumps({ACK_RECORD: _object_id(children)}).encode():
                raise _foreign("record dictionary")
        case "MetricRecord" if not children:
            _check_acknowledgement(body)
        case _:
            raise _foreign(f"object of kind {kind[:40]}")


def _check_acknowledgement(body: bytes) -> None:
    record = _parsed(recorddict_pb2.MetricRecord, body)
    values: dict[str, Any] = {}
    for item in record.items:
        kind = item.value.WhichOneof("value")
        if kind not in ("sint64", "uint64") or item.key in values:
            raise _foreign("value of a record")
        values[item.key] = getattr(item.value, kind)
    try:
        ack_from(values)
    except InputError as exc:
        raise _foreign("acknowledgement") from exc
    _check_same(record, body)


def _check_same(allowed: Message, body: bytes) -> None:
    """Refuse bytes that hold anything beside the fields of a message that was checked."""
    allowed.DiscardUnknownFields()
    if allowed.SerializeToString(deterministic=True) != body:
        raise _foreign("fields beside the known ones")


# What comes in
# ------------------------------------------------------------------------------------------------


def _messages_in(body: bytes) -> bytes:
    for message in _parsed(fleet_pb2.PullMessagesResponse, body).messages_list:
        if message.metadata.message_type != MESSAGE_TYPE:
            raise _foreign("message type from the coordinator")
    return body


def _run_in(body: bytes) -> bytes:
    run = _parsed(run_pb2.GetRunResponse, body).run
    if (run.fab_hash, run.fab_id, run.fab_version) != (FAB_SHA256, FAB_ID, FAB_VERSION):
        raise _other_fab()
    return body


def _fab_in(body: bytes) -> bytes:
    fab = _parsed(fab_pb2.GetFabResponse, body).fab
    if fab.hash_str != FAB_SHA256 or hashlib.sha256(fab.content).hexdigest() != FAB_SHA256:
        raise _other_fab()
    return body


# ------------------------------------------------------------------------------------------------


def _parsed(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as exc:
        raise _foreign("bytes that are no message") from exc


def _object_id(name: str) -> str:
    if not _OBJECT_ID.fullmatch(name):
        raise _foreign("object name")
    return name


def _packed(kind: str, body: bytes) -> bytes:
    """Return an object without children as Flower writes it: kind, children, size, and the body."""
    return f"{kind}  {len(body)}".encode() + _DIVIDER + body


def _foreign(private: str) -> RefusedError:
    return RefusedError(
        "gate-message",
        "A message was not on the gate's list and did not pass; update the older side.",
        private=private,
    )


def _other_fab() -> RefusedError:
    return RefusedError(
        "fab",
        "The coordinator wants to run an app here that this medveil does not know; call the coordinator.",
    )
