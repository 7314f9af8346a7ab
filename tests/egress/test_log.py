from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medveil.agent.reporting_log import EgressLog, sent_messages, verify_log
from medveil.models.errors import BusyError, StorageError


def written(path: Path, count: int = 5) -> Path:
    with EgressLog(path) as log:
        for number in range(count):
            log.append("/medveil.v1.CampaignService/SendBeat", bytes([number]) * 20)
    return path


def test_what_was_appended_is_read_back_byte_for_byte(tmp_path: Path) -> None:
    path = written(tmp_path / "egress.jsonl")
    assert [m.payload for m in sent_messages(path)] == [bytes([n]) * 20 for n in range(5)]
    assert verify_log(path).changed_line is None
    assert verify_log(path).lines == 5


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found_in_its_line(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "egress.jsonl"
    for old in (path, path.with_suffix(".head")):
        old.unlink(missing_ok=True)
    content = bytearray(written(path).read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    if content[where] == 0x0A:
        return  # joins two lines: covered by the removal of lines
    value = data.draw(st.integers(0, 255).filter(lambda v: v not in (content[where], 0x0A)))
    line = content[:where].count(b"\n") + 1
    content[where] = value
    path.write_bytes(content)
    assert verify_log(path).changed_line == line


@pytest.mark.parametrize("removed", range(5))
def test_a_removed_line_is_named(tmp_path: Path, removed: int) -> None:
    path = written(tmp_path / "egress.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:removed] + lines[removed + 1 :]))
    assert verify_log(path).changed_line == removed + 1


def test_nothing_is_added_to_a_log_whose_end_was_changed(tmp_path: Path) -> None:
    path = written(tmp_path / "egress.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(StorageError) as refused:
        EgressLog(path)
    assert refused.value.code == "egress-log-changed"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    with EgressLog(path), pytest.raises(BusyError):
        EgressLog(path)
    written(path)  # the lock is gone with its holder, no stale file blocks


def _write_for_ever(path: Path) -> None:
    with EgressLog(path) as log:
        while True:
            log.append("/m", b"x" * 500)


def test_a_kill_at_any_moment_leaves_a_whole_log_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    context = multiprocessing.get_context("spawn")
    for round_ in range(2):
        child = context.Process(target=_write_for_ever, args=(path,))
        child.start()
        least = 0 if not path.exists() else path.stat().st_size
        while not path.exists() or path.stat().st_size < least + 3000:
            assert child.is_alive()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        child.close()
        with EgressLog(path) as log:
            log.append("/m", bytes([round_]))
        assert verify_log(path).changed_line is None


@pytest.mark.parametrize("kept_bytes", [1, 40, -1])
def test_a_torn_last_line_was_never_sent_and_is_dropped(tmp_path: Path, kept_bytes: int) -> None:
    path = written(tmp_path / "egress.jsonl")
    line = path.read_bytes().splitlines(keepends=True)[0]
    with path.open("ab") as file:
        file.write(line[:kept_bytes])
    with EgressLog(path) as log:
        log.append("/m", b"next")
    assert verify_log(path).changed_line is None
    assert verify_log(path).lines == 6


def test_a_line_whose_head_was_not_written_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "egress.jsonl", 1)
    head = path.with_suffix(".head").read_bytes()
    written(path, 1)
    path.with_suffix(".head").write_bytes(head)
    assert written(path, 1)
    assert verify_log(path).lines == 3
    assert verify_log(path).changed_line is None


def test_a_full_disk_means_that_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "egress.jsonl"
    with EgressLog(path) as log:

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StorageError) as refused:
            log.append("/m", b"x")
    assert refused.value.code == "disk-full"
