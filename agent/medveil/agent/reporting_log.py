"""The egress log: every message that ever left, byte for byte, each line chained to the one before.

One JSON object per line. A message is on the disk here before its first byte is on the network, so what was
sent is always in the log; a line whose message did not get through is possible, the reverse is not. The last
hash also lies in a file of its own: cutting lines off the end shows. Whoever can rewrite both files can forge
both; write the head down elsewhere (``egress verify`` prints it) to exclude that too.

    egress.00001.jsonl, egress.00002.jsonl, ...   full files, oldest first, never touched again
    egress.jsonl                                  the one that grows; the chain goes on from file to file
    egress.head                                   hash of the last line
    egress.lock                                   held by the one process that writes
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from medveil.models.disk import disk_errors, publish, take_lock, write_atomically
from medveil.models.errors import BusyError, StorageError

__all__ = ["GENESIS", "EgressLog", "SentMessage", "Verdict", "log_bytes", "sent_messages", "verify_log"]

GENESIS: Final = hashlib.sha256(b"medveil egress log 1").hexdigest()
"""What stands before the first line."""
_TAIL_BYTES: Final = 256 * 1024
"""More than the two longest lines: 64 KiB of message in base64, twice."""
_FULL_BYTES: Final = 16 * 2**20
"""A file of this size is closed; our choice: a week of beats, and an editor still opens it."""


@dataclass(frozen=True, slots=True)
class SentMessage:
    """One line of the log.

    Attributes:
        sequence: 1, 2, 3, ...
        time: ISO 8601, UTC.
        method: path of the remote call.
        payload: the serialised message, exactly as it was sent.
        hash: over the previous line's hash and this line's fields.
    """

    sequence: int
    time: str
    method: str
    payload: bytes
    hash: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check of the log found.

    Attributes:
        lines: lines that are as they were written.
        changed_line: number of the first line that is not; None: the log is whole.
        head: hash of the last good line.
    """

    lines: int
    changed_line: int | None
    head: str


class EgressLog(AbstractContextManager["EgressLog"]):
    """The log, open for writing; one process at a time, any thread of it."""

    def __init__(
        self,
        path: Path,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        full_bytes: int = _FULL_BYTES,
    ) -> None:
        """Open or create the log.

        Args:
            path: of the file that grows; all others lie beside it.
            now: the clock.
            full_bytes: size at which a file is closed and the next one begun.

        Raises:
            BusyError: ``egress-log-busy``: another process writes to it.
            StorageError: ``egress-log-changed``: its end is not as it was written, so nothing may be added.
        """
        self._path, self._now, self._full_bytes = path, now, full_bytes
        self._guard = threading.Lock()
        busy = BusyError("egress-log-busy", "Another medveil process is reporting already.")
        with ExitStack() as opened:
            self._lock = take_lock(path.with_suffix(".lock"), busy)
            opened.callback(os.close, self._lock)
            with disk_errors():
                self._file = _open(path)
            opened.callback(lambda: os.close(self._file))
            self._sequence, self._head = self._last()
            opened.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let go of the lock."""
        os.close(self._file)
        os.close(self._lock)

    def append(self, method: str, payload: bytes) -> None:
        """Write one message to the disk; only then may it be sent.

        Raises:
            StorageError: it could not be written, so it must not be sent.
        """
        with self._guard, disk_errors():
            if os.fstat(self._file).st_size >= self._full_bytes:
                self._begin_next_file()
            time = self._now().isoformat(timespec="milliseconds")
            sent = _chained(self._head, self._sequence + 1, time, method, payload)
            self._write(_line(sent))
            write_atomically(_head_path(self._path), sent.hash.encode("ascii"), mode=0o600)
            self._sequence, self._head = sent.sequence, sent.hash

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        if os.write(self._file, line) != len(line):
            os.ftruncate(self._file, size)  # or the next line would begin in the middle of this one
            raise StorageError("disk-full", "The egress log could not be written; nothing was sent.")
        os.fsync(self._file)

    def _begin_next_file(self) -> None:
        """Give the full file its number. A kill before the next one exists is healed by opening the log again."""
        if self._path.exists():
            full = _full_files(self._path)
            number = int(full[-1].suffixes[-2][1:]) + 1 if full else 1
            publish(self._path, self._path.with_suffix(f".{number:05}{self._path.suffix}"))
        done, self._file = self._file, _open(self._path)
        os.close(done)

    def _last(self) -> tuple[int, str]:
        """Return number and hash of the last line, after mending what a kill left."""
        with disk_errors():
            lines = self._last_lines()
        recent = [(0, GENESIS)] if len(lines) < 2 else []
        for text in lines:
            sent = _parsed(text)
            if sent is None:
                raise _changed()
            recent.append((sent.sequence, sent.hash))
        head = _read_head(self._path)
        # A kill between line and head leaves the head one line behind; that line was not sent either.
        if head not in [known for _, known in recent[-2:]]:
            raise _changed()
        if head != recent[-1][1]:
            write_atomically(_head_path(self._path), recent[-1][1].encode("ascii"), mode=0o600)
        return recent[-1]

    def _last_lines(self) -> list[bytes]:
        """Return the last two lines of the log, fewer if it has fewer; a torn one goes."""
        lines, torn = _tail(self._file)
        if torn:  # killed while writing: the line was never sent
            os.ftruncate(self._file, os.fstat(self._file).st_size - len(torn))
        for full in reversed(_full_files(self._path)):
            if len(lines) >= 2:
                break
            with full.open("rb") as file:
                lines = _tail(file.fileno())[0] + lines
        return lines[-2:]


def sent_messages(path: Path) -> Iterator[SentMessage]:
    """Yield what was sent, oldest first.

    Raises:
        StorageError: ``egress-log-changed``: a line cannot be read; `verify_log` says which.
    """
    for text in _raw_lines(path):
        sent = _parsed(text)
        if sent is None:
            raise _changed()
        yield sent


def verify_log(path: Path) -> Verdict:
    """Check every byte of the log against its chain and its head, also while a process writes to it."""
    while True:
        before = _state(path)
        verdict = _verified(path)
        if verdict.changed_line is None or _state(path) == before:
            return verdict


def log_bytes(path: Path) -> int:
    """Return the size of the whole log."""
    total = 0
    with disk_errors():
        for file in (*_full_files(path), path):
            with suppress(FileNotFoundError):  # there is no log yet; or it has just got its number
                total += file.stat().st_size
    return total


def _state(path: Path) -> tuple[int, str]:
    """Return what changes when a line is added: size and head."""
    return log_bytes(path), _read_head(path)


def _verified(path: Path) -> Verdict:
    before, previous, number = GENESIS, GENESIS, 0
    for number, text in enumerate(_raw_lines(path), 1):
        sent = _parsed(text)
        expected = sent and _chained(previous, number, sent.time, sent.method, sent.payload)
        # Compared as text: also a byte that means nothing to JSON must be as it was written.
        if sent is None or sent != expected or _line(sent) != text + b"\n":
            return Verdict(number - 1, number, previous)
        before, previous = previous, sent.hash
    # The head is written after its line: in between, or after a kill in between, it is one line behind.
    whole = _read_head(path) in {before, previous}
    return Verdict(number, None if whole else number + 1, previous)


def _raw_lines(path: Path) -> Iterator[bytes]:
    with disk_errors(), ExitStack() as opened:
        for file in _opened(path, opened):
            yield from (line.removesuffix(b"\n") for line in file)


def _opened(path: Path, opened: ExitStack) -> list[BinaryIO]:
    """Open every file of the log, oldest first, none twice: while we look, the newest may get its number."""
    while True:
        full = _full_files(path)
        files: list[BinaryIO] = [opened.enter_context(file.open("rb")) for file in full]
        with suppress(FileNotFoundError):  # there is none; or it has just got its number, which shows below
            files.append(opened.enter_context(path.open("rb")))
        if _full_files(path) == full:
            return files
        opened.close()


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)


def _tail(file: int) -> tuple[list[bytes], bytes]:
    """Return up to two whole lines from the end of a file, and what is torn after them."""
    size = os.fstat(file).st_size
    whole, _, torn = os.pread(file, _TAIL_BYTES, max(0, size - _TAIL_BYTES)).rpartition(b"\n")
    return whole.split(b"\n")[-2:] if whole else [], torn


def _full_files(path: Path) -> list[Path]:
    """Return the full files, oldest first."""
    name = re.compile(rf"{re.escape(path.stem)}\.\d{{5}}{re.escape(path.suffix)}")
    return sorted(file for file in path.parent.glob(f"{path.stem}.*") if name.fullmatch(file.name))


def _chained(previous: str, sequence: int, time: str, method: str, payload: bytes) -> SentMessage:
    encoded = base64.b64encode(payload).decode("ascii")
    fields = json.dumps([previous, sequence, time, method, encoded]).encode()
    return SentMessage(sequence, time, method, payload, hashlib.sha256(fields).hexdigest())


def _line(sent: SentMessage) -> bytes:
    fields = {
        "sequence": sent.sequence,
        "time": sent.time,
        "method": sent.method,
        "payload": base64.b64encode(sent.payload).decode("ascii"),
        "hash": sent.hash,
    }
    return json.dumps(fields).encode() + b"\n"


def _parsed(text: bytes) -> SentMessage | None:
    try:
        fields = json.loads(text)
        payload = base64.b64decode(fields["payload"], validate=True)
        return SentMessage(fields["sequence"], fields["time"], fields["method"], payload, fields["hash"])
    except (ValueError, KeyError, TypeError, binascii.Error):
        return None


def _head_path(path: Path) -> Path:
    return path.with_suffix(".head")


def _read_head(path: Path) -> str:
    head = _head_path(path)
    return head.read_text(encoding="ascii") if head.exists() else GENESIS


def _changed() -> StorageError:
    return StorageError(
        "egress-log-changed", "The egress log is not as it was written; run medveil-agent egress verify."
    )
