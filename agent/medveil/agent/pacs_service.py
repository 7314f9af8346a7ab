"""From the PACS and back to it: receive -> protect -> push, as one long-running service or step by step.

FOLDER/                   ``pacs.folder`` of the policy; private
    inbox/                what was received, by study and series (``imageio.pacs.inbox``)
    releases/STUDY/       the protected copies of a study; STUDY.private and STUDY.labels.csv beside it
    delivery.sqlite       the send queue; its lock lets one process at a time into FOLDER

A study is protected when one of its series is complete, and again when another one is: what was done before is
kept (the ledger of the study's release), and segmentations find the images that they refer to. Everything is read
from the folder, so a service that was killed goes on where it stopped.
"""

from __future__ import annotations

import csv
import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from medveil.agent.imageio.pacs import (
    Delivery,
    DeliveryQueue,
    DeliveryState,
    DimseReader,
    DimseSender,
    Inbox,
    Pulled,
    ReceivePort,
    ReceiveSettings,
    WebPacs,
    delivery_counts,
    inbox_counts,
    pull_by_move,
    pull_by_wado,
)
from medveil.agent.pacs_policy import MAXIMUM_USED, MINIMUM_FREE_BYTES, PacsPolicy
from medveil.agent.preparation import Wishes
from medveil.agent.release_job import Call, ledger_of, make_release
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.disk import disk_errors, make_private_folder, write_atomically
from medveil.models.errors import ConfigurationError, ImageError, InputError, StorageError

__all__ = ["Event", "Service", "Work", "open_service", "read_labels", "status"]

_PAUSE_S: Final = 1.0
"""Between two looks at the folder. Our choice: short beside the quiet period of a series."""

_RETRY_S: Final = 60.0
"""After a full disk, until its studies are tried again; what needs no room goes on meanwhile. Our choice."""

_INBOX: Final = "inbox"
_RELEASES: Final = "releases"
_QUEUE: Final = "delivery.sqlite"
_DICOM: Final = "dicom"
_UID_COLUMN, _LABEL_COLUMN = "uid", "label"

Say = Callable[["Event"], None]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the operator may want to see: counts and codes, nothing of a patient.

    Attributes:
        what: ``listening``, ``complete``, ``rejected``, ``protected``, ``waiting``, ``failed``, ``delivered`` or
            ``outage``.
        counts: figures by name.
        code: the reason, where something waits or went wrong.
    """

    what: str
    counts: Mapping[str, int] = field(default_factory=dict)
    code: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """What studies are protected with.

    Attributes:
        wishes: bundle, policy, budget and device.
        labels_file: CSV with the columns uid,label, where uid names a study, a series or an object, and the narrowest
            one counts; None where the bundle's task needs no labels.
        key_file: key of the releases; None takes the site's own.
    """

    wishes: Wishes
    labels_file: Path | None = None
    key_file: Path | None = None


def read_labels(path: Path) -> dict[str, str]:
    """Return the label of each UID that a labels file names.

    Raises:
        InputError: ``labels-unreadable`` or ``labels-columns``.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream, strict=True)
            rows = [(row.get(_UID_COLUMN), row.get(_LABEL_COLUMN)) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise InputError(
            "labels-unreadable", "The labels file is not a readable CSV in UTF-8.", private=str(exc)
        ) from exc
    if not {_UID_COLUMN, _LABEL_COLUMN} <= set(table.fieldnames or ()):
        raise InputError("labels-columns", "The labels file needs a first line with the columns uid,label.")
    return {uid.strip(): label.strip() for uid, label in rows if uid and label}


def status(policy: PacsPolicy) -> dict[str, dict[str, int]]:
    """Return how many objects stand where, also while a service works on the folder.

    Raises:
        StorageError: the send queue cannot be read.
    """
    delivery = delivery_counts(policy.folder / _QUEUE)
    return {
        "received": inbox_counts(policy.folder / _INBOX),
        "delivery": {str(state): count for state, count in delivery.items()},
    }


@contextmanager
def open_service(policy: PacsPolicy) -> Iterator[Service]:
    """Open the folder of the PACS door.

    Raises:
        BusyError: another medveil command works on it.
        StorageError: it cannot be created or read.
    """
    make_private_folder(policy.folder)
    with ExitStack() as stack:
        queue = stack.enter_context(DeliveryQueue(policy.folder / _QUEUE))
        make_private_folder(policy.folder / _RELEASES)
        port = policy.receive
        inbox = Inbox(
            policy.folder / _INBOX,
            minimum_free_bytes=MINIMUM_FREE_BYTES if port is None else port.minimum_free_bytes,
            maximum_used=MAXIMUM_USED if port is None else port.maximum_used,
        )
        web = None if policy.web is None else stack.enter_context(WebPacs(policy.web))
        yield Service(policy, inbox, queue, web)


class Service:
    """The open folder; made by ``open_service``, used by one thread."""

    def __init__(self, policy: PacsPolicy, inbox: Inbox, queue: DeliveryQueue, web: WebPacs | None) -> None:
        self._policy = policy
        self._inbox = inbox
        self._queue = queue
        self._web = web
        self._delivery: Delivery | None = None
        self._due = {folder.name for folder in inbox.ready.iterdir() if not self._is_done(folder)}
        self._unlabelled: set[str] = set()
        self._stuck: set[str] = set()
        self._unstuck_at = 0.0
        self._labels: Mapping[str, str] = {}
        self._labels_read_at_ns = -1

    def run(self, work: Work, stop: threading.Event, say: Say, *, once: bool = False) -> None:
        """Receive, protect and push until ``stop`` is set.

        Args:
            work: what studies are protected with.
            stop: ends the service after the step that is under way.
            say: told of everything that happens.
            once: end as soon as nothing is left to do now.

        Raises:
            ConfigurationError: policy, bundle or budget are wrong; ``port-in-use``; ``pacs-peer``.
            RefusedError: the bundle cannot be trusted.
        """
        self._connected()
        with nullcontext() if self._policy.receive is None else self._listening(say):
            while not stop.is_set():
                busy = self._sort(say)
                busy |= self._protect_next(work, say)
                busy |= self._deliver(say)
                if once and not busy:
                    return
                if not busy:
                    stop.wait(_PAUSE_S)

    def receive(self, stop: threading.Event, say: Say) -> None:
        """Take in what is sent to us until ``stop`` is set; nothing is protected.

        Raises:
            ConfigurationError: ``pacs-receive``: the policy opens no port; ``port-in-use``.
        """
        with self._listening(say):
            while not stop.wait(_PAUSE_S):
                self._sort(say)

    def pull(self, study: str, series: str) -> Pulled:
        """Fetch one series: by DICOMweb where the policy names it, else by C-MOVE through our receive port.

        Raises:
            ConfigurationError: ``pacs-peer`` or ``pacs-receive``: the policy names no PACS or opens no port.
            InputError: the PACS cannot be reached, lists nothing, or refuses.
        """
        if self._web is not None:
            return pull_by_wado(self._web, self._inbox, study, series)
        if self._policy.dicom is None:
            raise _no_peer()
        with self._listening(lambda event: None):
            destination = self._receive_settings().ae_title
            return pull_by_move(self._policy.dicom, self._inbox, study, series, destination=destination)

    def push(self, release: Path, private: Path | None, stop: threading.Event, say: Say) -> dict[str, int]:
        """Queue the DICOM objects of a release and work until each is verified, refused, or ``stop`` is set.

        Returns:
            The number of objects in each state of the queue.

        Raises:
            InputError: ``no-private-folder``: this is no release of medveil's.
            ConfigurationError: ``pacs-peer``.
        """
        delivery = self._connected()
        self._enqueue(release, private, say)
        while not stop.is_set() and (wait_s := delivery.wait_s()) is not None:
            if wait_s > 0:
                stop.wait(wait_s)
            else:
                self._deliver(say)
        return {str(state): count for state, count in self._queue.counts().items()}

    def retry(self) -> int:
        """Queue again what the PACS refused or holds differently; return how many objects that are."""
        return self._queue.retry()

    # Receiving

    @contextmanager
    def _listening(self, say: Say) -> Iterator[None]:
        with ReceivePort(self._receive_settings(), self._inbox) as port:
            say(Event("listening", {"port": port.port}))
            yield

    def _receive_settings(self) -> ReceiveSettings:
        if self._policy.receive is None:
            raise ConfigurationError(
                "pacs-receive", "The policy opens no port; add the table [pacs.receive]."
            )
        return self._policy.receive

    def _sort(self, say: Say) -> bool:
        """Sort what came into series, and hand over the complete ones; return whether there was anything."""
        rejected = self._inbox.collect()
        for one in rejected:
            say(Event("rejected", {"objects": 1}, one.code))
        # Without a port nothing can come in while we hold the folder: what was pulled is complete.
        quiet_s = 0.0 if self._policy.receive is None else self._policy.receive.quiet_s
        complete = self._inbox.complete_series(quiet_s)
        for series in complete:
            self._due.add(series.study)
            say(Event("complete", {"series": 1, "objects": series.instances}))
        return bool(rejected or complete)

    # Protecting

    def _protect_next(self, work: Work, say: Say) -> bool:
        """Protect one study that is due; return whether there was one."""
        if work.labels_file is not None and self._labels_changed(work.labels_file):
            self._due |= self._unlabelled
            self._unlabelled = set()
        if self._stuck and time.monotonic() >= self._unstuck_at:
            self._due |= self._stuck
            self._stuck = set()
        if not self._due:
            return False
        study = min(self._due)
        self._due.remove(study)
        labels_file = None if work.labels_file is None else self._label(study)
        if work.labels_file is not None and labels_file is None:
            self._unlabelled.add(study)
            say(Event("waiting", {"studies": 1}, "missing-label"))
        else:
            self._protect(study, labels_file, work, say)
        return True

    def _protect(self, study: str, labels_file: Path | None, work: Work, say: Say) -> None:
        """Make or continue the release of a study, and queue what is new in it.

        Raises:
            ConfigurationError: policy, bundle or budget are wrong, for this study as for every other.
            RefusedError: the bundle cannot be trusted.
        """
        release = self._release(study)
        call = Call(self._inbox.ready / study, release, None, labels_file, work.wishes, work.key_file)
        try:
            summary = make_release(call).summary
        except (InputError, StorageError, ConfigurationError) as error:
            if isinstance(error, StorageError):
                self._stuck.add(study)
                self._unstuck_at = time.monotonic() + _RETRY_S
            # A study begun under an earlier policy or bundle stays as it is: its copies are in the PACS, and second
            # ones with other noise would let anyone average the two.
            elif isinstance(error, ConfigurationError) and error.code != "settings-changed":
                raise
            say(Event("failed", {"studies": 1}, error.code))
            return
        figures = {key: int(str(summary[key])) for key in ("verified", "not_protectable", "quarantined")}
        say(Event("protected", figures))
        if figures["verified"]:
            self._enqueue(release, None, say)

    def _is_done(self, study: Path) -> bool:
        """Return whether everything that was received of a study had its turn."""
        summary = self._workspace(study.name).summary
        if not summary.is_file():
            return False
        return summary.stat().st_mtime_ns >= max(series.stat().st_mtime_ns for series in study.iterdir())

    def _labels_changed(self, path: Path) -> bool:
        """Read the labels file where it changed; one that is being rewritten is read at the next look."""
        try:
            written_at_ns = path.stat().st_mtime_ns
            if written_at_ns == self._labels_read_at_ns:
                return False
            self._labels = read_labels(path)
        except OSError as exc:
            raise InputError(
                "no-labels-file", "There is no labels file at this path; check --labels."
            ) from exc
        self._labels_read_at_ns = written_at_ns
        return True

    def _label(self, study: str) -> Path | None:
        """Write the labels of a study's files as ``protect`` reads them; None where none has a label."""
        rows = []
        for path in sorted((self._inbox.ready / study).glob("*/*")):
            uids = (path.stem, path.parent.name, study)
            label = next((self._labels[uid] for uid in uids if uid in self._labels), None)
            if label is not None:
                rows.append((f"{path.parent.name}/{path.name}", label))
        if not rows:
            return None
        text = io.StringIO()
        csv.writer(text).writerows([("file", "label"), *rows])
        target = self._policy.folder / _RELEASES / f"{study}.labels.csv"
        write_atomically(target, text.getvalue().encode(), mode=0o600)
        return target

    def _release(self, study: str) -> Path:
        return self._policy.folder / _RELEASES / study

    def _workspace(self, study: str) -> Workspace:
        return Workspace(self._release(study), private_beside(self._release(study)))

    # Pushing

    def _connected(self) -> Delivery:
        if self._delivery is None:
            if self._web is not None:
                self._delivery = Delivery(self._queue, self._web, self._web)
            elif self._policy.dicom is not None:
                peer = self._policy.dicom
                self._delivery = Delivery(self._queue, DimseSender(peer), DimseReader(peer))
            else:
                raise _no_peer()
        return self._delivery

    def _enqueue(self, release: Path, private: Path | None, say: Say) -> None:
        """Queue every released DICOM object; what is queued or delivered already stays as it is."""
        with ledger_of(release, private) as ledger:
            released = [file for file in ledger.files() if file.output_sha256 and file.format == _DICOM]
        for file in released:
            try:
                self._queue.add(release / file.target)
            except ImageError as error:
                say(Event("failed", {"objects": 1}, error.code))

    def _deliver(self, say: Say) -> bool:
        """Send and read back what is due; return whether anything was."""
        delivery = self._connected()
        if delivery.wait_s() != 0:
            return False
        done = delivery.run_once()
        say(Event("delivered", {"sent": done.sent, "verified": done.verified, "problems": done.problems}))
        if done.outage is not None:
            say(Event("outage", {}, done.outage))
        if done.verified and not self._policy.keep_received:
            self._let_go()
        return True

    def _let_go(self) -> None:
        """Remove the received originals of studies whose every object was protected and verified in the PACS."""
        waiting = {
            entry.path.parent for entry in self._queue.entries() if entry.state is not DeliveryState.VERIFIED
        }
        for study in list(self._inbox.ready.iterdir()):
            release = self._release(study.name).absolute()
            delivered = not any(folder.is_relative_to(release) for folder in waiting)
            if delivered and study.name not in self._due and self._is_complete(study):
                with disk_errors():
                    shutil.rmtree(study)

    def _is_complete(self, study: Path) -> bool:
        """Return whether every received file of a study has a protected copy."""
        if not self._is_done(study):
            return False
        with ledger_of(self._release(study.name), None) as ledger:
            released = {str(file.relative) for file in ledger.files() if file.output_sha256}
        return all(path.relative_to(study).as_posix() in released for path in study.glob("*/*"))


def _no_peer() -> ConfigurationError:
    return ConfigurationError(
        "pacs-peer", "The policy names no PACS; add the table [pacs.dicom] or [pacs.web]."
    )
