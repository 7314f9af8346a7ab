"""Programs that medveil runs beside itself: started in order, restarted with back-off, ended with their parent.

Each has a log that is cut when it grows too long. A killed parent takes them along (Linux: PR_SET_PDEATHSIG), so
nobody meets an orphan on the port that a restart needs. A child that keeps failing is tried again for ever, ever
more slowly: what it waits for (a network, a coordinator) comes back without us.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from medveil.models.errors import ConfigurationError

__all__ = ["Children", "Program", "Standing", "start"]

_WRAPPER: Final = Path(__file__).with_name("_die_with_parent.py")
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 15.0
"""Our choice: a SuperNode that was killed is admitted again after at most 60 s, so four tries lie within that."""
_STEADY_S: Final = 60.0
"""Who ran this long is healthy again: the next pause is short."""
_GRACE_S: Final = 5.0
"""How long a child may take to end by itself after SIGTERM."""
_LOG_BYTES: Final = 5 * 2**20
"""A log of this size becomes the old log; our choice: hours of a server that writes a line per poll."""


@dataclass(frozen=True, slots=True)
class Program:
    """What is to run.

    Attributes:
        name: for status and log.
        argv: absolute path of the program, and its arguments.
        environment: the whole environment; nothing is inherited, no proxy either, through which a library
            might send what is meant for loopback.
        log: file that its output is appended to; the old one lies beside it with ``.1`` after its name.
        before: called before each start.
        ready: whether it does its work by now; the programs after it are started then.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)
    log: Path
    before: Callable[[], None] = lambda: None
    ready: Callable[[], bool] = lambda: True


@dataclass(frozen=True, slots=True)
class Standing:
    """How one program stands.

    Attributes:
        pid: of the running process; None while it waits for its restart.
        restarts: how often it was started again.
        last_exit: exit status of the process before this one, negative for a signal; None: there was none.
        retry_in_s: seconds until the next start; 0 while it runs.
        ready: whether it runs and said that it does its work.
    """

    name: str
    pid: int | None
    restarts: int
    last_exit: int | None
    retry_in_s: float
    ready: bool


class Children:
    """A fixed set of programs; call `tick` about once a second, always from the same thread.

    The same thread, because the kernel counts the thread that started a child as its parent.
    """

    def __init__(self, programs: Sequence[Program], *, now: Callable[[], float] = time.monotonic) -> None:
        """Take the programs in the order in which they start; nothing runs before the first `tick`."""
        self._now = now
        self._children = [_Child(program) for program in programs]

    def tick(self) -> None:
        """Start what does not run, whose pause is over, and whose predecessors are ready; cut long logs.

        Raises:
            ConfigurationError: ``program-missing``: a program is not installed.
        """
        may_start = True
        for child in self._children:
            child.tick(self._now(), may_start=may_start)
            may_start = may_start and child.ready

    def standings(self) -> tuple[Standing, ...]:
        """Return how each program stands, in their order."""
        return tuple(child.standing(self._now()) for child in self._children)

    def restart(self, name: str, *, grace_s: float = _GRACE_S) -> None:
        """End one program; the next `tick` starts it again.

        Raises:
            KeyError: there is none of this name.
        """
        for child in self._children:
            if child.name == name:
                child.stop(grace_s)
                return
        raise KeyError(name)

    def stop(self, *, grace_s: float = _GRACE_S) -> None:
        """End all of them, the last started first; who does not end in time is killed."""
        for child in reversed(self._children):
            child.stop(grace_s)


class _Child:
    """One program and its current process."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._last_exit: int | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._started = 0.0
        self._due = float("-inf")

    @property
    def name(self) -> str:
        return self._program.name

    @property
    def ready(self) -> bool:
        return self._process is not None and self._program.ready()

    def tick(self, now: float, *, may_start: bool) -> None:
        _cut(self._program.log)
        if self._process is not None and (status := self._process.poll()) is not None:
            _end_group(self._process.pid)
            steady = now - self._started >= _STEADY_S
            pause = _FIRST_PAUSE_S if steady else self._pause_s
            self._last_exit, self._process = status, None
            self._due, self._pause_s = now + pause, min(2 * pause, _LONGEST_PAUSE_S)
        if self._process is None and may_start and now >= self._due:
            self._program.before()
            self._process = start(self._program)
            self._starts, self._started = self._starts + 1, now

    def standing(self, now: float) -> Standing:
        return Standing(
            self._program.name,
            None if self._process is None else self._process.pid,
            max(0, self._starts - 1),
            self._last_exit,
            0.0 if self._process is not None else max(0.0, self._due - now),
            self.ready,
        )

    def stop(self, grace_s: float) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _end_group(self._process.pid)
        self._last_exit, self._process, self._due = self._process.returncode, None, float("-inf")


def start(program: Program) -> subprocess.Popen[bytes]:
    """Start one program once, as a child that ends with the thread that calls this.

    Raises:
        ConfigurationError: ``program-missing``: it is not installed.
    """
    if not os.access(program.argv[0], os.X_OK):
        raise ConfigurationError(
            "program-missing",
            f"The program {Path(program.argv[0]).name} is not installed beside medveil; install medveil anew.",
            private=program.argv[0],
        )
    wrapped = [sys.executable, "-I", "-S", str(_WRAPPER), str(os.getpid()), *program.argv]
    with program.log.open("ab") as log:
        return subprocess.Popen(
            wrapped,
            env=dict(program.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A group of its own: it ends as a whole, and Ctrl-C on our terminal is ours to pass on, in our order.
            process_group=0,
        )


def _end_group(leader: int) -> None:
    """End what a program had started itself: Flower's task processes outlive their SuperExec by many seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _cut(log: Path) -> None:
    """Keep a long log as the old one and go on with an empty file.

    Copied and cut, not renamed: the child holds it open, and appends to whatever its end is then.
    """
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
