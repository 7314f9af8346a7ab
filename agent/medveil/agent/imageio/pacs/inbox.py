"""Where objects from the PACS lie until they are protected: written as received, then sorted into series.

    arriving/   as received, named by UID and digest; nothing has looked inside yet
    open/       sorted by study and series; more may come
    ready/      complete series: the source folder of ``protect``
    rejected/   what could not be sorted, below the reason's code; our own copies aren't kept

Every move is one rename, so a kill at any point loses nothing and a rerun goes on. The network side only calls
``accept``: bytes from outside are parsed later, by ``collect``, outside the association's thread.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydicom.dataset import Dataset

from medveil.agent.imageio.derived import refuse_protected
from medveil.agent.imageio.dicom_header import damage_named, missing_attribute, read_dataset
from medveil.models.disk import (
    PART_PREFIX,
    disk_errors,
    file_sha256,
    fill_and_publish,
    make_private_folder,
    publish,
    sync,
)
from medveil.models.errors import ImageError, StorageError

__all__ = ["CompleteSeries", "Inbox", "Rejected", "inbox_counts", "uid_of", "valid_uid"]

UID_PATTERN: Final = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)
UID_LENGTH: Final = 64
"""PS3.5 9.1. Components with a leading zero break the standard and are common; they harm no file name."""

DIGEST_DIGITS: Final = 16
"""Digits of the SHA-256 in an arrival's name: two versions of one object never overwrite each other."""

SUFFIX: Final = ".dcm"

NOT_KEPT: Final = frozenset({"already-protected"})
"""Reasons for which an arrival is dropped: its sender has it, and a PACS that routes all it gets to us would fill
the disk with our own copies."""


@dataclass(frozen=True, slots=True)
class CompleteSeries:
    """A series to which nothing was added for the quiet period.

    Attributes:
        study: Study Instance UID.
        series: Series Instance UID.
        folder: where its objects lie.
        instances: number of objects handed over now; late ones make the series complete once more.
    """

    study: str
    series: str
    folder: Path
    instances: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """An arrival that could not be sorted.

    Attributes:
        path: where it lies now; None where it is not kept.
        code: stable reason.
        public: what to do about it.
    """

    path: Path | None
    code: str
    public: str


def valid_uid(text: str) -> str:
    """Return a UID that may become part of a file name or an address.

    Raises:
        ImageError: ``bad-uid``: anything but digits and single dots, or more than 64 characters.
    """
    if len(text) > UID_LENGTH or not UID_PATTERN.fullmatch(text):
        raise ImageError("bad-uid", "An identifier of this object is not a valid UID; it was not taken.")
    return text


def uid_of(dataset: Dataset, keyword: str) -> str:
    """Return an identifier of an object.

    Raises:
        ImageError: ``missing-attribute`` or ``bad-uid``.
    """
    text = str(dataset.get(keyword) or "")
    if not text:
        raise missing_attribute(keyword)
    return valid_uid(text)


class Inbox:
    """The folder of one receive port; several threads of one process may use it."""

    def __init__(
        self,
        root: Path,
        *,
        minimum_free_bytes: int,
        maximum_used: float,
        disk_usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the inbox; what a killed run left half-written is removed.

        Args:
            root: private folder of the inbox.
            minimum_free_bytes: refuse objects while the disk has less left.
            maximum_used: refuse objects while a larger share of the disk is in use.
            disk_usage: returns total, used and free bytes of the disk that holds a path.
            now: clock, in seconds, the one that file times are taken from.

        Raises:
            StorageError: a folder cannot be created.
        """
        self.ready = root / "ready"
        self._arriving = root / "arriving"
        self._open = root / "open"
        self._rejected = root / "rejected"
        self._minimum_free_bytes = minimum_free_bytes
        self._maximum_used = maximum_used
        self._disk_usage = disk_usage
        self._now = now
        self._sorting = threading.Lock()
        for folder in (root, self._arriving, self._open, self.ready, self._rejected):
            make_private_folder(folder)
        with disk_errors():
            for part in self._arriving.glob(f"{PART_PREFIX}*"):
                part.unlink()

    def has_room(self) -> bool:
        """Return whether the disk is below both watermarks."""
        total, used, free = self._disk_usage(self._arriving)
        return free >= self._minimum_free_bytes and used <= self._maximum_used * total

    def accept(self, instance: str, data: bytes) -> Path:
        """Write one object as received: temporary name, sync, rename. The same bytes again change nothing.

        Args:
            instance: SOP Instance UID that the sender named.
            data: DICOM file, preamble and file meta information included.

        Raises:
            ImageError: ``bad-uid``.
            StorageError: ``disk-watermark``, or the disk takes no more.
        """
        valid_uid(instance)
        if not self.has_room():
            raise StorageError(
                "disk-watermark", "The disk of the receive port is nearly full; free some space."
            )
        digest = hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]
        target = self._arriving / f"{instance}-{digest}{SUFFIX}"
        with disk_errors():
            # A name of its own for each call: two associations may send one object at the same time.
            handle, name = tempfile.mkstemp(prefix=PART_PREFIX, dir=self._arriving)
            fill_and_publish(handle, Path(name), target, data)
        return target

    def collect(self) -> tuple[Rejected, ...]:
        """Sort what has arrived into series; return what could not be sorted, with its reason.

        Raises:
            StorageError: a file cannot be moved.
        """
        rejected = []
        with self._sorting:
            for path in sorted(self._arriving.glob(f"[0-9]*{SUFFIX}")):
                try:
                    self._sort(path)
                except ImageError as error:
                    rejected.append(Rejected(self._put_aside(path, error.code), error.code, error.public))
        return tuple(rejected)

    def complete_series(self, quiet_s: float) -> tuple[CompleteSeries, ...]:
        """Hand over every series that was quiet for ``quiet_s`` seconds: its objects move to ``ready``.

        Raises:
            StorageError: a file cannot be moved.
        """
        complete = []
        with self._sorting:
            for folder in sorted(self._open.glob("*/*")):
                files = sorted(folder.glob(f"*{SUFFIX}"))
                if not files or self._now() - max(file.stat().st_mtime for file in files) < quiet_s:
                    continue
                target = self.ready / folder.parent.name / folder.name
                with disk_errors():
                    target.mkdir(mode=0o700, parents=True, exist_ok=True)
                for file in files:
                    _move(file, target / file.name)
                complete.append(CompleteSeries(folder.parent.name, folder.name, target, len(files)))
        return tuple(complete)

    def held(self) -> frozenset[str]:
        """Return the SOP Instance UIDs of everything sorted or handed over."""
        files: Iterable[Path] = (*self._open.glob(f"*/*/*{SUFFIX}"), *self.ready.glob(f"*/*/*{SUFFIX}"))
        return frozenset(file.stem for file in files)

    def _put_aside(self, path: Path, code: str) -> Path | None:
        if code in NOT_KEPT:
            with disk_errors():
                path.unlink()
            return None
        folder = self._rejected / code
        make_private_folder(folder)
        return _move(path, folder / path.name)

    def _sort(self, path: Path) -> None:
        """Move one arrival into its series.

        Raises:
            ImageError: it is damaged, not the object that its sender named, or contradicts an earlier one.
        """
        study, series, instance = _identity(path)
        if instance != path.stem.rpartition("-")[0]:
            raise ImageError("uid-mismatch", "This object is not the one that its sender announced.")
        here = Path(study, series, instance + SUFFIX)
        known = [folder / here for folder in (self._open, self.ready) if (folder / here).exists()]
        if not known:
            with disk_errors():
                (self._open / here).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _move(path, self._open / here)
        elif file_sha256(known[0]) == file_sha256(path):
            with disk_errors():
                path.unlink()  # sent twice, the same both times
        else:
            raise ImageError(
                "duplicate-uid", "Two different objects claim the same SOP Instance UID; the first was kept."
            )


def inbox_counts(root: Path) -> dict[str, int]:
    """Return the number of objects in each stage of an inbox that another process may be working on."""
    stages = {
        "arriving": f"arriving/[0-9]*{SUFFIX}",
        "open": f"open/*/*/*{SUFFIX}",
        "ready": f"ready/*/*/*{SUFFIX}",
        "rejected": f"rejected/*/*{SUFFIX}",
    }
    return {stage: len(list(root.glob(pattern))) for stage, pattern in stages.items()}


def _identity(path: Path) -> tuple[str, str, str]:
    """Return study, series and instance UID from the header of a file."""
    dataset = read_dataset(path)
    with damage_named():
        refuse_protected(dataset)
        study, series, instance = (
            uid_of(dataset, keyword)
            for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        )
    return study, series, instance


def _move(path: Path, target: Path) -> Path:
    with disk_errors():
        publish(path, target)
        sync(path.parent)
    return target
