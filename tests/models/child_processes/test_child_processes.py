"""Programs beside us: restarted with pauses, ended in order, and never orphaned. On real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medveil.models.child_processes import Children, Program
from medveil.models.errors import ConfigurationError

SLEEP = ("-c", "import time; time.sleep(60)")
ENVIRONMENT = {"PATH": os.defpath}


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def program(
    folder: Path, *arguments: str, name: str = "sleeper", ready: Callable[[], bool] = lambda: True
) -> Program:
    return Program(
        name, [sys.executable, "-I", "-S", *arguments], ENVIRONMENT, folder / f"{name}.log", ready=ready
    )


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_program_that_fails_is_started_again_ever_more_slowly(tmp_path: Path) -> None:
    clock = Clock()
    children = Children([program(tmp_path, "-c", "raise SystemExit(3)", name="failing")], now=clock)
    pauses = []
    for restarts in range(7):
        children.tick()
        assert children.standings()[0].restarts == restarts

        def fell() -> bool:
            children.tick()
            return children.standings()[0].pid is None

        until(fell)
        standing = children.standings()[0]
        assert standing.last_exit == 3
        pauses.append(standing.retry_in_s)
        clock.now += standing.retry_in_s
    assert pauses == [0.5, 1, 2, 4, 8, 15, 15]


def test_who_ran_for_long_is_started_again_soon(tmp_path: Path) -> None:
    clock = Clock()
    children = Children([program(tmp_path, *SLEEP)], now=clock)
    for _ in range(2):
        children.tick()
        pid = children.standings()[0].pid
        assert pid is not None
        clock.now += 3600
        os.kill(pid, signal.SIGKILL)
        until(lambda: children.tick() is None and children.standings()[0].pid is None)
        assert children.standings()[0].retry_in_s == 0.5
        assert children.standings()[0].last_exit == -signal.SIGKILL
        clock.now += 1
    children.stop()


def test_each_waits_for_the_one_before_and_all_end_in_reverse_order(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "def end(*_): print(time.time_ns(), flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
    )
    ready = []
    first = program(tmp_path, "-c", code, name="first", ready=lambda: bool(ready))
    children = Children([first, program(tmp_path, "-c", code, name="second")])
    children.tick()
    children.tick()
    assert [child.pid is not None for child in children.standings()] == [True, False]
    ready.append(True)
    children.tick()
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    until(lambda: all(log.exists() and "up" in log.read_text() for log in logs))
    children.stop()
    ends = [int(log.read_text().split()[1]) for log in logs]
    assert ends[1] < ends[0]
    assert [child.pid for child in children.standings()] == [None, None]


def test_who_does_not_end_by_itself_is_killed(tmp_path: Path) -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('up', flush=True); time.sleep(60)"
    )
    children = Children([program(tmp_path, "-c", code)])
    children.tick()
    until(lambda: "up" in (tmp_path / "sleeper.log").read_text())
    children.restart("sleeper", grace_s=0.2)
    assert children.standings()[0].last_exit == -signal.SIGKILL
    children.tick()
    assert children.standings()[0].pid is not None
    children.stop(grace_s=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time\nfrom pathlib import Path\n"
            "from medveil.models.child_processes import Children, Program\n"
            f"argv, log = [sys.executable, *{SLEEP!r}], Path({str(tmp_path / 's.log')!r})\n"
            f"program = Program('s', argv, {ENVIRONMENT!r}, log)\n"
            "children = Children([program]); children.tick()\n"
            "print(children.standings()[0].pid, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
        until(lambda: b"time.sleep" in Path(f"/proc/{child}/cmdline").read_bytes().partition(b"-c")[2])
        parent.kill()
        parent.wait()
    until(lambda: ended(child))


def test_nothing_of_our_environment_reaches_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example")
    children = Children([program(tmp_path, "-c", "import os; print(dict(os.environ), flush=True); input()")])
    children.tick()
    until(lambda: "}" in (tmp_path / "sleeper.log").read_text())
    assert "proxy" not in (tmp_path / "sleeper.log").read_text()
    children.stop()


def test_a_long_log_becomes_the_old_log(tmp_path: Path) -> None:
    log = tmp_path / "sleeper.log"
    log.write_bytes(b"x" * (5 * 2**20 + 1))
    children = Children([program(tmp_path, *SLEEP)])
    children.tick()
    assert log.stat().st_size == 0
    assert (tmp_path / "sleeper.log.1").stat().st_size == 5 * 2**20 + 1
    children.stop()


def test_a_program_that_is_not_installed_is_refused_by_name(tmp_path: Path) -> None:
    missing = Program("flower", [str(tmp_path / "flower")], ENVIRONMENT, tmp_path / "log")
    with pytest.raises(ConfigurationError) as refused:
        Children([missing]).tick()
    assert refused.value.code == "program-missing"
