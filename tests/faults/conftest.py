"""Real processes to strike at: a coordinator, hospitals, and what became of the images."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
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
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as PillowImage

from medveil.agent.campaign_work.book import Book, Campaign, book_path
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.joining import join
from medveil.agent.ledger import Ledger
from medveil.agent.reporting_log import EgressLog, verify_log
from medveil.coordinator import operations
from medveil.coordinator.pki import Authority, create_authority, load_authority
from medveil.coordinator.store import Store
from medveil.models.bundle import ManifestDraft, RecipeSettings, fingerprint, write_bundle
from medveil.models.phantoms import CLASS_NAMES, draw

PATIENCE_S = 240.0
"""Flower's processes each need seconds of imports, on machines that do other things as well."""
PHANTOM = (files("medveil.agent.demo") / "phantom.medveil").read_bytes()
SIGNER = (files("medveil.agent.demo") / "phantom.fingerprint").read_text(encoding="ascii").strip()


def wait_until(condition: Callable[[], Any], what: str = "it", timeout_s: float = PATIENCE_S) -> Any:
    """Return the condition's value once it is true; fail when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
    return value


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def processes_below(ancestor: int) -> dict[int, str]:
    """Return command lines of all children, their children, and so on, by process number."""
    parents, lines = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    found: dict[int, str] = {}
    below = {ancestor}
    while below:
        below = {pid for pid, parent in parents.items() if parent in below} - found.keys()
        found |= {pid: lines.get(pid, "") for pid in below}
    return found


def one_below(ancestor: int, word: str) -> int | None:
    """Return a process below another one whose command line has a word."""
    return next((pid for pid, line in processes_below(ancestor).items() if word in line), None)


def program(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def agent_command(home: Path, *words: str) -> tuple[int, Any]:
    """Run a command of the agent on a folder of its own and return its exit code and what it said."""
    line = [program("medveil-agent"), *words, "--format", "json"]
    environment = {**os.environ, "MEDVEIL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, check=False)
    return done.returncode, json.loads(done.stdout)


def tree(folder: Path) -> dict[str, str]:
    """Return the digest of every image of a release."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


@dataclass
class Coordinator:
    """A coordinator's folder and its process; the last entry is the one that runs."""

    home: Path
    ports: dict[str, int]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.processes[-1]

    @property
    def authority(self) -> Authority:
        return load_authority(self.home / "authority")

    def start(self) -> subprocess.Popen[bytes]:
        words = [
            *("run", "--home", str(self.home), "--name", "127.0.0.1", "--format", "json"),
            *(word for name, port in self.ports.items() for word in (f"--{name}-port", str(port))),
        ]
        with self._output(len(self.processes)).open("wb") as file:
            process = subprocess.Popen(
                [program("medveil-coordinator"), *words], stdout=file, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def said(self) -> str:
        return self._output(len(self.processes) - 1).read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        told = [json.loads(line) for line in self.said().splitlines() if line.endswith("}")]
        return [event for event in told if event["event"] == name]

    def ready(self, times: int = 1) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.said()
            return len(self.events("ready")) >= times

        wait_until(is_ready, "ready")

    def child(self, word: str) -> int:
        return int(wait_until(lambda: one_below(self.process.pid, word), word))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def call(self, *words: str) -> Any:
        line = [program("medveil-coordinator"), *words, "--home", str(self.home), "--format", "json"]
        done = subprocess.run(line, check=False, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)

    def _output(self, number: int) -> Path:
        return self.home / f"run-{number}.log"


@dataclass
class Hospital:
    """One site: its images, its agent's process, and what its records say."""

    name: str
    folder: Path
    images: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def source(self) -> Path:
        return self.folder / "images"

    @property
    def policy(self) -> tuple[str, str]:
        return ("--policy", str(self.folder / "site.toml"))

    @property
    def bundles(self) -> Bundles:
        return Bundles(self.home / "bundles")

    @property
    def egress_log(self) -> Path:
        return self.home / "federation/egress.jsonl"

    @property
    def pid(self) -> int:
        return self.processes[-1].pid

    def release(self, number: int = 1) -> Path:
        return self.folder / f"releases/campaign-{number}-1"

    # Preparations

    def draw_large_image(self) -> int:
        """Draw one more, whose file is larger than any record of this site will grow; return its size in bytes."""
        place = self.source / CLASS_NAMES[0] / "large.png"
        noise = np.random.default_rng(4).integers(0, 256, (900, 900), np.uint8)
        PillowImage.fromarray(noise).save(place)
        self.images += 1
        return place.stat().st_size

    def draw_images(self) -> None:
        """Draw eight of each size, so that there are many batches, and times between them to strike at."""
        rng = np.random.default_rng(3)
        for first in range(0, self.images, 8):
            images, labels = draw(min(8, self.images - first), rng, size=48 + first // 4)
            for number, (image, label) in enumerate(zip(images, labels, strict=True), first):
                place = self.source / CLASS_NAMES[label] / f"{number:03}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                PillowImage.fromarray(image).save(place)

    def write_policy(self, campaign_port: int, fleet_port: int = 9, signer: str = SIGNER) -> None:
        """Approve everything that the coordinator at these ports offers, signed by medveil's own key or another."""
        (self.folder / "site.toml").write_text(
            f'trusted_signers = ["{SIGNER}", "{signer}"]\n[egress]\nminimum_group_size = 2\n[coordinator]\n'
            f'campaign = "127.0.0.1:{campaign_port}"\nfleet = "127.0.0.1:{fleet_port}"\n'
            f'[campaigns]\nsource = "{self.source}"\nout = "{self.folder}/releases"\napprove = "always"\n'
        )

    def ask_for_noise(self, epsilon: float) -> None:
        """Let the policy pay for ten reports."""
        with (self.folder / "site.toml").open("a") as policy:
            policy.write(f"[egress.noise]\nepsilon_per_report = {epsilon}\nepsilon_total = {10 * epsilon}\n")

    def join(self, store: Store, authority: Authority, enrolment_port: int) -> None:
        token = operations.invite(store, self.name, datetime.now(UTC)).text
        federation = self.home / "federation"
        federation.mkdir(parents=True)
        with EgressLog(self.egress_log) as log:
            join(f"127.0.0.1:{enrolment_port}", token, authority.fingerprint, federation, log)

    # The process

    def start(self) -> subprocess.Popen[str]:
        line = [program("medveil-agent"), "run", *self.policy, "--format", "json"]
        with (self.folder / "agent.log").open("a") as log:
            environment = {**os.environ, "MEDVEIL_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(line, env=environment, stdout=log, stderr=log, text=True)
        self.processes.append(process)
        return process

    def kill(self) -> None:
        self.processes[-1].kill()
        self.processes[-1].wait()

    def end(self) -> None:
        """Stop the agent; its log is only whole between two messages."""
        self.processes[-1].terminate()
        assert self.processes[-1].wait(60) == 0

    def call(self, *words: str) -> tuple[int, Any]:
        return agent_command(self.home, *words)

    def status(self) -> dict[str, Any]:
        code, value = self.call("status", *self.policy)
        assert code == 0, value
        return dict(value)

    def find(self, word: str) -> int | None:
        """Return a process below the agent, if there is one."""
        return one_below(self.pid, word)

    def child(self, word: str) -> int:
        """Return a process below the agent, once there is one."""
        return int(wait_until(lambda: self.find(word), word))

    # What the records say

    def campaign(self, number: int = 1) -> Campaign | None:
        with Book(book_path(self.home / "federation")) as book:
            return book.campaign(number)

    def ledger(self, number: int = 1) -> Path:
        return self.release(number).with_name(f"campaign-{number}-1.private") / "ledger.sqlite"

    def verified(self, number: int = 1) -> int:
        """Return how many images are verified, as an onlooker sees it who opens nothing for writing."""
        question = "SELECT COUNT(*) FROM images WHERE state = 'verified'"
        with (
            contextlib.suppress(sqlite3.Error),
            closing(sqlite3.connect(f"file:{self.ledger(number)}?mode=ro", uri=True)) as ledger,
        ):
            return int(ledger.execute(question).fetchone()[0])
        return 0

    def check_that_nothing_was_lost_or_repeated(self, store: Store, number: int = 1) -> None:
        """Compare ledger, release, egress log and the coordinator's store with each other."""
        with Ledger(self.ledger(number)) as ledger:
            times = Counter(line.subject for line in ledger.log_lines() if line.event == "verified")
            assert (len(times), set(times.values())) == (self.images, {1})
            assert ledger.first_changed_line() is None
            assert ledger.totals().verified == self.images
        assert len(tree(self.release(number))) == self.images
        assert verify_log(self.egress_log).changed_line is None
        assert [report.site for report in store.reports(number)].count(self.name) == 1

    def check_that_an_undisturbed_run_gives_the_same_bytes(self, bundle: Path, number: int = 1) -> None:
        whole = self.folder / "whole"
        code, _ = self.call(
            "protect", str(self.source), "--out", str(whole), "--bundle", str(bundle), *self.policy
        )
        assert code == 0
        assert tree(self.release(number)) == tree(whole)


def free_ports() -> dict[str, int]:
    """Return ports below the range that the kernel gives to outgoing connections."""
    chosen: dict[str, int] = {}
    names = ("campaign", "enrolment", "fleet", "superlink")
    while len(chosen) < len(names):
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            chosen[names[len(chosen)]] = port
    return chosen


# How a test gets at them: pytest's import mode lets no test import its conftest
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture(scope="session")
def alive() -> Callable[[int], bool]:
    return is_alive


@pytest.fixture(scope="session")
def below() -> Callable[[int], dict[int, str]]:
    return processes_below


@pytest.fixture(scope="session")
def agent() -> Callable[..., tuple[int, Any]]:
    return agent_command


@pytest.fixture(scope="module")
def new_coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Coordinator]]:
    """Make coordinators with an authority and an empty store; nothing runs before `start`."""
    made: list[Coordinator] = []

    def make() -> Coordinator:
        home = tmp_path_factory.mktemp("coordinator")
        create_authority(home / "authority", datetime.now(UTC))
        with Store(home / "coordinator.sqlite"):
            made.append(Coordinator(home, free_ports()))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture(scope="module")
def new_hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Hospital]]:
    """Make hospitals with drawn images; they have not joined."""
    made: list[Hospital] = []

    def make(name: str, images: int) -> Hospital:
        hospital = Hospital(name, tmp_path_factory.mktemp(name), images)
        hospital.draw_images()
        made.append(hospital)
        return hospital

    yield make
    for hospital in made:
        for process in hospital.processes:
            process.kill()
            process.wait()


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a figure past pytest's capture: measured, shown, and no test of anybody's machine."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  measured: {text}")  # noqa: T201

    return line


# A bundle that travels in two parts
# ------------------------------------------------------------------------------------------------

_SIDE = 32
_HIDDEN = 1_300
"""A layer of 1,300 x 4,096 weights in float32 is 20 MiB, which is a part of 16 MiB and a rest."""


def _large_net() -> bytes:
    """Return a classifier with random weights as ONNX: (batch, 1, 32, 32) -> two logits."""
    rng = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1)
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Flatten", ["r1"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r2"]),
        helper.make_node("Gemm", ["r2", "w3", "b3"], ["logits"], transB=1),
    ]
    weights = [
        *(weight("w1", 4, 1, 3, 3), weight("b1", 4)),
        *(weight("w2", _HIDDEN, 4 * _SIDE * _SIDE), weight("b2", _HIDDEN)),
        *(weight("w3", 2, _HIDDEN), weight("b3", 2)),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, _SIDE, _SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(CLASS_NAMES)])
    graph = helper.make_graph(nodes, "net", [image], [logits], weights)
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


@dataclass(frozen=True)
class LargeBundle:
    """A bundle on the disk and who signed it."""

    path: Path
    signer: str

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture(scope="session")
def phantom() -> bytes:
    """The bundle that is shipped, 280 kB: one part."""
    return PHANTOM


@pytest.fixture(scope="session")
def large_bundle(
    tmp_path_factory: pytest.TempPathFactory, small_draft: Callable[..., ManifestDraft]
) -> LargeBundle:
    graphs = {"net": _large_net()}
    recipe = RecipeSettings(steps=40, step_size=0.5, warmup_steps=2)  # slow enough to be struck at
    draft = small_draft(graphs, _SIDE, classes=CLASS_NAMES, recipe=recipe)
    key = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
    path = tmp_path_factory.mktemp("bundle") / "large.medveil"
    write_bundle(path, draft, graphs, {}, key)
    return LargeBundle(path, str(fingerprint(key.public_key())))
