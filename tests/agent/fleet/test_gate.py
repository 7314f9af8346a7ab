"""The gate on real sockets, between a client that plays the SuperNode and an edge that keeps all that it gets."""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2

from medveil.agent.fleet.gate import Gate
from medveil.agent.fleet.passage import Passage
from medveil.agent.reporting_log import EgressLog, sent_messages
from medveil.coordinator.pki import Authority, Role, create_authority
from medveil.models.errors import StorageError
from medveil.protos.fleet import FLEET_PREFIX, MESSAGE_TYPE

KEY = b"-----BEGIN PUBLIC KEY-----\n"
POLL = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=7)).SerializeToString(deterministic=True)
REPLY = fleet_pb2.PullMessagesResponse().SerializeToString()


@dataclass
class Edge:
    """A coordinator's edge that answers everything with one reply."""

    address: str
    requests: list[tuple[str, dict[str, str], bytes, str]] = field(default_factory=list)
    hangs_up: bool = False
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    reply: bytes = REPLY


def serve(edge: Edge, context: ssl.SSLContext) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            certificate: Any = self.connection.getpeercert()
            names = str(certificate["subjectAltName"])
            edge.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body, names))
            self.send_response_only(edge.status)
            for name, value in {"content-length": str(len(edge.reply)), **edge.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(edge.reply)
            self.close_connection = edge.hangs_up

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    edge.address = f"127.0.0.1:{server.server_port}"
    return server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return create_authority(tmp_path_factory.mktemp("authority"), datetime.now(UTC))


@pytest.fixture
def open_edge(authority: Authority, tmp_path: Path) -> Iterator[Callable[..., Edge]]:
    servers = []

    def start(signed_by: Authority = authority, at: timedelta = timedelta(), name: str = "127.0.0.1") -> Edge:
        issued, key = signed_by.issue_server([name], datetime.now(UTC) + at)
        file = tmp_path / "edge.pem"
        file.write_bytes(key + issued.chain_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        context.load_verify_locations(cadata=authority.certificate_pem.decode())
        context.verify_mode = ssl.CERT_REQUIRED
        edge = Edge("")
        servers.append(serve(edge, context))
        return edge

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def identity(authority: Authority, tmp_path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    issued = authority.issue_client(request, Role.SITE, "st-anna", datetime.now(UTC))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "identity.pem").write_bytes(private + issued.chain_pem)
    return tmp_path / "identity.pem"


@pytest.fixture
def open_gate(authority: Authority, identity: Path, tmp_path: Path) -> Iterator[Callable[..., Gate]]:
    opened = []
    with EgressLog(tmp_path / "egress.jsonl") as log:

        def start(
            address: str, now: Callable[[], datetime] = lambda: datetime.now(UTC), **clocks: Any
        ) -> Gate:
            credentials = (authority.certificate_pem, identity)
            gate = Gate(address, lambda: credentials, Passage(KEY), log, tmp_path / "gate", now=now, **clocks)
            opened.append(gate)
            return gate

        yield start
        for gate in opened:
            gate.stop()


def ask(gate: Gate, call: str = "pull-messages", body: bytes = POLL, **headers: str) -> tuple[int, bytes]:
    context = ssl.create_default_context(cafile=str(gate.certificate))
    with closing(
        http.client.HTTPSConnection(*gate.address.split(":"), context=context, timeout=20)
    ) as connection:
        path = f"{FLEET_PREFIX}{call}" if not call.startswith("/") else call
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def test_a_fleet_call_arrives_with_the_sites_certificate_and_without_stray_headers(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate]
) -> None:
    edge = open_edge()
    gate = open_gate(edge.address)
    assert ask(gate, **{"flwr-signature": "abc", "x-patient": "DOE^JANE", "user-agent": "ward-7"}) == (
        200,
        REPLY,
    )
    ((path, headers, body, names),) = edge.requests
    assert (path, body) == (f"{FLEET_PREFIX}pull-messages", POLL)
    assert "st-anna" in names
    assert headers["flwr-signature"] == "abc"
    assert set(headers) <= {"host", "accept-encoding", "content-length", "flwr-signature"}
    assert (gate.standing.line, gate.standing.sent_bytes) == ("", len(POLL))
    assert gate.standing.last_reply_unix_s > 0


def test_what_is_refused_never_reaches_the_coordinator(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate], tmp_path: Path
) -> None:
    edge = open_edge()
    gate = open_gate(edge.address)
    assert ask(gate, "/v1/control/start-run") == (403, b"gate-path")
    assert ask(gate, "push-object", b"\xff") == (403, b"gate-message")
    # Refused by what is announced: the gate hangs up without reading it.
    assert ask(gate, "push-object", b"x", **{"content-length": "70000"}) == (413, b"gate-size")
    assert edge.requests == []
    assert (gate.standing.refused, gate.standing.last_refusal) == (3, "gate-size")
    assert "gate-path" in (tmp_path / "gate/gate.log").read_text()


def test_what_carries_content_is_in_the_egress_log_before_it_is_sent_and_polls_are_not(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate], tmp_path: Path
) -> None:
    edge = open_edge()
    gate = open_gate(edge.address)
    body = fleet_pb2.ActivateNodeRequest(public_key=KEY, heartbeat_interval=30).SerializeToString()
    assert ask(gate, "activate-node", body)[0] == 200
    assert ask(gate)[0] == 200
    (line,) = sent_messages(tmp_path / "egress.jsonl")
    assert (line.method, line.payload) == (f"{FLEET_PREFIX}activate-node", edge.requests[0][2])


def test_while_the_egress_log_takes_no_more_nothing_is_sent_and_the_node_tries_again(
    open_edge: Callable[..., Edge], open_gate: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("disk-full", "The disk is full.")

    edge = open_edge()
    gate = open_gate(edge.address)
    body = fleet_pb2.ActivateNodeRequest(public_key=KEY, heartbeat_interval=30).SerializeToString()
    with monkeypatch.context() as patched:
        patched.setattr(EgressLog, "append", full)
        assert ask(gate, "activate-node", body) == (503, b"disk-full")
    assert (edge.requests, gate.standing.line) == ([], "disk-full")
    assert ask(gate, "activate-node", body)[0] == 200
    assert gate.standing.line == ""


def test_a_coordinator_of_another_authority_gets_nothing_and_is_named(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate], tmp_path: Path
) -> None:
    edge = open_edge(create_authority(tmp_path / "mallory", datetime.now(UTC)))
    gate = open_gate(edge.address)
    assert ask(gate) == (503, b"coordinator-unreachable")
    assert (gate.standing.line, gate.standing.last_reply_unix_s, edge.requests) == (
        "unknown-authority",
        0,
        [],
    )


def test_an_expired_coordinator_is_named(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate]
) -> None:
    edge = open_edge(at=-timedelta(days=3000))
    gate = open_gate(edge.address)
    assert ask(gate)[0] == 503
    assert gate.standing.line == "coordinator-certificate-expired"


@pytest.mark.parametrize("name", ["coordinator.example", "192.0.2.1"])
def test_a_coordinator_of_another_name_gets_nothing_and_is_named(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate], name: str
) -> None:
    edge = open_edge(name=name)
    gate = open_gate(edge.address)
    assert ask(gate)[0] == 503
    assert (gate.standing.line, edge.requests) == ("coordinator-name", [])


def test_a_coordinator_whose_certificate_begins_tomorrow_means_that_this_clock_is_behind(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate]
) -> None:
    gate = open_gate(open_edge(at=timedelta(days=1)).address)
    assert ask(gate)[0] == 503
    assert gate.standing.line == "clock-off"


def test_a_certificate_of_this_site_that_has_expired_is_named_and_shown_to_nobody(
    open_edge: Callable[..., Edge], open_gate: Callable[..., Gate]
) -> None:
    edge = open_edge()
    gate = open_gate(edge.address, lambda: datetime.now(UTC) + timedelta(days=366))
    assert ask(gate)[0] == 503
    assert (gate.standing.line, edge.requests) == ("certificate-expired", [])


def test_a_node_that_does_nothing_but_beat_is_told_to_begin_anew(
    open_edge: Callable[..., Edge], open_gate: Callable[..., Gate]
) -> None:
    edge, seconds = open_edge(), [0.0]
    gate = open_gate(edge.address, monotonic=lambda: seconds[0])
    beat = heartbeat_pb2.SendNodeHeartbeatRequest(node=node_pb2.Node(node_id=7), heartbeat_interval=30)

    def beats() -> int:
        return ask(gate, "send-node-heartbeat", beat.SerializeToString())[0]

    for _ in range(10):  # as long as it is at work, beats pass
        assert (ask(gate)[0], beats()) == (200, 200)
        seconds[0] += 300
    assert beats() == 200
    sent = len(edge.requests)
    seconds[0] += 60
    assert beats() == 401
    assert len(edge.requests) == sent
    assert gate.standing.last_refusal == "node-stuck"
    assert (ask(gate)[0], beats()) == (200, 200)  # the one that was started anew


def test_an_order_is_open_from_its_message_until_the_supernode_asks_for_the_next(
    open_edge: Callable[..., Edge], open_gate: Callable[..., Gate]
) -> None:
    edge, clock = open_edge(), [100.0]
    gate = open_gate(edge.address, monotonic=lambda: clock[0])
    message = message_pb2.Message(metadata=message_pb2.Metadata(message_type=MESSAGE_TYPE))
    order = fleet_pb2.PullMessagesResponse(messages_list=[message]).SerializeToString()
    beat = heartbeat_pb2.SendNodeHeartbeatRequest(node=node_pb2.Node(node_id=7), heartbeat_interval=30)
    clock[0] += 30
    ask(gate, "send-node-heartbeat", beat.SerializeToString())
    assert gate.quiet_s == 30
    asked = []
    for edge.reply in (REPLY, order, order, REPLY):
        ask(gate)
        asked.append(gate.open_order)
    assert asked == [0, 1, 2, 0]
    assert gate.quiet_s == 0


def test_a_supernode_that_cannot_reach_the_coordinator_is_not_quiet_but_kept_from_talking(
    open_edge: Callable[..., Edge], open_gate: Callable[..., Gate]
) -> None:
    edge, clock = open_edge(), [100.0]
    gate = open_gate(edge.address, monotonic=lambda: clock[0])
    gate.note_line_down("unreachable")
    clock[0] += 60
    assert gate.quiet_s == 0
    ask(gate, "send-node-heartbeat", heartbeat_pb2.SendNodeHeartbeatRequest().SerializeToString())
    clock[0] += 1
    assert gate.quiet_s == 1


def test_a_coordinator_that_is_away_is_tried_again_by_the_supernode(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate]
) -> None:
    gate = open_gate("127.0.0.1:9")
    assert ask(gate)[0] == 503
    assert gate.standing.line == "unreachable"


def test_an_idle_connection_that_the_coordinator_closed_costs_no_call(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate]
) -> None:
    edge = open_edge()
    edge.hangs_up = True
    gate = open_gate(edge.address)
    context = ssl.create_default_context(cafile=str(gate.certificate))
    connection = http.client.HTTPSConnection(*gate.address.split(":"), context=context, timeout=20)
    for _ in range(3):
        connection.request("POST", f"{FLEET_PREFIX}pull-messages", POLL)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, REPLY)
    connection.close()
    assert len(edge.requests) == 3


def test_the_coordinators_own_refusal_is_passed_on_and_does_not_count_as_contact(
    open_edge: Callable[..., Edge], open_gate: Callable[[str], Gate]
) -> None:
    edge = open_edge()
    edge.status = 401
    gate = open_gate(edge.address)
    assert ask(gate)[0] == 401
    assert gate.standing.last_reply_unix_s == 0


@pytest.mark.parametrize(
    ("body", "kind", "ahead", "line"),
    [
        (b"certificate-revoked", "text/plain", timedelta(), "certificate-revoked"),
        (b"Jane Doe was here, and so on", "text/plain", timedelta(), "node-refused"),
        (b'{"detail": "Invalid SuperNode authentication"}', "application/json", timedelta(), "node-refused"),
        (
            b'{"detail": "Invalid SuperNode authentication"}',
            "application/json",
            timedelta(minutes=1),
            "clock-off",
        ),
        (
            b'{"detail": "Invalid SuperNode authentication"}',
            "application/json",
            timedelta(hours=-1),
            "clock-off",
        ),
    ],
    ids=["the edge's word", "no word", "another reason", "this clock is ahead", "this clock is behind"],
)
def test_why_a_node_is_turned_away_is_named(
    open_edge: Callable[..., Edge],
    open_gate: Callable[..., Gate],
    body: bytes,
    kind: str,
    ahead: timedelta,
    line: str,
) -> None:
    edge = open_edge()
    now = datetime.now(UTC)
    edge.status, edge.reply = 401, body
    edge.headers = {"content-type": kind, "date": format_datetime(now, usegmt=True)}
    gate = open_gate(edge.address, lambda: now + ahead)
    assert ask(gate) == (401, body)
    assert gate.standing.line == line
