"""A certificate that is about to expire is shown, and renewed by `run` while everything goes on."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from flwr.proto import fleet_pb2, node_pb2
from rich.console import Console

from medveil.agent.cli import app
from medveil.agent.egress import Door
from medveil.agent.fleet.gate import Gate
from medveil.agent.fleet.passage import Passage
from medveil.agent.joining import identity_file, join, load_identity, renew
from medveil.agent.reporting_channel import open_channel
from medveil.agent.reporting_log import EgressLog, sent_messages, verify_log
from medveil.coordinator import operations
from medveil.coordinator.watch import as_screen, status_value
from medveil.models.cli_support import run_command
from medveil.protos.fleet import FLEET_PREFIX

LIFE_DAYS = 365
PATIENCE_S = 120
POLL = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=7)).SerializeToString(deterministic=True)
REPLY = fleet_pb2.PullMessagesResponse().SerializeToString()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDVEIL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def joined(federation: Any, home: Path) -> Callable[[int], Path]:
    """Let a site join so long ago that only so many days are left; return its folder."""

    def make(days_left: int) -> Path:
        # An hour more: whole days count.
        federation.clock.shift = timedelta(days=days_left - LIFE_DAYS, hours=1)
        token = operations.invite(federation.store, "st-anna", federation.clock()).text
        folder = home / "federation"
        folder.mkdir(parents=True)
        with EgressLog(folder / "egress.jsonl") as log:
            join(federation.enrolment, token, federation.authority.fingerprint, folder, log)
        federation.clock.shift = timedelta()
        return folder

    return make


@pytest.fixture
def policy(federation: Any, tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(
        f'[egress]\nminimum_group_size = 2\n[coordinator]\ncampaign = "{federation.campaign}"\n'
        f'fleet = "127.0.0.1:9"\n[campaigns]\nsource = "{tmp_path}"\nout = "{tmp_path}/releases"\n'
    )
    return path


def serial_of(pem: bytes) -> int:
    return x509.load_pem_x509_certificate(pem).serial_number


@pytest.mark.parametrize(
    ("days", "notice", "words"),
    [
        (200, None, "200 days left"),
        (59, 60, "fewer than 30"),
        (29, 30, "at its next contact"),
        (6, 7, "could not be renewed"),
        (-2, 0, "ask the coordinator for a new invitation"),
    ],
)
def test_the_status_says_ahead_what_becomes_of_the_certificate(
    joined: Any, policy: Path, capsys: Any, days: int, notice: int | None, words: str
) -> None:
    joined(days)
    assert run_command(app, "medveil-agent", ["status", "--policy", str(policy), "--format", "json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["certificate_days"], value["certificate_notice"]) == (days, notice)
    assert run_command(app, "medveil-agent", ["status", "--policy", str(policy)]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if "certificate" in line)
    assert words in shown


@pytest.mark.parametrize(
    ("days", "notice", "words"),
    [
        (200, None, "200 days"),
        (59, 60, "59 days (fewer than 60)"),
        (6, 7, "6 days (fewer than 7)"),
        (-2, 0, "expired"),
    ],
)
def test_the_coordinator_sees_it_too(
    federation: Any, joined: Any, days: int, notice: int | None, words: str
) -> None:
    joined(days)
    federation.offered("st-anna")
    value = status_value(federation.store, 1, federation.clock())
    (site,) = value["sites"]
    assert (site["certificate_days"], site["certificate_notice"]) == (days, notice)
    console = Console(width=240)
    with console.capture() as captured:
        console.print(as_screen(value))
    assert words in captured.get()


@pytest.mark.slow
def test_run_renews_by_itself_and_nothing_stops_meanwhile(
    federation: Any, joined: Any, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = joined(24)
    accepted: list[int] = []  # serial numbers of the certificates that the coordinator let in, call by call
    whole = operations.identify

    def noted(store: Any, who: Any, *rest: Any) -> None:
        whole(store, who, *rest)
        accepted.append(who.serial)

    monkeypatch.setattr(operations, "identify", noted)
    old = load_identity(folder)
    words = ["run", "--policy", str(policy), "--format", "json"]
    program = str(Path(sysconfig.get_path("scripts")) / "medveil-agent")
    with (folder / "run.log").open("wb") as log:
        agent = subprocess.Popen([program, *words], env=dict(os.environ), stdout=log, stderr=log)
    try:
        before, after = serial_of(old.chain_pem), None
        until(lambda: serial_of(load_identity(folder).chain_pem) != before)
        after = serial_of(load_identity(folder).chain_pem)
        until(lambda: after in accepted)
        assert agent.poll() is None  # the process that began
    finally:
        agent.terminate()
        assert agent.wait(60) == 0
    assert accepted == sorted(accepted, key=[before, after].index)  # first the old one, then only the new one
    calls = [line.method.rpartition("/")[2] for line in sent_messages(folder / "egress.jsonl")]
    assert calls[:3] == ["Join", "SendBeat", "Renew"]
    assert "SendBeat" in calls[3:]
    assert calls.count("Renew") == 1
    assert verify_log(folder / "egress.jsonl").changed_line is None
    assert (load_identity(folder).not_after - old.not_after).days > 300


def test_flowers_open_connection_goes_on_and_its_next_one_shows_the_new_certificate(
    federation: Any, joined: Any, tmp_path: Path
) -> None:
    folder = joined(24)
    old = load_identity(folder)
    with closing(_Edge(federation.authority, tmp_path)) as edge, EgressLog(folder / "egress.jsonl") as log:
        gate = Gate(
            edge.address,
            lambda: (load_identity(folder).authority_pem, identity_file(folder)),
            Passage(b"a key"),
            log,
            tmp_path / "gate",
        )
        try:
            with closing(_supernode(gate)) as connection:
                assert _poll(connection) == REPLY
                with open_channel(
                    federation.campaign, old.authority_pem, (old.key_pem, old.chain_pem)
                ) as line:
                    new = renew(folder, Door(line, log))
                assert _poll(connection) == REPLY
            with closing(_supernode(gate)) as connection:
                assert _poll(connection) == REPLY
        finally:
            gate.stop()
    before, after = serial_of(old.chain_pem), serial_of(new.chain_pem)
    assert edge.seen == [before, before, after]


class _Edge:
    """A fleet port that answers every call and remembers under which certificate it came."""

    def __init__(self, authority: Any, folder: Path) -> None:
        self.seen: list[int] = []
        issued, key = authority.issue_server(["127.0.0.1"], authority.certificate.not_valid_before_utc)
        pem = folder / "edge.pem"
        pem.write_bytes(key + issued.chain_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        context.load_verify_locations(cadata=authority.certificate_pem.decode("ascii"))
        context.verify_mode = ssl.CERT_REQUIRED
        edge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                der: Any = self.connection.getpeercert(binary_form=True)  # type: ignore[attr-defined]
                edge.seen.append(x509.load_der_x509_certificate(der).serial_number)
                self.send_response_only(200)
                self.send_header("content-length", str(len(REPLY)))
                self.end_headers()
                self.wfile.write(REPLY)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _supernode(gate: Gate) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(gate.certificate))
    return http.client.HTTPSConnection(*gate.address.split(":"), context=context, timeout=20)


def _poll(connection: http.client.HTTPSConnection) -> bytes:
    connection.request("POST", f"{FLEET_PREFIX}pull-messages", POLL)
    return connection.getresponse().read()


def until(condition: Callable[[], Any]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)
