"""The durable queue of objects on their way to the PACS: one SQLite file, one row per object.

Durable at every step (WAL with synchronous FULL): a kill costs at most the repetition of one step. A row
holds the path and digest of the file, never pixels; the files stay where they are.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from medveil.agent.imageio.pacs.content import describe
from medveil.models.disk import database_errors, take_lock
from medveil.models.errors import BusyError, ImageError, StorageError

__all__ = ["DeliveryQueue", "DeliveryState", "Entry", "delivery_counts"]

SCHEMA_VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS deliveries (
    instance TEXT PRIMARY KEY,               -- SOP Instance UID of the protected object
    path TEXT NOT NULL,
    sha256 TEXT NOT NULL,                    -- of the file, as it was queued
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,     -- refusals so far; outages do not count
    due_at REAL NOT NULL DEFAULT 0,          -- seconds since the epoch
    reason TEXT                              -- code of the last refusal
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (state, due_at);
"""


class DeliveryState(StrEnum):
    """Where an object stands; see ``delivery``."""

    QUEUED = "queued"
    SENT = "sent"
    VERIFIED = "verified"
    REFUSED = "refused"
    DIFFERS = "differs"


OPEN_STATES: Final = (DeliveryState.QUEUED, DeliveryState.SENT)


@dataclass(frozen=True, slots=True)
class Entry:
    """One object's row.

    Attributes:
        instance: SOP Instance UID.
        path: the file.
        sha256: its digest when it was queued, hex.
        state: where it stands.
        attempts: how often it was refused.
        reason: code of the last refusal, None without one.
    """

    instance: str
    path: Path
    sha256: str
    state: DeliveryState
    attempts: int
    reason: str | None


class DeliveryQueue(AbstractContextManager["DeliveryQueue"]):
    """The open queue to one PACS; a second process is refused while this one holds it."""

    def __init__(self, path: Path) -> None:
        """Open or create a queue.

        Args:
            path: the SQLite file; its folder exists.

        Raises:
            BusyError: another process works on this queue.
            StorageError: it cannot be created, or was written by another version.
        """
        self._lock = take_lock(
            path.with_name(path.name + ".lock"),
            BusyError("busy", "Another medveil command works on this send queue."),
        )
        try:
            with _queue_errors():
                self._db = sqlite3.connect(path, isolation_level=None)
                path.chmod(0o600)
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, SCHEMA_VERSION):
                    raise StorageError(
                        "queue-version", "The send queue was written by another medveil version."
                    )
                self._db.executescript(SCHEMA)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        """Return the queue."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the queue and let others in."""
        self._db.close()
        os.close(self._lock)

    def add(self, path: Path) -> bool:
        """Queue a file; return False where the same object is queued already, delivered or not.

        Raises:
            ImageError: the file is no DICOM object, or another content was queued under its UID
                (``duplicate-uid``): the PACS would keep the first without a word.
            StorageError: the queue cannot be written.
        """
        outgoing = describe(path)
        with _queue_errors():
            cursor = self._db.execute(
                "INSERT INTO deliveries (instance, path, sha256, state) VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                (outgoing.instance, str(path.absolute()), outgoing.sha256, DeliveryState.QUEUED),
            )
            if cursor.rowcount:
                return True
            row = self._db.execute(
                "SELECT sha256 FROM deliveries WHERE instance = ?", (outgoing.instance,)
            ).fetchone()
        if row[0] != outgoing.sha256:
            raise ImageError(
                "duplicate-uid", "Another object with this SOP Instance UID was queued; release it anew."
            )
        return False

    def due(self, state: DeliveryState, now_s: float, limit: int) -> tuple[Entry, ...]:
        """Return objects of one state that are due, those that have waited longest first."""
        with _queue_errors():
            rows = self._db.execute(
                "SELECT instance, path, sha256, state, attempts, reason FROM deliveries"
                " WHERE state = ? AND due_at <= ? ORDER BY due_at, instance LIMIT ?",
                (state, now_s, limit),
            ).fetchall()
        return tuple(_entry(row) for row in rows)

    def next_due(self) -> float | None:
        """Return when the next object is due, seconds since the epoch; None where nothing is left to do."""
        with _queue_errors():
            row = self._db.execute(
                "SELECT MIN(due_at) FROM deliveries WHERE state IN (?, ?)", OPEN_STATES
            ).fetchone()
        return None if row[0] is None else float(row[0])

    def move(
        self,
        entry: Entry,
        state: DeliveryState,
        *,
        reason: str | None = None,
        attempts: int | None = None,
        due_at: float = 0.0,
    ) -> None:
        """Record where an object stands now, and the reason if it is no good one.

        Raises:
            StorageError: the queue cannot be written.
        """
        with _queue_errors():
            self._db.execute(
                "UPDATE deliveries SET state = ?, reason = ?, attempts = ?, due_at = ? WHERE instance = ?",
                (state, reason, entry.attempts if attempts is None else attempts, due_at, entry.instance),
            )

    def retry(self) -> int:
        """Queue again, at once, what was refused or differs; return how many objects that are.

        Raises:
            StorageError: the queue cannot be written.
        """
        with _queue_errors():
            cursor = self._db.execute(
                "UPDATE deliveries SET state = ?, attempts = 0, due_at = 0 WHERE state IN (?, ?)",
                (DeliveryState.QUEUED, DeliveryState.REFUSED, DeliveryState.DIFFERS),
            )
        return cursor.rowcount

    def entries(self) -> tuple[Entry, ...]:
        """Return every object, by UID."""
        with _queue_errors():
            rows = self._db.execute(
                "SELECT instance, path, sha256, state, attempts, reason FROM deliveries ORDER BY instance"
            ).fetchall()
        return tuple(_entry(row) for row in rows)

    def counts(self) -> dict[DeliveryState, int]:
        """Return the number of objects in each state, states without any included."""
        with _queue_errors():
            rows = self._db.execute("SELECT state, COUNT(*) FROM deliveries GROUP BY state").fetchall()
        return dict.fromkeys(DeliveryState, 0) | {DeliveryState(state): count for state, count in rows}


def delivery_counts(path: Path) -> dict[DeliveryState, int]:
    """Return the number of objects in each state of a queue that another process may be working on.

    Raises:
        StorageError: the queue cannot be read.
    """
    counts = dict.fromkeys(DeliveryState, 0)
    if not path.is_file():
        return counts
    with _queue_errors():
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = database.execute("SELECT state, COUNT(*) FROM deliveries GROUP BY state").fetchall()
        finally:
            database.close()
    return counts | {DeliveryState(state): count for state, count in rows}


def _entry(row: tuple[str, str, str, str, int, str | None]) -> Entry:
    return Entry(row[0], Path(row[1]), row[2], DeliveryState(row[3]), row[4], row[5])


def _queue_errors() -> AbstractContextManager[None]:
    return database_errors(
        "queue-failed",
        "The send queue cannot be read or written; check the disk and the folder's permissions.",
    )
