"""``medveil-coordinator run`` as real processes: what is killed comes back, and nothing is left behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medveil.coordinator import operations
from medveil.coordinator.pki import create_authority, load_authority
from medveil.coordinator.store import Store
from medveil.models.errors import ExitCode
from medveil.models.phantoms import draw
from medveil.protos.v1 import report_pb2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc"),
]

_PATIENCE_S = 300.0
"""Two Flower processes start, each with seconds of imports, on machines that do other things as well."""


@dataclass
class Running:
    """A coordinator's process and what it has said."""

    home: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes]
    output: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.output.read_text().splitlines()
        told = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in told if event["event"] == name]

    def child(self, program: str) -> int | None:
        """Return the process number of a running child."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and any(a.endswith(program.encode()) for a in arguments[:3]):
                    return int(entry.name)
        return None


def start(home: Path, ports: dict[str, int]) -> Running:
    output = home / f"run-{len(list(home.glob('run-*')))}.log"
    command = [
        str(Path(sysconfig.get_path("scripts")) / "medveil-coordinator"),
        *("run", "--home", str(home), "--name", "127.0.0.1", "--format", "json"),
        *(word for name, port in ports.items() for word in (f"--{name}-port", str(port))),
    ]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    return Running(home, ports, process, output)


def until(condition: Callable[[], Any], what: str, timeout_s: float = _PATIENCE_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
    return value


def ready(running: Running, times: int = 1) -> None:
    def is_ready() -> bool:
        assert running.process.poll() is None, running.output.read_text()
        return len(running.events("ready")) >= times

    until(is_ready, "ready")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coordinator")
    create_authority(folder / "authority", datetime.now(UTC))
    with Store(folder / "coordinator.sqlite"):
        return folder


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[list[Running]]:
    """One coordinator for all tests of this file; the list's last entry is the process that runs now."""
    processes = [start(home, _free_ports())]
    try:
        ready(processes[0])
        yield processes
    finally:
        for each in processes:
            if each.process.poll() is None:
                each.process.send_signal(signal.SIGTERM)
                each.process.wait(60)


def test_from_outside_nothing_but_the_three_ports_answers_and_control_never_does(
    running: list[Running], home: Path
) -> None:
    now = running[-1]
    authority = (home / "authority" / "authority.pem").read_text("ascii")
    context = ssl.create_default_context(cadata=authority)
    # The SuperLink itself: loopback, and it would obey whoever reaches it.
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    bound = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert f"0100007F:{now.ports['superlink']:04X}" in bound
    assert f"00000000:{now.ports['superlink']:04X}" not in bound
    # The edge: who holds the authority's certificate only gets nothing.
    for path in ("/v1/control/list-runs", "/v1/fleet/pull-messages", "/openapi.json"):
        with pytest.raises((OSError, http.client.HTTPException)):
            _asked(now.ports["fleet"], path, context)


def test_a_second_process_on_the_folder_is_refused(running: list[Running], home: Path) -> None:
    second = start(home, _free_ports())
    assert second.process.wait(_PATIENCE_S) == ExitCode.BUSY
    assert "coordinator-runs" in second.output.read_text()
    assert running[-1].process.poll() is None


@pytest.mark.parametrize("program", ["flower-superlink", "flower-superexec"])
def test_a_killed_child_comes_back(running: list[Running], program: str) -> None:
    now = running[-1]
    before = until(lambda: now.child(program), program)
    times = len(now.events("ready"))
    os.kill(before, signal.SIGKILL)
    after = until(lambda: now.child(program) not in (before, None) and now.child(program), program)
    assert after != before
    restarts = [event for event in now.events("restarted") if f"flower-{event['program']}" == program]
    until(lambda: len(now.events("ready")) > times, "ready")
    assert restarts[-1]["exit_status"] == -signal.SIGKILL


def test_a_killed_coordinator_takes_its_children_along_and_goes_on(running: list[Running]) -> None:
    now = running[-1]
    children = [until(lambda p=p: now.child(p), p) for p in ("flower-superlink", "flower-superexec")]
    os.kill(now.process.pid, signal.SIGKILL)
    now.process.wait()
    until(lambda: not any(map(alive, children)), "its children to end", 10)
    running.append(start(now.home, now.ports))  # on the same ports
    ready(running[-1])


def test_a_campaign_survives_the_death_of_superlink_and_coordinator_in_mid_round(
    running: list[Running], home: Path
) -> None:
    agent, images = started_agent(running[-1], "st-anna"), 40
    try:
        with Store(home / "coordinator.sqlite") as store:
            with as_file(files("medveil.agent.demo") / "phantom.medveil") as bundle:
                create = ("create", "chest", "--site", "st-anna", "--bundle", str(bundle))
                command(home, "medveil-coordinator", "campaign", *create, "--minimum-group-size", "5")
            command(home, "medveil-coordinator", "campaign", "offer", "1")
            until(store.open_rounds, "a round")
            os.kill(until(lambda: running[-1].child("flower-superlink"), "superlink"), signal.SIGKILL)
            until(lambda: operations.campaign_status(store, 1, datetime.now(UTC)).complete, "the report")
            (report,) = store.reports(1)
            assert report_pb2.Report.FromString(report.payload).outcome.verified.exact == images

            until(lambda: not store.open_rounds(), "quiet")
            command(home, "medveil-coordinator", "campaign", "seal", "1")
            until(store.open_rounds, "a round")
            running[-1].process.kill()
            running[-1].process.wait()
            running.append(start(home, running[-1].ports))
            until(lambda: store.deliveries(1)["st-anna"].state == "sealed", "the seal to arrive")
            assert len(store.reports(1)) == 1  # nothing was done or told twice
    finally:
        agent.send_signal(signal.SIGTERM)
        agent.wait(60)


def test_asked_to_stop_it_leaves_nothing_behind(running: list[Running]) -> None:
    now = running[-1]
    children = [until(lambda p=p: now.child(p), p) for p in ("flower-superlink", "flower-superexec")]
    now.process.send_signal(signal.SIGTERM)
    assert now.process.wait(60) == ExitCode.OK
    assert not any(map(alive, children))
    assert now.events("stopping")


def command(home: Path, program: str, *words: str) -> None:
    line = [str(Path(sysconfig.get_path("scripts")) / program), *words]
    subprocess.run(line, env={**os.environ, "MEDVEIL_HOME": str(home)}, check=True, capture_output=True)


def started_agent(now: Running, site: str) -> subprocess.Popen[bytes]:
    """Let a site join that approves everything, and start its agent over 40 drawn images."""
    folder = now.home.with_name(f"{now.home.name}-{site}")
    folder.mkdir()
    pixels, labels = draw(40, np.random.default_rng(1), size=32)
    np.savez_compressed(folder / "images.npz", train_images=pixels, train_labels=labels[:, None])
    with Store(now.home / "coordinator.sqlite") as store:
        token = operations.invite(store, site, datetime.now(UTC)).text
    fingerprint = load_authority(now.home / "authority").fingerprint
    address = f"127.0.0.1:{now.ports['enrolment']}"
    command(folder, "medveil-agent", "join", address, "--token", token, "--fingerprint", fingerprint)
    policy = folder / "site.toml"
    policy.write_text(
        "[coordinator]\n"
        f'campaign = "127.0.0.1:{now.ports["campaign"]}"\nfleet = "127.0.0.1:{now.ports["fleet"]}"\n'
        f'[campaigns]\nsource = "{folder}/images.npz"\nout = "{folder}/out"\napprove = "always"\n'
        "[egress]\nminimum_group_size = 5\n"
    )
    line = [str(Path(sysconfig.get_path("scripts")) / "medveil-agent"), "run", "--policy", str(policy)]
    with (folder / "run.log").open("wb") as log:
        environment = {**os.environ, "MEDVEIL_HOME": str(folder)}
        return subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _asked(port: int, path: str, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    with contextlib.closing(connection):
        connection.request("POST", path, b"")
        return connection.getresponse().status


def _free_ports() -> dict[str, int]:
    """Return ports below the range that the kernel gives to outgoing connections."""
    chosen: dict[str, int] = {}
    while len(chosen) < 4:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            chosen[("campaign", "enrolment", "fleet", "superlink")[len(chosen)]] = port
    return chosen
