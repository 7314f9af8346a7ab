"""Files are there whole or not at all, one process holds a lock, and a full disk is called a full disk."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from medveil.models import disk
from medveil.models.errors import BusyError, StorageError

OLD, NEW = b"old", b"new"


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_file_that_cannot_be_written_keeps_its_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = tmp_path / "file"
    disk.write_atomically(target, OLD)
    with monkeypatch.context() as broken:
        broken.setattr(moment, _full)
        with pytest.raises(StorageError) as caught:
            disk.write_atomically(target, NEW)
    assert caught.value.code == "disk-full"
    assert target.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [target]


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    disk.write_atomically(target, NEW)
    assert target.read_bytes() == NEW


def test_a_new_file_never_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "key"
    disk.write_new(target, OLD, mode=0o600)
    with pytest.raises(FileExistsError):
        disk.write_new(target, NEW, mode=0o600)
    assert target.read_bytes() == OLD
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_new_file_that_cannot_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", _full)
    with pytest.raises(OSError, match="No space"):
        disk.write_new(tmp_path / "key", NEW, mode=0o600)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_once_and_given_back(tmp_path: Path) -> None:
    busy = BusyError("busy", "Wait.")
    path = tmp_path / "lock"
    with disk.locked(path, busy):
        with pytest.raises(BusyError) as caught, disk.locked(path, busy):
            pass
        assert caught.value is busy
    with disk.locked(path, busy):
        pass


def _no_database(path: Path) -> None:
    path.write_bytes(b"not a database, and longer than the header of one is" * 4)
    sqlite3.connect(path).execute("SELECT * FROM t")


def _no_page_left(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute("PRAGMA max_page_count = 3")
        database.execute("INSERT INTO t VALUES (zeroblob(100000))")


def _read_only(path: Path) -> None:
    sqlite3.connect(path).execute("CREATE TABLE t (x)")
    sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True).execute("DROP TABLE t")


def _no_folder(path: Path) -> None:
    sqlite3.connect(path / "missing" / "file")


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (_no_database, "damaged"),
        (_no_page_left, "disk-full"),
        (_read_only, "not-writable"),
        (_no_folder, "not-writable"),
        (_full, "disk-full"),
    ],
)
def test_a_database_fails_with_the_reason(tmp_path: Path, failure: Callable[[Path], None], code: str) -> None:
    with pytest.raises(StorageError) as caught, disk.database_errors("damaged", "Restore a backup."):
        failure(tmp_path / "file.sqlite")
    assert caught.value.code == code
