"""``medveil-agent run``: everything that a site does in campaigns, in one process that may be killed at any moment.

    the gate            Flower's only way out                                   a thread
    SuperNode, SuperExec                                                        programs beside us
    the worker          one campaign's job at a time                            a program beside us
    the reporter        answers, reports and beats                              a thread

What they tell each other lies in the site's record of campaigns; a restart reads it and goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from medveil.agent.campaign_work.book import Book, Campaign, Stage, WorkState, book_path
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.campaign_work.places import (
    bundles_folder,
    egress_log_file,
    federation_folder,
    flower_folder,
)
from medveil.agent.campaign_work.reporting import Reporter
from medveil.agent.campaign_work.standing import Work, alone, leave_news, work_of
from medveil.agent.fleet.client_watch import ClientAppWatch
from medveil.agent.fleet.gate import Gate
from medveil.agent.fleet.node_key import node_key, node_public_key
from medveil.agent.fleet.passage import Passage
from medveil.agent.fleet.programs import SUPEREXEC, SUPERNODE, fleet_programs
from medveil.agent.joining import Identity, identity_file, load_identity
from medveil.agent.policy import SitePolicy, load_policy
from medveil.agent.reporting import beat
from medveil.agent.reporting_log import EgressLog, log_bytes
from medveil.models.child_processes import Children, Program, start
from medveil.models.errors import ConfigurationError, StorageError
from medveil.protos.v1 import status_pb2
from medveil.protos.v1.conventions import expiry

__all__ = ["run"]

_TICK_S: Final = 0.5
_NEWS_S: Final = 2.0
_COUNT_S: Final = 1.0
_SPEED_WINDOW_S: Final = 60.0
_HEAD_START_S: Final = 4.0
"""Of a job that goes on after a restart, before Flower's programs: these take some six seconds of processor time to
start (measured), and a SuperNode that was killed isn't admitted again at once anyway."""
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 300.0
"""Between two tries of a job that stops with an error; our choice: who frees a full disk waits five minutes."""


def run(policy_file: Path, stopping: threading.Event, say: Callable[[dict[str, Any]], None]) -> None:
    """Take part in campaigns until told to stop.

    Args:
        policy_file: the site's policy.
        stopping: set it to end.
        say: told what an operator wants to know, by ``event``: ``ready`` once it has begun, and ``trouble`` with code
            and sentence when the site's own records can't be written.

    Raises:
        ConfigurationError: ``not-joined``, ``no-egress-policy``, ``no-coordinator``, ``no-campaigns-policy``, or the
            policy is refused.
        BusyError: another agent runs on this folder.
        StorageError: the site's folder cannot be written.
    """
    policy = _complete(load_policy(policy_file))
    assert policy.coordinator is not None  # noqa: S101
    federation = federation_folder()
    site = load_identity(federation).site
    key = node_key(federation)
    with alone(), EgressLog(egress_log_file()) as log, Book(book_path(federation)) as book:
        flower = flower_folder()
        gate = Gate(
            policy.coordinator.fleet,
            lambda: (load_identity(federation).authority_pem, identity_file(federation)),
            Passage(node_public_key(federation)),
            log,
            flower,
        )
        try:
            programs = fleet_programs(flower, gate.address, gate.certificate, key, policy_file)
            children, watch = Children(programs), ClientAppWatch(gate)
            work = _Works(policy, policy_file, book)
            reporter = Reporter(federation, policy, log, work.beat)
            try:
                reporter.start()
                work.tick()
                flower_due = time.monotonic() + (_HEAD_START_S if work.is_busy else 0.0)
                say(
                    {
                        "event": "ready",
                        "site": site,
                        "coordinator": policy.coordinator.campaign,
                        "process": os.getpid(),
                    }
                )
                news_due = 0.0
                trouble = ""
                while not stopping.wait(_TICK_S):
                    try:
                        work.tick()
                        trouble = ""
                    except StorageError as exc:  # a full disk: what isn't recorded now is found again
                        if exc.code != trouble:
                            say({"event": "trouble", "trouble": exc.code, "message": exc.public})
                        trouble = exc.code
                    if time.monotonic() >= flower_due:
                        children.tick()
                    if watch.has_died(_pid_of(SUPEREXEC, children)):
                        gate.note_lost_order()
                        children.restart(SUPERNODE)
                    if time.monotonic() >= news_due:
                        leave_news(_news(children, gate, reporter, work))
                        news_due = time.monotonic() + _NEWS_S
            finally:
                work.stop()
                children.stop()
                reporter.stop()
        finally:
            gate.stop()


def _complete(policy: SitePolicy) -> SitePolicy:
    """Refuse to begin with a policy that leaves open what may leave, to whom, or what may be worked on."""
    for value, code, table in (
        (policy.egress, "no-egress-policy", "[egress] with minimum_group_size: what may leave"),
        (
            policy.coordinator,
            "no-coordinator",
            "[coordinator] with campaign and fleet: whom this site joined",
        ),
        (policy.campaigns, "no-campaigns-policy", "[campaigns] with source and out: over which images"),
    ):
        if value is None:
            raise ConfigurationError(code, f"The policy file needs the table {table}.")
    return policy


def _news(children: Children, gate: Gate, reporter: Reporter, work: _Works) -> dict[str, Any]:
    contact, standing = reporter.contact, gate.standing
    return {
        "at": int(time.time()),
        "coordinator": {
            "last_accepted": _moment(contact.last_accepted_unix_s),
            "trouble": contact.trouble,
        },
        "gate": {
            "last_reply": _moment(standing.last_reply_unix_s),
            "line": standing.line,
            "refused": standing.refused,
            "last_refusal": standing.last_refusal,
            "sent_bytes": standing.sent_bytes,
        },
        "programs": [asdict(child) for child in children.standings()],
        "images_per_s": work.speeds(),
    }


def _pid_of(name: str, children: Children) -> int | None:
    return next(child.pid for child in children.standings() if child.name == name)


def _moment(unix_s: int) -> str | None:
    return None if not unix_s else datetime.fromtimestamp(unix_s, UTC).isoformat()


class _Works:
    """The worker: one campaign at a time, tried again with growing pauses; and what a beat says of it."""

    def __init__(self, policy: SitePolicy, policy_file: Path, book: Book) -> None:
        self._policy, self._policy_file, self._book = policy, policy_file, book
        self._bundles = Bundles(bundles_folder())
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._pause_s, self._due = _FIRST_PAUSE_S, 0.0
        self._guard = threading.Lock()
        self._samples: dict[int, deque[tuple[float, int]]] = {}
        self._last_work, self._count_due = time.monotonic(), 0.0
        self._seen: list[tuple[Campaign, Work]] = []

    def tick(self) -> None:
        """Notice that a job ended, begin the next, and count images."""
        campaigns = self._book.campaigns()
        if self._process is not None and (status := self._process.poll()) is not None:
            self._ended(status)
        if self._process is None and time.monotonic() >= self._due:
            ready = [c for c in campaigns if c.may_begin(bundle_held=self._held(c))]
            if ready:
                self._begin(ready[0].number)
        self._count(campaigns)

    @property
    def is_busy(self) -> bool:
        """Whether a job's process runs."""
        return self._process is not None

    def stop(self) -> None:
        """End the job's process; what it has done stays done."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def speeds(self) -> dict[str, float]:
        """Return images per second over the last minute, of the campaigns at work."""
        with self._guard:
            samples = {number: list(queue) for number, queue in self._samples.items()}
        speeds = {}
        for number, queue in samples.items():
            (begun, before), (now, done) = queue[0], queue[-1]
            if now > begun and done > before:
                speeds[str(number)] = round((done - before) / (now - begun), 2)
        return speeds

    def beat(self, identity: Identity) -> status_pb2.Beat:
        """Return the sign of life: of the campaign at work, else of the one that waits most urgently."""
        with self._guard:
            seen = list(self._seen)
            since = int(time.monotonic() - self._last_work)
        staged = [(c.stage(bundle_held=self._held(c)), c, work) for c, work in seen]
        urgent = sorted(staged, key=lambda entry: _URGENCY.index(entry[0]))
        stage, campaign, work = urgent[0] if urgent else (Stage.OVER, None, Work())
        return beat(
            self._policy.egress,
            activity=_ACTIVITY.get(stage, status_pb2.ACTIVITY_IDLE),
            trouble=status_pb2.TROUBLE_UNSPECIFIED if campaign is None else _trouble(stage, campaign),
            campaign=0 if campaign is None else campaign.number,
            images=work.images,
            done=work.done,
            images_per_s=0.0 if campaign is None else self.speeds().get(str(campaign.number), 0.0),
            since_last_work_s=since,
            certificate_days=expiry(identity.not_after, datetime.now(UTC)).days,
            egress_bytes=log_bytes(egress_log_file()),
            version=_version(),
        )

    def _held(self, campaign: Campaign) -> bool:
        return self._bundles.holds(campaign.offer.bundle_sha256)

    def _begin(self, number: int) -> None:
        program = Program(
            "worker",
            [sys.executable, "-m", "medveil.agent.campaign_work.worker", str(number), str(self._policy_file)],
            dict(os.environ),
            flower_folder().parent / "worker.log",
        )
        self._process, self._number = start(program), number

    def _ended(self, status: int) -> None:
        self._process = None
        campaign = self._book.campaign(self._number)
        if status == 0 and campaign is not None and campaign.work is WorkState.DONE:
            self._pause_s = _FIRST_PAUSE_S
            return
        self._due = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if campaign is not None and campaign.work is WorkState.RUNNING:
            self._book.work_is(self._number, WorkState.STOPPED, "worker-ended")

    def _count(self, campaigns: list[Campaign]) -> None:
        """Count the images of the jobs that may have moved, for speed and beat."""
        now = time.monotonic()
        if now < self._count_due:
            return
        self._count_due = now + _COUNT_S
        known = {campaign.number: (campaign, work) for campaign, work in self._seen}
        seen = []
        for campaign in campaigns:
            before, work = known.get(campaign.number, (None, Work()))
            if campaign.work is WorkState.RUNNING or before != campaign:
                work = work_of(self._policy, campaign)
            seen.append((campaign, work))
        with self._guard:
            self._seen = seen
            for campaign, work in seen:
                queue = self._samples.setdefault(campaign.number, deque())
                if queue and queue[-1][1] != work.done:
                    self._last_work = now
                queue.append((now, work.done))
                while queue[0][0] < now - _SPEED_WINDOW_S:
                    queue.popleft()


_URGENCY: Final = (
    Stage.PROTECTING, Stage.STOPPED, Stage.BUNDLE_REFUSED, Stage.REPORTING, Stage.READY, Stage.WAITING_FOR_STEWARD,
    Stage.WAITING_FOR_COORDINATOR, Stage.REPORTED, Stage.DECLINED, Stage.OVER,
)  # fmt: skip
_ACTIVITY: Final = {
    Stage.PROTECTING: status_pb2.ACTIVITY_PROTECTING,
    Stage.STOPPED: status_pb2.ACTIVITY_STOPPED,
    Stage.BUNDLE_REFUSED: status_pb2.ACTIVITY_STOPPED,
    Stage.REPORTING: status_pb2.ACTIVITY_REPORTING,
    Stage.WAITING_FOR_STEWARD: status_pb2.ACTIVITY_WAITING_FOR_STEWARD,
}
_TROUBLE: Final = {
    "disk-full": status_pb2.TROUBLE_DISK_FULL,
    "not-writable": status_pb2.TROUBLE_DISK_FULL,
    "nothing-found": status_pb2.TROUBLE_SOURCE_UNREADABLE,
    "no-labels-file": status_pb2.TROUBLE_SOURCE_UNREADABLE,
    "busy": status_pb2.TROUBLE_BUSY,
    "method-not-allowed": status_pb2.TROUBLE_POLICY,
    "policy": status_pb2.TROUBLE_POLICY,
    "policy-unreadable": status_pb2.TROUBLE_POLICY,
}


def _trouble(stage: Stage, campaign: Campaign) -> status_pb2.Trouble:
    if stage is Stage.BUNDLE_REFUSED:
        return status_pb2.TROUBLE_BUNDLE_REFUSED
    if stage is not Stage.STOPPED:
        return status_pb2.TROUBLE_UNSPECIFIED
    return _TROUBLE.get(campaign.work_trouble, status_pb2.TROUBLE_OTHER)


def _version() -> tuple[int, int, int]:
    major, minor, patch = (
        int("".join(filter(str.isdigit, part)) or 0) for part in version("medveil").split(".")[:3]
    )
    return major, minor, patch
