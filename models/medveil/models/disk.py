"""Files that appear whole or not at all, locks, and disks that are full or read-only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from medveil.models.errors import BusyError, ImageError, MedveilError, StorageError

__all__ = [
    "DAMAGE",
    "PART_PREFIX",
    "changed_ns",
    "check_free",
    "database_errors",
    "decode_error",
    "disk_errors",
    "file_sha256",
    "fill_and_publish",
    "lock_file",
    "locked",
    "make_private_folder",
    "part_beside",
    "publish",
    "replace_file",
    "storage_error",
    "sync",
    "take_lock",
    "write_atomically",
    "write_new",
]

PART_PREFIX: Final = ".medveil-part-"
"""Start of the name of a file that is not finished yet; what a killed run left behind is removed by the
next."""

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY: Final = (errno.EROFS, errno.EACCES, errno.EPERM)
_SQLITE_FULL: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_SQLITE_READ_ONLY: Final = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_SQLITE_PRIMARY: Final = 0xFF  # of an extended result code
_READ_BYTES: Final = 2**20
_PART_DIGITS: Final = 16  # of the name's SHA-256: distinct within a folder, and short


def storage_error(exc: OSError) -> StorageError | None:
    """Return what to tell the steward if ``exc`` means that the disk takes no more, else None."""
    if exc.errno in _FULL:
        return _full(exc)
    if exc.errno in _READ_ONLY:
        return StorageError(
            "not-writable",
            "The output folder cannot be written to; check its permissions or choose another folder.",
            private=str(exc),
        )
    return None


def _full(exc: Exception) -> StorageError:
    return StorageError(
        "disk-full",
        "The disk is full. Nothing is lost: free some space and run the same command again.",
        private=str(exc),
    )


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn any failure to write inside the block into a `StorageError`."""
    try:
        yield
    except OSError as exc:
        raise storage_error(exc) or StorageError(
            "disk-failed", "A file could not be written; check the disk and try again.", private=str(exc)
        ) from exc


DAMAGE: Final = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow, tifffile, imagecodecs and zipfile raise on damaged bytes, as found by damaging files at random;
`zipfile.BadZipFile` and Pillow's `DecompressionBombError` share no root with these."""


def decode_error(exc: Exception, code: str, public: str) -> MedveilError:
    """Return the error for a failed read: a full disk stays one, anything else is the image's fault."""
    full = storage_error(exc) if isinstance(exc, OSError) and exc.errno in (*_FULL, errno.EROFS) else None
    return full or ImageError(code, public, private=f"{type(exc).__name__}: {exc}")


def changed_ns(path: Path) -> int:
    """Return a file's time of last change; 0 if it is gone (reading it will say so)."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def part_beside(target: Path) -> Path:
    """Return the temporary name of a file that is being written: same folder, same suffix, never too long."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:_PART_DIGITS]
    return target.with_name(f"{PART_PREFIX}{digest}{target.suffix[:_PART_DIGITS]}")


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(part: Path, target: Path) -> None:
    """Give a finished and synced file its final name, in one step."""
    part.replace(target)
    sync(target.parent)


def write_atomically(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a small file: temporary name, sync, rename.

    Raises:
        StorageError: the disk takes no more; no trace is left.
    """
    with disk_errors():
        replace_file(target, data, mode=mode)


def replace_file(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Do as `write_atomically`, for callers with words of their own for a failure.

    Raises:
        OSError: the disk takes no more; no trace is left.
    """
    part = part_beside(target)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    fill_and_publish(handle, part, target, data)


def write_new(target: Path, data: bytes, *, mode: int) -> None:
    """Write a file that must not exist yet: of two processes that start at once, one wins.

    Raises:
        FileExistsError: there is a file of this name.
        OSError: the disk takes no more; no trace is left.
    """
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    fill_and_publish(handle, target, target, data)


def fill_and_publish(handle: int, part: Path, target: Path, data: bytes) -> None:
    """Write ``data`` through an open file, sync it, and give it its final name; on any failure it goes away.

    Args:
        handle: of ``part``, open for writing; closed here.
        part: temporary name beside the target.
        target: final name.
        data: everything the file will hold.
    """
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(part, target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path, busy: BusyError) -> Iterator[None]:
    """Hold a lock file for as long as the block runs; the system lets go when the process ends, however it ends.

    Args:
        path: of the lock file; made if it isn't there.
        busy: what to raise where another process holds it.

    Raises:
        BusyError: ``busy``.
        StorageError: the file cannot be made.
    """
    handle = take_lock(path, busy)
    try:
        yield
    finally:
        os.close(handle)


def take_lock(path: Path, busy: BusyError) -> int:
    """Do as `locked`, for who holds it longer than a block.

    Returns:
        The handle that holds it; closing it lets go.
    """
    with disk_errors():
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock_file(handle, busy)
    except BusyError:
        os.close(handle)
        raise
    return handle


def lock_file(handle: int, busy: BusyError) -> None:
    """Hold an open file for this process until it is closed.

    Raises:
        BusyError: ``busy``: another process holds it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        raise busy from exc


@contextmanager
def database_errors(code: str, public: str) -> Iterator[None]:
    """Turn any failure of a SQLite file inside the block into a `StorageError`.

    Args:
        code: of a file that is damaged; a disk that is full or read-only keeps its own code.
        public: what to do about a damaged one.
    """
    try:
        yield
    except sqlite3.Error as exc:
        primary = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _SQLITE_PRIMARY
        if primary in _SQLITE_FULL:
            raise _full(exc) from exc
        if primary in _SQLITE_READ_ONLY:
            raise StorageError(
                "not-writable",
                "The folder of medveil's records cannot be written to; check its permissions.",
                private=str(exc),
            ) from exc
        raise StorageError(code, public, private=str(exc)) from exc
    except OSError as exc:
        raise storage_error(exc) or StorageError(code, public, private=str(exc)) from exc


def make_private_folder(path: Path) -> None:
    """Create a folder that only its owner may open (0700), or take away others' access to an existing one.

    Raises:
        StorageError: it cannot be created.
    """
    with disk_errors():
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)


def check_free(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        StorageError: ``disk-full``, with what is needed and what is there.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise StorageError(
            "disk-full",
            f"This needs about {needed_bytes / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB left; "
            "free some space or choose another output folder.",
        )
