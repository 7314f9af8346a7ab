"""The edge on a real socket: who may come in, what may pass, and what comes back."""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from medveil.coordinator.fleet.edge import MAX_BODY_BYTES, Edge
from medveil.coordinator.pki import Caller
from medveil.models.errors import ConfigurationError, RefusedError
from medveil.protos.fleet import FLEET_CALLS, FLEET_PREFIX, NODE_KEY_HEADER

KEY = b"a node's key"
HEADERS = {NODE_KEY_HEADER: base64.b64encode(KEY).decode("ascii")}
PULL = FLEET_PREFIX + "pull-messages"


@dataclass
class SuperLink:
    """Stands in for Flower on loopback and writes down what reaches it."""

    port: int
    calls: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    answer: bytes = b"answer"
    pause_s: float = 0.0


@dataclass
class Door:
    """The edge, and what was asked before each call."""

    port: int
    edge: Edge
    authority_pem: bytes
    admitted: list[tuple[Caller, bytes, str]] = field(default_factory=list)
    verdict: Exception | None = None

    def context(self, identity: Path | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.authority_pem.decode("ascii"))
        if identity is not None:
            context.load_cert_chain(identity)
        return context

    def connection(self, identity: Path | None) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=self.context(identity))

    def call(
        self, identity: Path | None, path: str, body: bytes = b"call", method: str = "POST", **headers: str
    ) -> tuple[int, bytes]:
        connection = self.connection(identity)
        try:
            connection.request(method, path, body, {**HEADERS, **headers})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@pytest.fixture
def certificate(coordinator: Any) -> Path:
    issued, key = coordinator.authority.issue_server(["127.0.0.1", "localhost"], coordinator.clock())
    path: Path = coordinator.folder / "server.pem"
    path.write_bytes(key + issued.chain_pem)
    return path


@pytest.fixture
def superlink(certificate: Path) -> Iterator[SuperLink]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            state.calls.append((self.path, body, dict(self.headers)))
            time.sleep(state.pause_s)
            self.send_response(200)
            self.send_header("content-length", str(len(state.answer)))
            self.end_headers()
            self.wfile.write(state.answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    state = SuperLink(server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.05,)).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def door(coordinator: Any, certificate: Path, superlink: SuperLink) -> Iterator[Door]:
    def admit(who: Caller, key: bytes, call: str) -> None:
        this.admitted.append((who, key, call))
        if this.verdict is not None:
            raise this.verdict

    edge = Edge(superlink.port, coordinator.authority.certificate_pem, admit)
    this = Door(edge.start("127.0.0.1", 0, certificate), edge, coordinator.authority.certificate_pem)
    yield this
    edge.stop()


@pytest.fixture
def site(coordinator: Any) -> Path:
    path: Path = coordinator.join("a")
    return path


@pytest.mark.parametrize("call", sorted(FLEET_CALLS))
def test_a_sites_fleet_calls_pass_both_ways(door: Door, superlink: SuperLink, site: Path, call: str) -> None:
    superlink.answer = b"x" * 100_000
    assert door.call(site, FLEET_PREFIX + call) == (200, superlink.answer)
    assert [(path, body) for path, body, _ in superlink.calls] == [(FLEET_PREFIX + call, b"call")]
    assert [(who.name, key, asked) for who, key, asked in door.admitted] == [("a", KEY, call)]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/openapi.json",
        "/health",
        "/",
        "/v1/fleet/",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/pull-messages/../../control/start-run",
        "//v1/fleet/pull-messages",
        "/v1/fleet//pull-messages",
        "/v1/fleet/pull-messages?x=1",
        "/V1/fleet/pull-messages",
        "http://127.0.0.1/v1/control/start-run",
    ],
)
def test_nothing_but_the_fleet_calls_passes(door: Door, superlink: SuperLink, site: Path, path: str) -> None:
    assert door.call(site, path) == (403, b"forbidden-path")
    assert superlink.calls == []


def test_only_post_passes(door: Door, superlink: SuperLink, site: Path) -> None:
    assert door.call(site, PULL, b"", method="GET")[0] == 403
    assert superlink.calls == []


def test_who_holds_only_the_authoritys_certificate_reaches_nothing(door: Door, superlink: SuperLink) -> None:
    for path in (PULL, "/v1/control/start-run"):
        with pytest.raises((OSError, http.client.HTTPException)):
            door.call(None, path)
    assert superlink.calls == []
    assert door.admitted == []


def test_a_certificate_of_another_authority_reaches_nothing(
    door: Door, superlink: SuperLink, tmp_path: Path
) -> None:
    from medveil.coordinator.pki import create_authority

    stranger = create_authority(tmp_path / "stranger", _now())
    issued, key = stranger.issue_server(["127.0.0.1"], _now())
    identity = tmp_path / "stranger.pem"
    identity.write_bytes(key + issued.chain_pem)
    with pytest.raises((OSError, http.client.HTTPException)):
        door.call(identity, PULL)
    assert superlink.calls == []


def test_the_edges_own_server_certificate_is_no_sites(
    door: Door, superlink: SuperLink, certificate: Path
) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        door.call(certificate, PULL)
    assert superlink.calls == []


def test_plain_http_and_a_silent_caller_get_nothing(door: Door, superlink: SuperLink) -> None:
    with socket.create_connection(("127.0.0.1", door.port), 10) as plain:
        plain.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP")
    assert superlink.calls == []


def test_a_refused_caller_hears_the_word_and_nothing_is_forwarded(
    door: Door, superlink: SuperLink, site: Path
) -> None:
    door.verdict = RefusedError("certificate-revoked", "Revoked.", private="secret")
    assert door.call(site, PULL) == (401, b"certificate-revoked")
    assert superlink.calls == []


def test_what_time_mends_is_told_so_that_a_node_tries_again(door: Door, site: Path) -> None:
    door.verdict = ConfigurationError("superlink", "It does not answer.", private="secret")
    assert door.call(site, PULL) == (503, b"superlink")


def test_a_call_needs_one_node_key(door: Door, superlink: SuperLink, site: Path) -> None:
    assert door.call(site, PULL, **{NODE_KEY_HEADER: "no base64!"}) == (401, b"node-key")
    connection = door.connection(site)
    connection.request("POST", PULL, b"call")
    assert connection.getresponse().status == 401
    connection.close()
    assert superlink.calls == []


def test_a_body_has_a_length_and_a_limit(door: Door, superlink: SuperLink, site: Path) -> None:
    assert door.call(site, PULL, b"x" * MAX_BODY_BYTES)[0] == 200
    assert door.call(site, PULL, b"x" * (MAX_BODY_BYTES + 1)) == (413, b"too-large")
    connection = door.connection(site)
    connection.request("POST", PULL, iter([b"a", b"b"]), HEADERS)  # chunked
    assert connection.getresponse().status == 411
    connection.close()
    assert len(superlink.calls) == 1


def test_two_lengths_cannot_smuggle_a_second_request(door: Door, superlink: SuperLink, site: Path) -> None:
    inner = b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    for framing in (
        f"content-length: 0\r\ncontent-length: {len(inner)}\r\n",
        f"content-length: {len(inner)}\r\ntransfer-encoding: chunked\r\n",
    ):
        head = f"POST {PULL} HTTP/1.1\r\nhost: x\r\n{NODE_KEY_HEADER}: {HEADERS[NODE_KEY_HEADER]}\r\n{framing}\r\n"
        with (
            socket.create_connection(("127.0.0.1", door.port), 10) as plain,
            door.context(site).wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(head.encode("ascii") + inner)
            tls.settimeout(10)
            assert b" 200 " not in tls.recv(1000)
    assert superlink.calls == []


def test_one_connection_takes_many_calls(door: Door, superlink: SuperLink, site: Path) -> None:
    connection = door.connection(site)
    for number in range(3):
        connection.request("POST", PULL, str(number).encode("ascii"), HEADERS)
        assert connection.getresponse().read() == b"answer"
    connection.close()
    assert [body for _, body, _ in superlink.calls] == [b"0", b"1", b"2"]


def test_headers_of_one_hop_stay_there(door: Door, superlink: SuperLink, site: Path) -> None:
    door.call(site, PULL, connection="keep-alive", te="trailers", host="elsewhere", **{"flwr-signature": "s"})
    headers = {name.lower(): value for name, value in superlink.calls[0][2].items()}
    assert headers["host"] == f"127.0.0.1:{superlink.port}"
    assert (headers["connection"], headers["flwr-signature"]) == ("close", "s")
    assert "te" not in headers


def test_without_a_superlink_a_node_is_told_to_try_again(
    coordinator: Any, certificate: Path, site: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        edge = Edge(
            unused.getsockname()[1], coordinator.authority.certificate_pem, lambda who, key, call: None
        )
        try:
            port = edge.start("127.0.0.1", 0, certificate)
            assert Door(port, edge, coordinator.authority.certificate_pem).call(site, PULL) == (
                502,
                b"superlink-down",
            )
        finally:
            edge.stop()


def test_a_new_certificate_is_shown_without_a_restart(
    door: Door, coordinator: Any, certificate: Path, site: Path
) -> None:
    def shown() -> bytes | None:
        with (
            socket.create_connection(("127.0.0.1", door.port), 10) as plain,
            door.context(site).wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            return tls.getpeercert(binary_form=True)

    before = shown()
    issued, key = coordinator.authority.issue_server(["127.0.0.1"], coordinator.clock())
    certificate.write_bytes(key + issued.chain_pem)
    door.edge.use(certificate)
    assert shown() != before
    assert door.call(site, PULL)[0] == 200


def test_a_site_cannot_hold_all_connections(door: Door, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medveil.coordinator.fleet.edge._CONNECTIONS_PER_SITE", 2)
    held = [door.connection(site) for _ in range(2)]
    for connection in held:
        connection.request("POST", PULL, b"call", HEADERS)
        connection.getresponse().read()
    with pytest.raises((OSError, http.client.HTTPException)):
        door.call(site, PULL)
    for connection in held:
        connection.close()
    _until(lambda: _answers(door, site))


def test_a_port_that_is_taken_is_named(coordinator: Any, door: Door, certificate: Path) -> None:
    other = Edge(1, coordinator.authority.certificate_pem, lambda who, key, call: None)
    try:
        with pytest.raises(ConfigurationError, match="port"):
            other.start("127.0.0.1", door.port, certificate)
    finally:
        other.stop()


def _answers(door: Door, site: Path) -> bool:
    try:
        return door.call(site, PULL)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)
