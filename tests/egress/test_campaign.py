"""A whole campaign between real processes, with every connection that leaves the site opened up and written down.

    medveil-agent join, run   --- TLS --->  a tap per port, which holds both ends' keys  --- TLS --->  the coordinator

The site's images are named after a patient, lie in a folder of that name and carry the name, a UID and a pattern of
pixels; some are damaged. Twice a program of the site fails with the patient's name in its exception: Flower's client
app, whose text Flower would send, and the worker. Every Python process of both sides also writes down whom it
connects to or asks for by name. gRPC compresses headers; `test_canaries.py` looks at those in the clear. The site's
policy asks for noise, so that no exact number of images leaves either.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medveil.agent.demo.sites import draw_sites
from medveil.agent.ledger import Ledger
from medveil.agent.reporting_log import sent_messages
from medveil.coordinator import operations
from medveil.coordinator.pki import Authority, create_authority
from medveil.coordinator.store import Store
from medveil.protos.v1 import figures_pb2, report_pb2
from medveil.protos.v1.conventions import methods

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PATIENCE_S = 400
IMAGES, DAMAGED = 40, 6
LOOPBACK = {"127.0.0.1"}
PROGRAMS = {
    "flower-supernode", "flower-superexec", "flwr-clientapp", "flower-superlink", "flwr-serverapp", "-c",
}  # fmt: skip
"""What runs on both sides: Flower's programs, and ours (started below with ``python -c``)."""

HOOK = """
import json, os, sys
from pathlib import Path

_HERE = Path(__file__).parent
_ASKED = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}


def _write(event, host):
    line = json.dumps([Path(sys.orig_argv[1]).name, event, host]) + "\\n"
    handle = os.open(_HERE / "connections", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line.encode())
    os.close(handle)


def _note(event, arguments):
    if event in _ASKED:
        where = arguments[_ASKED[event]]
        host = where[0] if isinstance(where, tuple) else where
        if isinstance(host, str) and not host.startswith("/"):  # a path is a Unix socket
            _write(event, host)


class _Failing:
    def find_spec(self, name, path=None, target=None):
        order = _HERE / f"fail-{name}"
        if order.exists():
            text = order.read_text()
            order.unlink()
            raise RuntimeError(text)


_write("started", "")
sys.addaudithook(_note)
sys.meta_path.insert(0, _Failing())
"""
"""Every Python process below starts with this: `sitecustomize`. It fails once at the import that a file names."""

START = """
import sys
from medveil.agent.fleet import programs
from medveil.coordinator.fleet import serving
from medveil.{side}.cli import main

programs._KEPT = (*programs._KEPT, "PYTHONPATH")
whole = serving._environment
serving._environment = lambda layout: {{**whole(layout), "PYTHONPATH": {hook!r}}}
sys.argv = ["medveil-{side}", *sys.argv[1:]]
sys.exit(main())
"""
"""Both sides give their children a whole environment of their own; for this test the hook is in it."""


class Tap:
    """Between a site and one port of the coordinator: what the site says is kept in the clear."""

    def __init__(
        self, authority: Authority, folder: Path, target: int, identity: Path | None, *alpn: str
    ) -> None:
        self.upstream = bytearray()
        self._writers: list[asyncio.StreamWriter] = []
        self._target, self._identity, self._alpn = target, identity, list(alpn)
        self._authority = authority
        self._loop = asyncio.new_event_loop()
        issued, key = authority.issue_server(["127.0.0.1"], datetime.now(UTC))
        pem = folder / f"tap-{target}.pem"
        pem.write_bytes(key + issued.chain_pem)
        inner = self._trusting(ssl.PROTOCOL_TLS_SERVER)
        inner.load_cert_chain(pem)
        inner.verify_mode = ssl.CERT_NONE if identity is None else ssl.CERT_REQUIRED
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._joined, "127.0.0.1", 0, ssl=inner)
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def _trusting(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.load_verify_locations(cadata=self._authority.certificate_pem.decode("ascii"))
        if self._alpn:
            context.set_alpn_protocols(self._alpn)
        return context

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        outer = self._trusting(ssl.PROTOCOL_TLS_CLIENT)
        if self._identity is not None:
            outer.load_cert_chain(self._identity)
        try:
            back, onward = await asyncio.open_connection("127.0.0.1", self._target, ssl=outer)
        except OSError:
            writer.close()
            return
        self._writers += [writer, onward]
        await asyncio.gather(self._pump(reader, onward, self.upstream), self._pump(back, writer, bytearray()))

    @staticmethod
    async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray) -> None:
        with suppress(OSError):
            while block := await source.read(65536):
                kept += block
                sink.write(block)
                await sink.drain()
        sink.close()

    async def _end(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass
class Evidence:
    """What is there to be searched when all is over."""

    site: Path
    hook: Path
    upstream: dict[str, bytes]
    logs: str
    digests: list[str]
    released: int
    quarantined: int

    @property
    def everything(self) -> bytes:
        return b"".join(self.upstream.values())

    @property
    def home(self) -> Path:
        return self.site / "home"

    def connections(self) -> list[tuple[str, str, str]]:
        lines = (self.hook / "connections").read_text().splitlines()
        return [tuple(json.loads(line)) for line in lines]


@dataclass
class Side:
    """One side's commands, with the hook in every process."""

    name: str
    home: Path
    hook: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def line(self, *words: str) -> dict[str, Any]:
        start = START.format(side=self.name, hook=str(self.hook))
        environment = {**os.environ, "MEDVEIL_HOME": str(self.home), "PYTHONPATH": str(self.hook)}
        return {"args": [sys.executable, "-c", start, *words], "env": environment}

    def call(self, *words: str) -> None:
        subprocess.run(**self.line(*words), check=True, capture_output=True)

    def start(self, log: Path, *words: str) -> None:
        with log.open("wb") as file:
            self.running.append(subprocess.Popen(**self.line(*words), stdout=file, stderr=subprocess.STDOUT))

    def stop(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory, canaries: Any) -> Iterator[Evidence]:
    folder = tmp_path_factory.mktemp("campaign")
    site, hook = folder / canaries.name, folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    plant(canaries, site)
    coordinator, agent = Side("coordinator", folder / "coordinator", hook), Side("agent", site / "home", hook)
    authority = create_authority(coordinator.home / "authority", datetime.now(UTC))
    ports = free_ports("campaign", "enrolment", "fleet", "superlink")
    with ExitStack() as closing:
        store = closing.enter_context(Store(coordinator.home / "coordinator.sqlite"))
        closing.callback(coordinator.stop)
        words = [word for name, port in ports.items() for word in (f"--{name}-port", str(port))]
        log = folder / "coordinator.log"
        coordinator.start(log, "run", "--name", "127.0.0.1", "--format", "json", *words)
        until(lambda: '"ready"' in log.read_text(), log)

        identity = agent.home / "federation/identity.pem"
        taps = {
            "enrolment": Tap(authority, folder, ports["enrolment"], None, "h2"),
            "campaign": Tap(authority, folder, ports["campaign"], identity, "h2"),
            "fleet": Tap(authority, folder, ports["fleet"], identity),
        }
        for tap in taps.values():
            closing.callback(tap.close)
        token = operations.invite(store, "st-anna", datetime.now(UTC)).text
        address = f"127.0.0.1:{taps['enrolment'].port}"
        agent.call("join", address, "--token", token, "--fingerprint", authority.fingerprint)
        policy = site / "site.toml"
        policy.write_text(
            f'[coordinator]\ncampaign = "127.0.0.1:{taps["campaign"].port}"\n'
            f'fleet = "127.0.0.1:{taps["fleet"].port}"\n'
            f'[campaigns]\nsource = "{site}/images"\nout = "{site}/out"\napprove = "always"\n'
            "[egress]\nminimum_group_size = 5\n"
            "[egress.noise]\nepsilon_per_report = 1.0\nepsilon_total = 1.0\n"
        )
        closing.callback(agent.stop)
        agent.start(site / "agent.log", "run", "--policy", str(policy))
        until(lambda: '"site-present"' in log.read_text(), site / "agent.log")

        for module in ("medveil.agent.fleet.client_app", "medveil.agent.campaign_work.worker"):
            (hook / f"fail-{module}").write_text(f"cannot read {site}/images/{canaries.uid}.dcm")
        bundle = folder / "phantom.medveil"
        bundle.write_bytes((files("medveil.agent.demo") / "phantom.medveil").read_bytes())
        create = ("campaign", "create", "chest", "--site", "st-anna", "--bundle", str(bundle))
        coordinator.call(*create, "--minimum-group-size", "5")
        coordinator.call("campaign", "offer", "1")
        until(lambda: operations.campaign_status(store, 1, datetime.now(UTC)).complete, site / "agent.log")
        until(lambda: not store.open_rounds(), log)
        agent.stop()
        with Ledger(site / "out/campaign-1-1.private/ledger.sqlite") as ledger:
            totals = ledger.totals()
            digests = [row.receipt.digest for row in ledger.verified_by_digest() if row.receipt is not None]
        told = [*(agent.home / "flower").rglob("*.log"), agent.home / "worker.log", site / "agent.log"]
        yield Evidence(
            site,
            hook,
            {name: bytes(tap.upstream) for name, tap in taps.items()},
            "\n".join(path.read_text(errors="replace") for path in told if path.is_file()),
            digests,
            totals.verified,
            sum(totals.quarantined.values()),
        )


def plant(canaries: Any, site: Path) -> None:
    """Leave the site images that speak of a patient in every way that a file can."""
    drawn = sorted(draw_sites(site / "drawn").sources["lakeview"].rglob("*.dcm"))
    spread = np.linspace(0, len(drawn) - 1, IMAGES + DAMAGED).astype(int)  # over both classes' folders
    for number, source in enumerate(drawn[place] for place in spread):
        dataset = pydicom.dcmread(source)
        dataset.PatientName, dataset.PatientID = canaries.name, canaries.name
        uid = f"{canaries.uid}.{number}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
        dataset.PixelData = canaries.pixels + dataset.PixelData[len(canaries.pixels) :]
        target = site / "images" / source.parent.name / f"{canaries.name}-{uid}.dcm"
        target.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(target)
        if number >= IMAGES:
            target.write_bytes(target.read_bytes()[:-1000])
    shutil.rmtree(site / "drawn")


def until(condition: Callable[[], Any], log: Path) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, log.read_text(errors="replace")[-2000:]
        time.sleep(0.2)


def free_ports(*names: str) -> dict[str, int]:
    """Return ports below the range that the kernel gives to outgoing connections."""
    found: list[int] = []
    while len(found) < len(names):
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return dict(zip(names, found, strict=True))


def test_no_canary_is_in_any_byte_that_left_the_site(evidence: Evidence, canaries: Any) -> None:
    assert (evidence.released, evidence.quarantined) == (IMAGES, DAMAGED)
    secrets: list[str | bytes] = [str(evidence.site), str(evidence.home)]
    secrets += [bytes.fromhex(digest) for digest in evidence.digests]
    secrets.append(pydicom.dcmread(next((evidence.site / "images").rglob("*.dcm"))).PixelData[:64])
    for form in canaries.forms(*secrets):
        assert form not in evidence.everything, form


def test_the_taps_heard_everything_that_the_egress_log_holds(evidence: Evidence) -> None:
    messages = list(sent_messages(evidence.home / "federation/egress.jsonl"))
    calls = {message.method.rpartition("/")[2] for message in messages}
    assert {"Join", "SendBeat", "AnswerOffer", "SubmitReport", "activate-node", "push-object"} <= calls
    for message in messages:
        assert message.payload in evidence.everything, message.method


def test_with_noise_no_message_has_an_exact_number_of_images(evidence: Evidence) -> None:
    sent = list(sent_messages(evidence.home / "federation/egress.jsonl"))
    of_kind = {
        name: [
            method.request.FromString(message.payload) for message in sent if message.method == method.path
        ]
        for name, method in methods("CampaignService").items()
    }
    (report,) = {message.SerializeToString() for message in of_kind["SubmitReport"]}
    told = report_pb2.Report.FromString(report)
    told.outcome.ClearField("unfinished")
    assert told.noise.scale == 3
    assert "noised" in str(told)
    assert "exact" not in str(told)
    assert of_kind["SendBeat"]
    for beat in of_kind["SendBeat"]:
        assert beat.images.suppressed == beat.done.suppressed == figures_pb2.SUPPRESSION_NOISE
        assert (beat.images_per_s, beat.since_last_work_s) == (0, 0)


def test_exceptions_with_the_patients_name_were_raised_and_their_text_stayed(
    evidence: Evidence, canaries: Any
) -> None:
    text = f"RuntimeError: cannot read {evidence.site}/images/{canaries.uid}.dcm"
    assert evidence.logs.count(text) >= 2  # in the client app's process and in the worker's
    assert not list(evidence.hook.glob("fail-*"))
    assert b"withheld by the site" in evidence.upstream["fleet"]  # Flower did send an error; without its text


def test_no_process_of_either_side_connects_or_asks_for_a_name_beyond_this_machine(
    evidence: Evidence,
) -> None:
    connections = evidence.connections()
    assert {host for _, event, host in connections if event != "started"} == LOOPBACK
    assert {program for program, event, _ in connections if event == "started"} >= PROGRAMS


def test_the_hook_sees_who_connects_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    asks = "import socket\ntry: socket.getaddrinfo('telemetry.invalid', 443, flags=socket.AI_NUMERICHOST)\n"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", f"{asks}except OSError: pass"], env=environment, check=True)
    lines = (tmp_path / "connections").read_text().splitlines()
    assert [json.loads(line)[1:] for line in lines] == [
        ["started", ""],
        ["socket.getaddrinfo", "telemetry.invalid"],
    ]
