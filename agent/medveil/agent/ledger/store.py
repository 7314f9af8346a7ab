"""The ledger: one SQLite file per job, one row per image, and the audit log.

Durable at every commit (WAL with synchronous FULL). A commit covers a batch of images; between two
commits a kill costs the work of that batch and nothing else. Rows never hold pixels.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Final, Self

from medveil.agent.ledger.chain import GENESIS, LogLine, chained, first_changed_line
from medveil.agent.ledger.states import FINAL_STATES, FileState, ImageState, allowed
from medveil.models.disk import database_errors
from medveil.models.errors import BusyError, ConfigurationError, StorageError

__all__ = ["FileEntry", "FileRow", "ImageRow", "Ledger", "Receipt", "Totals"]

_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY,
    relative TEXT NOT NULL UNIQUE,
    target TEXT NOT NULL,
    format TEXT NOT NULL,
    frames INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    state TEXT NOT NULL,
    ours INTEGER NOT NULL DEFAULT 0,         -- 1: what lies under the target's name was written by this job
    output_sha256 TEXT,
    clean_sha256 TEXT
);
CREATE TABLE IF NOT EXISTS images (
    file INTEGER NOT NULL REFERENCES files(id),
    frame INTEGER NOT NULL,
    state TEXT NOT NULL,
    digest TEXT,                             -- SHA-256 of the stored values
    class INTEGER,
    reason TEXT,
    sentence TEXT,
    spool_offset INTEGER,                    -- where its protected pixels lie in the spool of its file
    psnr_db REAL,
    epsilon_max REAL,
    changed REAL,
    guessed_window INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (file, frame)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS images_by_state ON images (state);
CREATE TABLE IF NOT EXISTS log (
    sequence INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    event TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL,
    hash TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as the scan of the source found it; when any of this differs, the file is a new one.

    Attributes:
        relative: path below the source folder.
        target: path below the release folder.
        format: name of its format.
        frames: number of images inside.
        size_bytes: size of the source file.
        mtime_ns: its time of last change.
    """

    relative: PurePosixPath
    target: PurePosixPath
    format: str
    frames: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was done to one image, as measured on what was written.

    Attributes:
        digest: SHA-256 of the clean stored values, hex.
        class_index: class of the bundle's taxonomy.
        psnr_db: peak signal-to-noise ratio; None for a blank frame, carried as it is.
        epsilon_max: largest change, in 1/255 of the release window.
        changed: share of pixels that changed.
        guessed_window: whether the display window was taken from the image's own values.
    """

    digest: str
    class_index: int
    psnr_db: float | None
    epsilon_max: float
    changed: float
    guessed_window: bool = False


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image's row."""

    file: int
    frame: int
    state: ImageState
    reason: str | None
    sentence: str | None
    spool_offset: int | None
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file's row."""

    id: int
    relative: PurePosixPath
    target: PurePosixPath
    format: str
    frames: int
    state: FileState
    ours: bool
    output_sha256: str | None
    clean_sha256: str | None


@dataclass(frozen=True, slots=True)
class Totals:
    """The job's figures over all images.

    Attributes:
        images: images of the source, usable or not.
        verified: released, read back and as meant.
        not_protectable: no change fits into the budget.
        quarantined: left out, by reason.
        unfinished: neither; more than 0 after a run that was interrupted.
        psnr_db_median: over the verified images; None without any.
        psnr_db_min: worst verified image.
        epsilon_max: largest change written, in 1/255 of the release window.
        changed_mean: mean share of changed pixels.
        guessed_windows: verified images whose budget was counted in a window guessed from their own values.
    """

    images: int
    verified: int
    not_protectable: int
    quarantined: Mapping[str, int]
    unfinished: int
    psnr_db_median: float | None
    psnr_db_min: float | None
    epsilon_max: float | None
    changed_mean: float | None
    guessed_windows: int = 0


class Ledger(AbstractContextManager["Ledger"]):
    """The open ledger of one job. One process at a time: the caller holds the lock of the private folder."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Open or create the ledger.

        Args:
            path: the SQLite file; its folder exists.
            now: clock of the audit log.

        Raises:
            StorageError: it cannot be created, or is no ledger of this version.
        """
        self._now = now
        with _ledger_errors():
            self._db = sqlite3.connect(path, isolation_level=None)
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(_SCHEMA)
            self._add_newer_columns()
        version = self.meta("schema_version")
        if version is None:
            with self.transaction():
                self.set_meta("schema_version", str(_SCHEMA_VERSION))
                self.set_meta("log_head", GENESIS)
        elif version != str(_SCHEMA_VERSION):
            raise StorageError("ledger-version", "The private folder was written by another medveil version.")

    def _add_newer_columns(self) -> None:
        """Bring a ledger of an earlier build up to date; new columns have a default, so its rows stay right."""
        known = {row[1] for row in self._db.execute("PRAGMA table_info(images)")}
        if "guessed_window" not in known:
            self._db.execute("ALTER TABLE images ADD COLUMN guessed_window INTEGER NOT NULL DEFAULT 0")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Close the file; what was committed is on the disk."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside the block at once, or nothing of it.

        Raises:
            StorageError: the disk is full or fails.
        """
        with _ledger_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()

    # What the job is
    # ----------------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """Return a setting of the job."""
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Store a setting of the job; inside a transaction."""
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value)
        )

    def bind(self, settings_digest: str, settings: Mapping[str, object]) -> None:
        """Tie a new ledger to its settings; refuse to go on under others.

        Two releases of one image with different changes would let a receiver average them, and one
        folder with both would not say which is which.

        Raises:
            ConfigurationError: ``settings-changed``.
        """
        bound = self.meta("settings_digest")
        if bound is None:
            with self.transaction():
                self.set_meta("settings_digest", settings_digest)
                self.set_meta("settings", json.dumps(settings, sort_keys=True))
        elif bound != settings_digest:
            raise ConfigurationError(
                "settings-changed",
                "This output folder was begun with another bundle or other settings; "
                "use the same ones to go on, or choose a new folder.",
            )

    def begun(self) -> datetime | None:
        """Return when the job was first begun, as its maker said, or None before that."""
        text = self.meta("begun")
        return None if text is None else datetime.fromisoformat(text)

    def begin(self, moment: datetime) -> None:
        """Keep when the job is first begun: protected DICOM objects state it, so a rerun must state the same.

        Raises:
            BusyError: ``busy``: another process began the same job while this one was getting ready.
        """
        known = self.begun()
        if known is None:
            with self.transaction():
                self.set_meta("begun", moment.isoformat())
        elif known != moment:
            raise BusyError("busy", "Another medveil command has begun this job just now; run again.")

    # Files ------------------------------------------------------------------------------
    # ------------

    def register(self, entry: FileEntry) -> PurePosixPath | None:
        """Enter one file of the source; inside a transaction. Known and unchanged files stay as they are.

        Returns:
            The target under which an earlier version of this file was released, if that is another one
            now; its file has to go.
        """
        row = self._one(
            "SELECT id, target, format, frames, size_bytes, mtime_ns, ours FROM files WHERE relative = ?",
            str(entry.relative),
        )
        described = (str(entry.target), entry.format, entry.frames, entry.size_bytes, entry.mtime_ns)
        if row is not None and tuple(row[1:6]) == described:
            return None
        if row is None:
            cursor = self._db.execute(
                "INSERT INTO files (relative, target, format, frames, size_bytes, mtime_ns, state)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (str(entry.relative), *described, FileState.FOUND),
            )
            self._add_frames(int(cursor.lastrowid or 0), entry.frames)
            return None
        moved = row[6] and row[1] != str(entry.target)
        self._db.execute(
            "UPDATE files SET target = ?, format = ?, frames = ?, size_bytes = ?, mtime_ns = ?, state = ?,"
            " ours = ours AND NOT ?, output_sha256 = NULL, clean_sha256 = NULL WHERE id = ?",
            (*described, FileState.FOUND, bool(moved), row[0]),
        )
        self._db.execute("DELETE FROM images WHERE file = ?", (row[0],))
        self._add_frames(row[0], entry.frames)
        self.log("source-changed", str(entry.relative), "")
        return PurePosixPath(row[1]) if moved else None

    def _add_frames(self, file: int, frames: int) -> None:
        self._db.executemany(
            "INSERT INTO images (file, frame, state) VALUES (?, ?, ?)",
            ((file, frame, ImageState.FOUND) for frame in range(frames)),
        )

    def register_quarantined(self, relative: PurePosixPath, code: str, sentence: str) -> PurePosixPath | None:
        """Enter a file that could not be looked at, as one quarantined image; inside a transaction.

        Returns:
            The target under which an earlier version of this file was released; its copy has to go.
        """
        known = self._one(
            "SELECT i.reason FROM files f JOIN images i ON i.file = f.id"
            " WHERE f.relative = ? AND f.frames = 1 AND i.state = ?",
            str(relative),
            ImageState.QUARANTINED,
        )
        if known is not None and known[0] == code:
            return None
        old = self._one("SELECT id, target, ours FROM files WHERE relative = ?", str(relative))
        if old is not None:
            self._db.execute("DELETE FROM images WHERE file = ?", (old[0],))
            self._db.execute("DELETE FROM files WHERE id = ?", (old[0],))
        cursor = self._db.execute(
            "INSERT INTO files (relative, target, format, frames, size_bytes, mtime_ns, state)"
            " VALUES (?, ?, '', 1, 0, 0, ?)",
            (str(relative), str(relative), FileState.DONE),
        )
        self._db.execute(
            "INSERT INTO images (file, frame, state, reason, sentence) VALUES (?, 0, ?, ?, ?)",
            (cursor.lastrowid, ImageState.QUARANTINED, code, sentence),
        )
        self.log(ImageState.QUARANTINED, str(relative), code)
        return PurePosixPath(old[1]) if old is not None and old[2] else None

    def forget_missing(self, present: Iterable[PurePosixPath]) -> list[PurePosixPath]:
        """Drop files that are no longer in the source and were not released; inside a transaction.

        Returns:
            Targets under which something of a dropped file may lie; it has to go.
        """
        here = {str(relative) for relative in present}
        leftovers = []
        rows = self._db.execute("SELECT id, relative, target, ours FROM files WHERE output_sha256 IS NULL")
        for file, relative, target, ours in rows.fetchall():
            if relative not in here:
                self._db.execute("DELETE FROM images WHERE file = ?", (file,))
                self._db.execute("DELETE FROM files WHERE id = ?", (file,))
                self.log("source-removed", relative, "")
                leftovers += [PurePosixPath(target)] if ours else []
        return leftovers

    def files(self, state: FileState | None = None) -> list[FileRow]:
        """Return the files, by path; only those of one state if given."""
        rows = self._db.execute(
            "SELECT id, relative, target, format, frames, state, ours, output_sha256, clean_sha256 FROM files"
            " WHERE ?1 IS NULL OR state = ?1 ORDER BY relative",
            (state,),
        )
        return [
            FileRow(
                r[0],
                PurePosixPath(r[1]),
                PurePosixPath(r[2]),
                r[3],
                r[4],
                FileState(r[5]),
                bool(r[6]),
                r[7],
                r[8],
            )
            for r in rows
        ]

    def any_released(self, files: Iterable[PurePosixPath]) -> bool:
        """Return whether one of these files of the source has its protected copy in the release."""
        query = "SELECT 1 FROM files WHERE relative = ? AND state = ? AND output_sha256 IS NOT NULL"
        return any(self._one(query, str(relative), FileState.DONE) is not None for relative in files)

    def own_targets(self) -> set[str]:
        """Return the names below the release folder under which files of this job may lie."""
        return {row[0] for row in self._db.execute("SELECT target FROM files WHERE ours = 1")}

    def mark_writing(self, files: Iterable[int]) -> None:
        """Claim the targets' names: from here on what lies there is ours. Inside a transaction."""
        self._db.executemany(
            "UPDATE files SET state = ?, ours = 1 WHERE id = ?", ((FileState.WRITING, file) for file in files)
        )

    def finish_file(self, file: int, *, output_sha256: str | None, clean_sha256: str | None) -> None:
        """Record that nothing more is to be done about a file; inside a transaction."""
        self._db.execute(
            "UPDATE files SET state = ?, ours = ?, output_sha256 = ?, clean_sha256 = ? WHERE id = ?",
            (FileState.DONE, output_sha256 is not None, output_sha256, clean_sha256, file),
        )

    def reopen_file(self, file: int, event: str) -> None:
        """Send a file and all its images back to the start; inside a transaction."""
        row = self._one("SELECT relative FROM files WHERE id = ?", file)
        self._db.execute(
            "UPDATE files SET state = ?, output_sha256 = NULL WHERE id = ?", (FileState.FOUND, file)
        )
        self._db.execute(
            "UPDATE images SET state = ?, reason = NULL, sentence = NULL, spool_offset = NULL,"
            " psnr_db = NULL, epsilon_max = NULL, changed = NULL WHERE file = ?",
            (ImageState.FOUND, file),
        )
        self.log(event, "" if row is None else str(row[0]), "")

    # Images -----------------------------------------------------------------------------
    # ------------

    def images(self, file: int) -> list[ImageRow]:
        """Return the images of one file, by frame."""
        rows = self._db.execute(
            "SELECT file, frame, state, reason, sentence, spool_offset, digest, class, psnr_db, epsilon_max,"
            " changed, guessed_window FROM images WHERE file = ? ORDER BY frame",
            (file,),
        )
        return [_image_row(row) for row in rows]

    def mark_read(self, file: int, frame: int, digest: str, class_index: int) -> None:
        """Record an image's digest and class; inside a transaction."""
        self._move(file, frame, ImageState.READ)
        self._db.execute(
            "UPDATE images SET digest = ?, class = ? WHERE file = ? AND frame = ?",
            (digest, class_index, file, frame),
        )

    def mark_protected(self, file: int, frame: int, receipt: Receipt, spool_offset: int | None) -> None:
        """Record that an image's protected pixels exist; inside a transaction."""
        self._move(file, frame, ImageState.PROTECTED)
        self._db.execute(
            "UPDATE images SET digest = ?, class = ?, psnr_db = ?, epsilon_max = ?, changed = ?,"
            " guessed_window = ?, spool_offset = ? WHERE file = ? AND frame = ?",
            (
                receipt.digest,
                receipt.class_index,
                receipt.psnr_db,
                receipt.epsilon_max,
                receipt.changed,
                receipt.guessed_window,
                spool_offset,
                file,
                frame,
            ),
        )

    def mark_verified(self, file: int, frame: int, subject: str) -> None:
        """Record that an image was released and read back as meant; inside a transaction."""
        self._move(file, frame, ImageState.VERIFIED)
        self._db.execute("UPDATE images SET spool_offset = NULL WHERE file = ? AND frame = ?", (file, frame))
        self.log(ImageState.VERIFIED, subject, "")

    def mark_left_out(
        self, file: int, frame: int, state: ImageState, subject: str, reason: str, sentence: str
    ) -> None:
        """Record that an image is quarantined or not protectable, and why; inside a transaction."""
        self._move(file, frame, state)
        self._db.execute(
            "UPDATE images SET reason = ?, sentence = ? WHERE file = ? AND frame = ?",
            (reason, sentence, file, frame),
        )
        self.log(state, subject, reason)

    def verified_by_digest(self) -> Iterator[ImageRow]:
        """Yield the verified images by digest: an order that says nothing about where they lie."""
        rows = self._db.execute(
            "SELECT file, frame, state, reason, sentence, spool_offset, digest, class, psnr_db, epsilon_max,"
            " changed, guessed_window FROM images WHERE state = ? ORDER BY digest, file, frame",
            (ImageState.VERIFIED,),
        )
        for row in rows:
            yield _image_row(row)

    def quarantined(self) -> list[tuple[FileRow, ImageRow]]:
        """Return every quarantined image with its file, by path and frame."""
        left_out = defaultdict(list)
        rows = self._db.execute(
            "SELECT file, frame, state, reason, sentence, spool_offset, digest, class, psnr_db, epsilon_max,"
            " changed, guessed_window FROM images WHERE state = ? ORDER BY file, frame",
            (ImageState.QUARANTINED,),
        )
        for row in rows:
            left_out[row[0]].append(_image_row(row))
        if not left_out:
            return []
        return [(file, image) for file in self.files() for image in left_out.get(file.id, ())]

    def totals(self) -> Totals:
        """Return the job's figures."""
        counts = dict(self._db.execute("SELECT state, COUNT(*) FROM images GROUP BY state").fetchall())
        reasons = self._db.execute(
            "SELECT reason, COUNT(*) FROM images WHERE state = ? GROUP BY reason ORDER BY reason",
            (ImageState.QUARANTINED,),
        ).fetchall()
        verified = int(counts.get(ImageState.VERIFIED, 0))
        figures = self._one(
            "SELECT MIN(psnr_db), MAX(epsilon_max), AVG(changed), SUM(guessed_window) FROM images"
            " WHERE state = ?",
            ImageState.VERIFIED,
        ) or (None, None, None, None)
        middle = self._one(
            "SELECT psnr_db FROM images WHERE state = ?1 AND psnr_db NOT NULL ORDER BY psnr_db LIMIT 1 OFFSET"
            " (SELECT COUNT(psnr_db) / 2 FROM images WHERE state = ?1)",
            ImageState.VERIFIED,
        )
        return Totals(
            images=sum(counts.values()),
            verified=verified,
            not_protectable=int(counts.get(ImageState.NOT_PROTECTABLE, 0)),
            quarantined={str(reason): int(count) for reason, count in reasons},
            unfinished=sum(count for state, count in counts.items() if state not in FINAL_STATES),
            psnr_db_median=None if middle is None else middle[0],
            psnr_db_min=figures[0],
            epsilon_max=figures[1],
            changed_mean=figures[2],
            guessed_windows=figures[3] or 0,
        )

    def _move(self, file: int, frame: int, state: ImageState) -> None:
        row = self._one("SELECT state FROM images WHERE file = ? AND frame = ?", file, frame)
        if row is None or not allowed(ImageState(row[0]), state):
            raise ValueError(f"image {frame} of file {file} cannot go from {row and row[0]} to {state}")
        self._db.execute("UPDATE images SET state = ? WHERE file = ? AND frame = ?", (state, file, frame))

    # The audit log
    # ------------------------------------------------------------------------------------------------

    def log(self, event: str, subject: str, detail: str) -> None:
        """Append one line; inside a transaction."""
        row = self._one("SELECT COALESCE(MAX(sequence), 0) FROM log") or (0,)
        time = self._now().isoformat(timespec="milliseconds")
        line = chained(self.meta("log_head") or GENESIS, int(row[0]) + 1, time, event, subject, detail)
        self._db.execute(
            "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)",
            (line.sequence, line.time, line.event, line.subject, line.detail, line.hash),
        )
        self.set_meta("log_head", line.hash)

    def log_lines(self) -> Iterator[LogLine]:
        """Yield the lines in order."""
        for row in self._db.execute("SELECT * FROM log ORDER BY sequence"):
            yield LogLine(*row)

    def first_changed_line(self) -> int | None:
        """Return the sequence number of the first line that was tampered with, or None."""
        return first_changed_line(self.log_lines(), self.meta("log_head") or GENESIS)

    def _one(self, statement: str, *values: object) -> Sequence[Any] | None:
        row: Sequence[Any] | None = self._db.execute(statement, values).fetchone()
        return row


def _image_row(row: Sequence[Any]) -> ImageRow:
    receipt = None if row[9] is None else Receipt(row[6], row[7], row[8], row[9], row[10], bool(row[11]))
    return ImageRow(row[0], row[1], ImageState(row[2]), row[3], row[4], row[5], receipt)


def _ledger_errors() -> AbstractContextManager[None]:
    return database_errors(
        "ledger-damaged",
        "The ledger in the private folder is damaged; restore a backup or use a new output folder.",
    )
