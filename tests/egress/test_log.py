from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medveil.agent.reporting_log import EgressLog, log_bytes, sent_messages, verify_log
from medveil.models.errors import BusyError, StorageError


def written(path: Path, count: int = 5) -> Path:
    with EgressLog(path) as log:
        for number in range(count):
            log.append("/medveil.v1.CampaignService/SendBeat", bytes([number]) * 20)
    return path


def files_of(path: Path) -> list[Path]:
    """Return the files of a log, the growing one last."""
    return [*sorted(path.parent.glob("egress.[0-9]*.jsonl")), path]


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
    with EgressLog(path, full_bytes=1500) as log:
        while True:
            log.append("/m", b"x" * 500)


def test_a_kill_at_any_moment_leaves_a_whole_log_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    context = multiprocessing.get_context("spawn")
    for round_ in range(2):
        child = context.Process(target=_write_for_ever, args=(path,))
        child.start()
        least = log_bytes(path)
        while log_bytes(path) < least + 6000:
            assert child.is_alive()
            assert verify_log(path).changed_line is None  # also while files change their names
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        child.close()
        with EgressLog(path) as log:
            log.append("/m", bytes([round_]))
        assert verify_log(path).changed_line is None
    numbers = [sent.sequence for sent in sent_messages(path)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(files_of(path)) > 3


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


def test_a_short_write_leaves_no_half_line_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "egress.jsonl", 1)
    whole = os.write
    with EgressLog(path) as log:
        with monkeypatch.context() as filling:
            filling.setattr(os, "write", lambda handle, line: whole(handle, line[:50]))
            with pytest.raises(StorageError) as refused:
                log.append("/m", b"x")
        log.append("/m", b"y")
    assert refused.value.code == "disk-full"
    assert [sent.payload for sent in sent_messages(path)] == [bytes(20), b"y"]
    assert verify_log(path).changed_line is None


# Files that are full
# ------------------------------------------------------------------------------------------------


def in_files(path: Path, count: int = 6, full_bytes: int = 400) -> Path:
    """Write a log of two lines to a file."""
    with EgressLog(path, full_bytes=full_bytes) as log:
        for number in range(count):
            log.append("/medveil.v1.CampaignService/SendBeat", bytes([number]) * 20)
    return path


def test_the_chain_goes_on_over_full_files(tmp_path: Path) -> None:
    path = in_files(tmp_path / "egress.jsonl")
    assert [len(file.read_bytes().splitlines()) for file in files_of(path)] == [2, 2, 2]
    assert [sent.payload for sent in sent_messages(path)] == [bytes([n]) * 20 for n in range(6)]
    assert [sent.sequence for sent in sent_messages(path)] == [1, 2, 3, 4, 5, 6]
    assert (verify_log(path).lines, verify_log(path).changed_line) == (6, None)
    assert log_bytes(path) == sum(file.stat().st_size for file in files_of(path))


def test_files_of_one_line_each_are_one_log(tmp_path: Path) -> None:
    path = in_files(tmp_path / "egress.jsonl", 3, full_bytes=1)
    in_files(path, 3, full_bytes=1)  # opened anew: the last line lies in a full file
    assert len(files_of(path)) == 6
    assert (verify_log(path).lines, verify_log(path).changed_line) == (6, None)


@pytest.mark.parametrize("begun", [False, True])
def test_a_kill_between_a_full_file_and_the_next_line_loses_nothing(tmp_path: Path, begun: bool) -> None:
    path = in_files(tmp_path / "egress.jsonl", 4)
    path.rename(path.with_name("egress.00002.jsonl"))
    if begun:
        path.touch()
    assert verify_log(path).changed_line is None
    in_files(path, 1)
    assert [sent.sequence for sent in sent_messages(path)] == [1, 2, 3, 4, 5]
    assert (verify_log(path).lines, verify_log(path).changed_line) == (5, None)


@pytest.mark.parametrize(("removed", "first_missing"), [(0, 1), (1, 3), (2, 5)])
def test_a_removed_file_is_named_by_its_first_line(tmp_path: Path, removed: int, first_missing: int) -> None:
    path = in_files(tmp_path / "egress.jsonl")
    files_of(path)[removed].unlink()
    assert verify_log(path).changed_line == first_missing


def test_a_changed_byte_in_a_full_file_is_found(tmp_path: Path) -> None:
    path = in_files(tmp_path / "egress.jsonl")
    second = files_of(path)[1]
    second.write_bytes(second.read_bytes().replace(b"SendBeat", b"SendBeet", 1))
    assert verify_log(path).changed_line == 3


def test_a_number_is_never_given_twice(tmp_path: Path) -> None:
    path = in_files(tmp_path / "egress.jsonl")
    kept = (path.parent / "egress.00002.jsonl").read_bytes()
    (path.parent / "egress.00001.jsonl").unlink()
    in_files(path, 4)
    assert (path.parent / "egress.00002.jsonl").read_bytes() == kept
    assert [file.name for file in files_of(path)] == [
        "egress.00002.jsonl", "egress.00003.jsonl", "egress.00004.jsonl", "egress.jsonl",
    ]  # fmt: skip
