"""The two folders of a job: the release, which may be shared, and the private one beside it, which may not.

DIR/                      protected copies in the tree of the source, medveil-release.json, labels.csv
DIR.private/              mode 0700
    ledger.sqlite         one row per image; the audit log
    sidecars/             sealed: what turns a protected copy back into the original
    spool/                protected pixels of files that are not finished yet
    reading               which file is being decoded, should its decoder end the process
    surrogates.npz        the bundle's, adapted to this site's images, if the policy asks for it
    contact_sheet.png     shows originals
    summary.json
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from medveil.agent.ledger import Ledger
from medveil.models.disk import PART_PREFIX, disk_errors, locked, make_private_folder, part_beside
from medveil.models.errors import BusyError, ConfigurationError, StorageError

__all__ = ["LABELS_NAME", "MANIFEST_NAME", "Workspace", "open_workspace", "private_beside"]

MANIFEST_NAME: Final = "medveil-release.json"
LABELS_NAME: Final = "labels.csv"
_LEDGER_NAME: Final = "ledger.sqlite"
_LOCK_NAME: Final = "lock"
_LONGEST_NAME_BYTES: Final = 240  # a file name has 255 at most, and the sidecar's ending comes on top


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where a job writes.

    Attributes:
        release: what may be shared.
        private: what stays at the site.
    """

    release: Path
    private: Path

    @property
    def ledger_path(self) -> Path:
        """The ledger's SQLite file."""
        return self.private / _LEDGER_NAME

    @property
    def spool(self) -> Path:
        """Folder of protected pixels that are not released yet."""
        return self.private / "spool"

    @property
    def scratch(self) -> Path:
        """Folder for what a format has to unpack; emptied at every start."""
        return self.private / "scratch"

    @property
    def crash_note(self) -> Path:
        """The note of what is being decoded."""
        return self.private / "reading"

    @property
    def contact_sheet(self) -> Path:
        """The picture that shows originals beside protected copies."""
        return self.private / "contact_sheet.png"

    @property
    def summary(self) -> Path:
        """The summary of the last run."""
        return self.private / "summary.json"

    def sidecar(self, target: PurePosixPath) -> Path:
        """Return where the sealed sidecar of a released file lies."""
        name = target.name
        if len(name.encode()) > _LONGEST_NAME_BYTES:
            name = hashlib.sha256(name.encode()).hexdigest()
        return self.private / "sidecars" / target.parent / f"{name}.sealed"

    def output(self, target: PurePosixPath) -> Path:
        """Return where a protected copy lies."""
        return self.release / target

    def spool_file(self, file: int) -> Path:
        """Return where the protected pixels of an unfinished file lie, by its number in the ledger."""
        return self.spool / f"{file}.frames"

    def part(self, target: PurePosixPath) -> Path:
        """Return the name of a protected copy that is not finished yet."""
        return part_beside(self.output(target))


def private_beside(release: Path) -> Path:
    """Return the default private folder: the release folder's name with ``.private`` after it.

    Raises:
        ConfigurationError: ``folders``: the release folder has no name.
    """
    whole = release.absolute()
    if not whole.name:
        raise ConfigurationError("folders", "The output folder cannot be the root of the disk.")
    return whole.with_name(whole.name + ".private")


@contextmanager
def open_workspace(source: Path, release: Path, private: Path | None) -> Iterator[tuple[Workspace, Ledger]]:
    """Check, create and lock the folders of a job, and open its ledger.

    Raises:
        ConfigurationError: ``folders``: source, release and private folder lie inside one another.
        StorageError: ``foreign-files``: a folder holds files that this job did not write; or it can't
            be written.
        BusyError: another process works on the same job.
    """
    workspace = Workspace(release, private or private_beside(release))
    _check_apart(source, workspace)
    _check_ours(workspace)
    make_private_folder(workspace.private)
    busy = BusyError("busy", "Another medveil command works on this folder; wait until it has finished.")
    with locked(workspace.private / _LOCK_NAME, busy), Ledger(workspace.ledger_path) as ledger:
        _check_release(workspace, ledger)
        _tidy(workspace)
        yield workspace, ledger


def _check_apart(source: Path, workspace: Workspace) -> None:
    places = {
        "the source": source.resolve(),
        "the output folder": workspace.release.resolve(),
        "the private folder": workspace.private.resolve(),
    }
    for name, place in places.items():
        for other, container in places.items():
            if name != other and (place == container or container in place.parents):
                raise ConfigurationError(
                    "folders", f"{name.capitalize()} lies in {other}; choose folders that are apart."
                )
    if workspace.release.exists() and not workspace.release.is_dir():
        raise ConfigurationError("folders", "The output folder is a file; choose another name.")


def _check_ours(workspace: Workspace) -> None:
    """Refuse a private folder that was not made by medveil, before anything in it is touched."""
    private = workspace.private
    if private.exists() and not private.is_dir():
        raise ConfigurationError("folders", "The private folder is a file; choose another name.")
    with disk_errors():
        ours = workspace.ledger_path.exists() or not private.exists()
        # A run that was killed in its first moments leaves a lock and no ledger yet.
        if not ours and any(entry.name != _LOCK_NAME for entry in private.iterdir()):
            raise _foreign("private")


def _check_release(workspace: Workspace, ledger: Ledger) -> None:
    """Refuse a release folder that holds anything this job did not write; nothing is touched."""
    own = ledger.own_targets()
    if ledger.meta("released") is not None:
        own |= {MANIFEST_NAME, LABELS_NAME}
    with disk_errors():
        for folder, _, names in os.walk(workspace.release):
            for name in names:
                relative = Path(folder, name).relative_to(workspace.release).as_posix()
                if relative not in own and not name.startswith(PART_PREFIX):
                    raise _foreign("output")


def _foreign(which: str) -> StorageError:
    return StorageError(
        "foreign-files",
        f"The {which} folder holds files that this job did not write; choose an empty folder. "
        "Nothing was changed.",
    )


def _tidy(workspace: Workspace) -> None:
    """Remove what a killed run left half-written; none of it has a final name."""
    with disk_errors():
        workspace.release.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(workspace.scratch, ignore_errors=True)
        for folder in (workspace.spool, workspace.scratch):
            folder.mkdir(mode=0o700, exist_ok=True)
        for root in (workspace.release, workspace.private):
            for part in root.rglob(f"{PART_PREFIX}*"):
                part.unlink()
