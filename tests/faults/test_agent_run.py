"""The agent's real processes, killed without warning: nothing is lost, nothing is done or told twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.campaign_work.book import Book, book_path
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.joining import join
from medveil.agent.ledger import Ledger
from medveil.agent.reporting_log import EgressLog, sent_messages, verify_log
from medveil.coordinator import operations
from medveil.coordinator.campaign import SiteState
from medveil.coordinator.pki import Authority, create_authority
from medveil.coordinator.status_service import StatusServer
from medveil.coordinator.store import Store
from medveil.models.phantoms import CLASS_NAMES, draw
from medveil.protos.v1 import campaign_pb2

pytestmark = pytest.mark.slow

IMAGES = 96
BUNDLE = (files("medveil.agent.demo") / "phantom.medveil").read_bytes()
SIGNER = (files("medveil.agent.demo") / "phantom.fingerprint").read_text(encoding="ascii").strip()
PATIENCE_S = 240


def until(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.1)
    return value


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@dataclass
class Site:
    """One hospital with its real agent; its coordinator's gRPC service answers, its Flower edge does not."""

    folder: Path
    store: Store
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "MEDVEIL_HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def start(self) -> subprocess.Popen[str]:
        agent = str(Path(sysconfig.get_path("scripts")) / "medveil-agent")
        with (self.folder / "agent.log").open("a") as log:
            process = subprocess.Popen(
                [agent, "run", *self.policy, "--format", "json"],
                env=self.environment, stdout=log, stderr=log, text=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def call(self, *words: str) -> tuple[int, Any]:
        agent = str(Path(sysconfig.get_path("scripts")) / "medveil-agent")
        line = [agent, *words, "--format", "json"]
        done = subprocess.run(line, env=self.environment, capture_output=True, check=False)
        return done.returncode, json.loads(done.stdout)

    def children(self, parent: int) -> dict[int, str]:
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def child(self, parent: int, word: str) -> int | None:
        return next((pid for pid, line in self.children(parent).items() if word in line), None)

    @property
    def policy(self) -> tuple[str, str]:
        return ("--policy", str(self.folder / "site.toml"))

    def report(self) -> bytes | None:
        with Book(book_path(self.home / "federation")) as book:
            campaign = book.campaign(1)
        return None if campaign is None else campaign.report

    @property
    def ledger(self) -> Path:
        return self.folder / "releases/campaign-1-1.private/ledger.sqlite"

    def verified(self) -> int:
        try:
            with closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True)) as ledger:
                return int(
                    ledger.execute("SELECT COUNT(*) FROM images WHERE state = 'verified'").fetchone()[0]
                )
        except sqlite3.Error:
            return 0

    def end(self) -> None:
        """Stop the agent; its log is only whole between two messages."""
        self.processes[-1].terminate()
        assert self.processes[-1].wait(60) == 0

    def check_that_nothing_was_lost_or_repeated(self) -> None:
        with Ledger(self.ledger) as ledger:
            times = Counter(line.subject for line in ledger.log_lines() if line.event == "verified")
            assert (len(times), set(times.values())) == (IMAGES, {1})
            assert ledger.first_changed_line() is None
            assert ledger.totals().verified == IMAGES
        assert verify_log(self.home / "federation/egress.jsonl").changed_line is None
        assert len(list(self.store.reports(1))) == 1


@dataclass
class Coordinator:
    """The coordinator's gRPC service, which goes away and comes back under the same ports."""

    store: Store
    authority: Authority
    ports: tuple[int, int] = (0, 0)
    server: StatusServer | None = None

    def up(self) -> None:
        self.server = StatusServer(self.store, self.authority, ["127.0.0.1"])
        campaign, enrolment = self.ports
        self.ports = self.server.start("127.0.0.1", campaign_port=campaign, enrolment_port=enrolment)

    def down(self) -> None:
        if self.server is not None:
            self.server.stop(0.2)
            self.server = None


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Site, Coordinator]]:
    """A site that has joined, holds the bundle of campaign 1, and has accepted it beforehand by policy."""
    monkeypatch.setenv("MEDVEIL_HOME", str(tmp_path / "home"))
    now = datetime.now(UTC)
    authority = create_authority(tmp_path / "authority", now)
    images, labels = draw(IMAGES, np.random.default_rng(3), size=64)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "images" / CLASS_NAMES[label] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PillowImage.fromarray(image).save(place)
    with Store(tmp_path / "coordinator.sqlite") as store:
        site = Site(tmp_path, store)
        coordinator = Coordinator(store, authority)
        coordinator.up()
        token = operations.invite(store, "st-anna", now)
        federation = site.home / "federation"
        federation.mkdir(parents=True)
        with EgressLog(federation / "egress.jsonl") as log:
            join(f"127.0.0.1:{coordinator.ports[1]}", token.text, authority.fingerprint, federation, log)
        (tmp_path / "site.toml").write_text(
            f'trusted_signers = ["{SIGNER}"]\n[egress]\nminimum_group_size = 2\n'
            f'[coordinator]\ncampaign = "127.0.0.1:{coordinator.ports[0]}"\nfleet = "127.0.0.1:9"\n'
            f'[campaigns]\nsource = "{tmp_path / "images"}"\nout = "{tmp_path / "releases"}"\napprove = "always"\n'
        )
        digest = hashlib.sha256(BUNDLE).digest()
        bundles = Bundles(site.home / "bundles")
        bundles.append(digest, len(BUNDLE), 0, BUNDLE)
        bundles.accept(digest, tmp_path / "site.toml")
        offer = campaign_pb2.Offer(
            name="chest", task="classification", method="salm", epsilon_255=8, mask_ratio=0.25,
            bundle_sha256=digest, bundle_size_bytes=len(BUNDLE), minimum_group_size=2,
        )  # fmt: skip
        operations.create_campaign(store, offer, ("st-anna",), None, now)
        operations.offer_campaign(store, 1, now, "all is ready")
        yield site, coordinator
        for process in site.processes:
            process.kill()
            process.wait()
        coordinator.down()


def test_worker_and_agent_are_killed_mid_image_and_the_campaign_ends_as_if_nothing_had_happened(site):
    hospital, _ = site
    first = hospital.start()
    until(lambda: hospital.verified() > 0)
    worker = until(lambda: hospital.child(first.pid, "campaign_work.worker"))
    os.kill(worker, signal.SIGKILL)
    again = until(lambda: hospital.child(first.pid, "campaign_work.worker"))
    assert again != worker
    children = hospital.children(first.pid)
    assert {"flower-supernode", "flower-superexec"} <= {
        name
        for line in children.values()
        for name in ("flower-supernode", "flower-superexec")
        if name in line
    }
    first.kill()
    first.wait()
    until(lambda: not any(alive(pid) for pid in children), 10)
    assert hospital.store.campaign(1).sites["st-anna"].state is not SiteState.VERIFIED

    hospital.start()
    until(lambda: hospital.store.campaign(1).sites["st-anna"].state is SiteState.VERIFIED)
    code, status = hospital.call("status", *hospital.policy)
    (campaign,) = status["campaigns"]
    assert (code, status["agent"], campaign["stage"], campaign["verified"]) == (
        0,
        "running",
        "reported",
        IMAGES,
    )
    assert status["gate"]["line"] == "unreachable"

    refused, error = hospital.call("run", *hospital.policy)
    assert (refused, error["error"]["code"]) == (7, "agent-busy")
    hospital.end()
    hospital.check_that_nothing_was_lost_or_repeated()


def test_a_report_that_met_a_dead_coordinator_and_a_killed_agent_arrives_once(site):
    hospital, coordinator = site
    agent = hospital.start()
    until(hospital.verified)
    coordinator.down()
    until(lambda: hospital.report() is not None)
    assert hospital.verified() == IMAGES
    until(lambda: hospital.call("status", *hospital.policy)[1]["coordinator"]["trouble"] == "unreachable")
    agent.kill()
    agent.wait()
    report = hospital.report()
    hospital.start()
    coordinator.up()
    until(lambda: hospital.store.campaign(1).sites["st-anna"].state is SiteState.VERIFIED)
    hospital.end()
    hospital.check_that_nothing_was_lost_or_repeated()
    sent = sent_messages(hospital.home / "federation/egress.jsonl")
    assert {message.payload for message in sent if message.method.endswith("/SubmitReport")} == {report}
