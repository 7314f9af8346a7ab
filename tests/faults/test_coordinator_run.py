"""``medveil-coordinator run`` as real processes: what is killed comes back, and nothing is left behind."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from medveil.agent.fleet.gate import Gate
from medveil.agent.fleet.node_key import node_key, node_public_key
from medveil.agent.fleet.passage import Passage
from medveil.agent.fleet.programs import fleet_programs
from medveil.agent.joining import identity_file, load_identity
from medveil.agent.reporting_log import EgressLog
from medveil.coordinator import operations
from medveil.coordinator.store import Store
from medveil.models.child_processes import Children
from medveil.models.errors import ExitCode

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc"),
]


@pytest.fixture(scope="module")
def coordinator(new_coordinator: Callable[[], Any]) -> Any:
    """One for all tests of this file."""
    coordinator = new_coordinator()
    coordinator.start()
    coordinator.ready()
    return coordinator


@pytest.fixture(scope="module")
def store(coordinator: Any) -> Iterator[Store]:
    with Store(coordinator.home / "coordinator.sqlite") as store:
        yield store


def test_from_outside_nothing_but_the_three_ports_answers_and_control_never_does(coordinator: Any) -> None:
    context = ssl.create_default_context(cadata=coordinator.authority.certificate_pem.decode("ascii"))
    # The SuperLink itself: loopback, and it would obey whoever reaches it.
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    bound = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert f"0100007F:{coordinator.ports['superlink']:04X}" in bound
    assert f"00000000:{coordinator.ports['superlink']:04X}" not in bound
    # The edge: who holds the authority's certificate only gets nothing.
    for path in ("/v1/control/list-runs", "/v1/fleet/pull-messages", "/openapi.json"):
        with pytest.raises((OSError, http.client.HTTPException)):
            asked(coordinator.ports["fleet"], path, context)


def test_a_joined_site_reaches_the_fleet_calls_and_not_control(
    coordinator: Any, store: Store, new_hospital: Callable[..., Any]
) -> None:
    hospital = new_hospital("curious", 0)
    hospital.join(store, coordinator.authority, coordinator.ports["enrolment"])
    context = ssl.create_default_context(cadata=coordinator.authority.certificate_pem.decode("ascii"))
    context.load_cert_chain(identity_file(hospital.home / "federation"))
    fleet = coordinator.ports["fleet"]
    assert asked(fleet, "/v1/fleet/pull-messages", context) == 401  # of a node that shows no key
    for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/fleet/../control/start-run"):
        assert asked(fleet, path, context) == 403


def test_a_token_that_was_used_lets_nobody_else_in(
    coordinator: Any, store: Store, agent: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    token = operations.invite(store, "northside", datetime.now(UTC)).text
    words = (
        *("join", f"127.0.0.1:{coordinator.ports['enrolment']}", "--token", token),
        *("--fingerprint", coordinator.authority.fingerprint),
    )
    assert agent(tmp_path / "northside", *words)[0] == 0
    code, answer = agent(tmp_path / "thief", *words)
    assert (code, answer["error"]["code"]) == (ExitCode.REFUSED, "token-replayed")
    assert not identity_file(tmp_path / "thief/federation").exists()


@contextlib.contextmanager
def supernode(
    coordinator: Any, hospital: Any, skew_s: int = 0, **clocks: Any
) -> Iterator[tuple[Gate, Children]]:
    """Run a real SuperNode behind a real gate, both of which may live in another time."""
    federation, folder = hospital.home / "federation", hospital.folder
    (folder / "sitecustomize.py").write_text(SKEW.format(skew_s=skew_s))
    key = node_key(federation)
    with EgressLog(hospital.egress_log) as log:
        gate = Gate(
            f"127.0.0.1:{coordinator.ports['fleet']}",
            lambda: (load_identity(federation).authority_pem, identity_file(federation)),
            Passage(node_public_key(federation)),
            log,
            folder,
            now=lambda: datetime.now(UTC) + timedelta(seconds=skew_s),
            **clocks,
        )
        program, _ = fleet_programs(folder, gate.address, gate.certificate, key, folder / "site.toml")
        environment = {**program.environment, "PYTHONPATH": str(folder)}
        children = Children([replace(program, environment=environment)])
        try:
            children.tick()
            yield gate, children
        finally:
            children.stop()
            gate.stop()


@pytest.mark.parametrize("skew_s", [3_600, -86_400], ids=["an hour ahead", "a day behind"])
def test_a_site_whose_clock_is_off_is_told_so_and_is_no_contact(
    coordinator: Any, store: Store, new_hospital: Callable[..., Any], until: Callable[..., Any], skew_s: int
) -> None:
    """Flower signs the time. Both clocks of the site are moved: SuperNode's and the gate's."""
    hospital = new_hospital(f"off-by-{abs(skew_s)}", 0)
    hospital.join(store, coordinator.authority, coordinator.ports["enrolment"])
    with supernode(coordinator, hospital, skew_s) as (gate, _):
        until(lambda: gate.standing.line == "clock-off", "the reason")
        assert gate.standing.last_reply_unix_s == 0
    assert store.contact(hospital.name) is None


def test_a_supernode_that_is_stuck_takes_its_leave_and_is_let_in_again_at_once(
    coordinator: Any,
    store: Store,
    new_hospital: Callable[..., Any],
    until: Callable[..., Any],
    say: Callable[[str], None],
) -> None:
    """Stuck means to the gate: nothing but heartbeats for 330 s; here it looks so to every other heartbeat."""
    hospital = new_hospital("stuck", 0)
    hospital.join(store, coordinator.authority, coordinator.ports["enrolment"])
    seconds = itertools.count(step=1_000)
    with supernode(coordinator, hospital, monotonic=lambda: next(seconds)) as (gate, children):
        until(lambda: gate.standing.last_reply_unix_s, "the node")
        until(lambda: gate.standing.last_refusal == "node-stuck", "a heartbeat")
        since = time.time()

        def is_back() -> bool:
            children.tick()
            return children.standings()[0].restarts > 0 and gate.standing.last_reply_unix_s > since

        until(is_back, "the node again")
        say(f"SuperNode stuck: at work again {time.time() - since:.1f} s after it was noticed")
        assert children.standings()[0].restarts == 1  # it was refused not once


def test_a_killed_supernode_is_refused_for_a_minute_at_most_and_the_site_is_told_so(
    coordinator: Any, store: Store, new_hospital: Callable[..., Any], until: Callable[..., Any]
) -> None:
    hospital = new_hospital("struck", 0)
    hospital.join(store, coordinator.authority, coordinator.ports["enrolment"])
    with supernode(coordinator, hospital) as (gate, children):
        until(lambda: gate.standing.last_reply_unix_s, "the node")
        os.kill(children.standings()[0].pid, signal.SIGKILL)

        def is_named() -> bool:
            children.tick()
            return gate.standing.line == "readmitted-within-60-s"

        until(is_named, "the reason")


def test_a_second_process_on_the_folder_is_refused(coordinator: Any) -> None:
    first = coordinator.process
    second = coordinator.start()
    try:
        assert second.wait(60) == ExitCode.BUSY
        assert "coordinator-runs" in coordinator.said()
    finally:
        coordinator.processes.remove(second)
    assert first.poll() is None


@pytest.mark.parametrize("program", ["flower-superlink", "flower-superexec"])
def test_a_killed_child_comes_back(
    coordinator: Any, until: Callable[..., Any], say: Callable[[str], None], program: str
) -> None:
    before, times, since = coordinator.child(program), len(coordinator.events("ready")), time.monotonic()
    os.kill(before, signal.SIGKILL)
    until(lambda: len(coordinator.events("ready")) > times, "ready")
    say(f"{program} killed: ready after {time.monotonic() - since:.1f} s")
    assert coordinator.child(program) != before
    restarts = [each for each in coordinator.events("restarted") if f"flower-{each['program']}" == program]
    assert restarts[-1]["exit_status"] == -signal.SIGKILL


def test_a_killed_coordinator_takes_its_children_along_and_goes_on(
    coordinator: Any, until: Callable[..., Any], alive: Callable[[int], bool], say: Callable[[str], None]
) -> None:
    children = [coordinator.child(program) for program in ("flower-superlink", "flower-superexec")]
    coordinator.kill()
    until(lambda: not any(map(alive, children)), "its children to end", 10)
    since = time.monotonic()
    coordinator.start()  # on the same ports
    coordinator.ready()
    say(f"coordinator killed: ready {time.monotonic() - since:.1f} s after its restart")


def test_asked_to_stop_it_leaves_nothing_behind(coordinator: Any, alive: Callable[[int], bool]) -> None:
    children = [coordinator.child(program) for program in ("flower-superlink", "flower-superexec")]
    coordinator.process.send_signal(signal.SIGTERM)
    assert coordinator.process.wait(60) == ExitCode.OK
    assert not any(map(alive, children))
    assert coordinator.events("stopping")


SKEW = """\
import datetime

import flwr.supercore.date as date

_now = date.now
date.now = lambda: _now() + datetime.timedelta(seconds={skew_s})
"""


def asked(port: int, path: str, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    with contextlib.closing(connection):
        connection.request("POST", path, b"")
        return connection.getresponse().status
