"""When an order counts as lost: its client app is gone, and SuperNode says nothing; not sooner, and not twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medveil.agent.fleet.client_watch import ClientAppWatch

SUPEREXEC = 7


class Site:
    """A gate, a client app and a clock that a test moves by hand."""

    def __init__(self) -> None:
        self.open_order, self.quiet_s, self.lives, self.time = 0, 0.0, False, 100.0
        self.watch = ClientAppWatch(self, lives=lambda superexec: self.lives, now=lambda: self.time)

    def after(self, seconds: float, *, superexec: int | None = SUPEREXEC) -> bool:
        """Let half seconds pass and return whether the order was called lost on the way."""
        lost = []
        for _ in range(int(2 * seconds)):
            self.time += 0.5
            self.quiet_s += 0.5
            lost.append(self.watch.has_died(superexec))
        return any(lost)

    def order(self, number: int) -> None:
        self.open_order, self.quiet_s = number, 0.0


@pytest.fixture
def site() -> Site:
    return Site()


def test_a_client_app_that_dies_is_noticed_once(site: Site) -> None:
    site.order(1)
    site.lives = True
    assert not site.after(120)  # a self-test may take minutes
    site.lives = False
    assert not site.after(1)
    assert site.after(2)
    assert not site.after(60)


def test_superexec_takes_its_client_app_along(site: Site) -> None:
    site.order(1)
    site.lives = True
    site.after(3)
    assert site.after(3, superexec=None)


def test_one_that_ends_because_it_has_answered_is_not_missed(site: Site) -> None:
    site.order(1)
    site.lives = True
    site.after(30)
    site.lives, site.quiet_s = False, 0.0  # SuperNode hands the answer on
    assert not site.after(1)
    site.open_order = 0
    assert not site.after(60)


def test_an_answer_that_is_slow_to_get_through_is_waited_for(site: Site) -> None:
    site.order(1)
    site.lives = True
    site.after(5)
    site.lives = False
    for _ in range(60):
        site.quiet_s = 0.0
        assert not site.after(1)


def test_the_next_order_has_time_for_its_client_app_to_begin(site: Site) -> None:
    for number in (1, 2, 3):
        site.order(number)
        assert not site.after(8)
        site.lives = True
        assert not site.after(8)
        site.lives = False
    site.order(4)
    assert site.after(12)  # it died before anyone saw it


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_a_killed_child_that_nobody_asked_for_does_not_live() -> None:
    waits = "import subprocess as s, sys; print(s.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", waits], **pipes, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        site = Site()
        watch = ClientAppWatch(site, now=lambda: site.time)
        site.open_order, site.quiet_s = 1, 60.0
        assert not watch.has_died(parent.pid)
        subprocess.run(["kill", "-9", str(child)], check=True)
        site.time += 60
        while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        assert watch.has_died(parent.pid)
        parent.kill()
