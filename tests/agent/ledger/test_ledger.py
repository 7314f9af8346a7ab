"""The ledger: durable states, one way only, and an audit log in which no line can be changed unnoticed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medveil.agent.ledger import (
    FINAL_STATES,
    FileEntry,
    FileState,
    ImageState,
    Ledger,
    Receipt,
    first_changed_line,
)
from medveil.agent.ledger.chain import GENESIS, LogLine, chained
from medveil.agent.ledger.states import allowed
from medveil.models.errors import BusyError, ConfigurationError, StorageError

RECEIPT = Receipt("ab" * 32, 1, 36.5, 8.0, 0.3)


def entry(name: str = "a/1.png", frames: int = 1, mtime_ns: int = 5, target: str | None = None) -> FileEntry:
    return FileEntry(PurePosixPath(name), PurePosixPath(target or name), "png", frames, 100, mtime_ns)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite", now=lambda: datetime(2026, 1, 1, tzinfo=UTC)) as opened:
        yield opened


def verified(ledger: Ledger, file: int = 1, frame: int = 0) -> None:
    with ledger.transaction():
        ledger.mark_read(file, frame, RECEIPT.digest, 1)
        ledger.mark_protected(file, frame, RECEIPT, None)
        ledger.mark_verified(file, frame, "x")


def test_an_image_is_only_verified_after_it_was_protected():
    before = {state for state in ImageState if allowed(state, ImageState.VERIFIED)}
    assert before == {ImageState.PROTECTED}


def test_from_a_final_state_the_only_way_is_back_to_the_start_or_into_quarantine():
    for state in FINAL_STATES:
        following = {other for other in ImageState if allowed(state, other)}
        assert following <= {ImageState.FOUND, ImageState.QUARANTINED}


def test_every_state_can_be_reached_from_the_first():
    reached, frontier = {ImageState.FOUND}, [ImageState.FOUND]
    while frontier:
        state = frontier.pop()
        new = {other for other in ImageState if allowed(state, other)} - reached
        reached |= new
        frontier += new
    assert reached == set(ImageState)


def test_what_was_committed_is_there_after_reopening(tmp_path, ledger):
    with ledger.transaction():
        ledger.register(entry())
    verified(ledger)
    ledger.close()
    with Ledger(tmp_path / "ledger.sqlite") as again:
        (image,) = again.images(1)
        assert image.state is ImageState.VERIFIED
        assert image.receipt == RECEIPT


def _read_and_verify_too_early(ledger: Ledger) -> None:
    with ledger.transaction():
        ledger.mark_read(1, 0, "00", 0)
        ledger.mark_verified(1, 0, "x")


def test_a_transaction_that_fails_leaves_no_trace(ledger):
    with ledger.transaction():
        ledger.register(entry())
    with pytest.raises(ValueError, match="cannot go"):
        _read_and_verify_too_early(ledger)
    assert ledger.images(1)[0].state is ImageState.FOUND


def test_a_forbidden_transition_is_a_bug_and_raises(ledger):
    with ledger.transaction():
        ledger.register(entry())
    with pytest.raises(ValueError, match="cannot go"), ledger.transaction():
        ledger.mark_verified(1, 0, "x")


def test_an_unchanged_file_keeps_its_state_and_a_changed_one_starts_over(ledger):
    with ledger.transaction():
        ledger.register(entry())
    verified(ledger)
    with ledger.transaction():
        ledger.register(entry())
    assert ledger.images(1)[0].state is ImageState.VERIFIED
    with ledger.transaction():
        ledger.register(entry(mtime_ns=6))
    assert ledger.images(1)[0].state is ImageState.FOUND


def test_a_released_file_that_gets_another_target_names_the_old_one(ledger):
    with ledger.transaction():
        ledger.register(entry())
        ledger.mark_writing([1])
        moved = ledger.register(entry(target="a/1.png.png"))
    assert moved == PurePosixPath("a/1.png")


def test_only_files_that_were_being_written_are_ours(ledger):
    with ledger.transaction():
        ledger.register(entry("a.png"))
        ledger.register(entry("b.png"))
        ledger.mark_writing([2])
    assert ledger.own_targets() == {"b.png"}


def test_files_that_left_the_source_are_forgotten_unless_released(ledger):
    with ledger.transaction():
        for name in ("a.png", "b.png", "c.png"):
            ledger.register(entry(name))
        ledger.mark_writing([2, 3])
        ledger.finish_file(2, output_sha256="00", clean_sha256="00")
        leftovers = ledger.forget_missing([])
    assert [str(file.relative) for file in ledger.files()] == ["b.png"]
    assert leftovers == [PurePosixPath("c.png")]


def test_a_quarantined_file_counts_as_one_image_with_its_reason(ledger):
    with ledger.transaction():
        for _ in range(2):
            ledger.register_quarantined(PurePosixPath("x.txt"), "not-an-image", "Remove it.")
    totals = ledger.totals()
    assert (totals.images, totals.quarantined) == (1, {"not-an-image": 1})


def test_a_repaired_file_leaves_quarantine(ledger):
    with ledger.transaction():
        ledger.register_quarantined(PurePosixPath("a/1.png"), "truncated", "Copy it again.")
        ledger.register(entry())
    assert ledger.totals().quarantined == {}
    assert ledger.files()[0].state is FileState.FOUND


def test_totals_over_verified_images(ledger):
    with ledger.transaction():
        for i in range(3):
            ledger.register(entry(f"{i}.png"))
    for i, psnr in enumerate((30.0, 50.0, 40.0)):
        with ledger.transaction():
            ledger.mark_read(i + 1, 0, "00", 0)
            ledger.mark_protected(i + 1, 0, Receipt("00", 0, psnr, 7.0 + i / 2, 0.1 * i, i == 1), None)
            ledger.mark_verified(i + 1, 0, "x")
    totals = ledger.totals()
    assert (totals.psnr_db_median, totals.psnr_db_min, totals.epsilon_max) == (40.0, 30.0, 8.0)
    assert totals.changed_mean == pytest.approx(0.1)
    assert totals.guessed_windows == 1
    assert [ledger.images(i + 1)[0].receipt.guessed_window for i in range(3)] == [False, True, False]
    assert totals.unfinished == 0


def test_a_ledger_from_before_windows_were_noted_still_opens(tmp_path):
    path = tmp_path / "old.sqlite"
    with Ledger(path) as ledger:
        with ledger.transaction():
            ledger.register(entry())
        verified(ledger)
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE images DROP COLUMN guessed_window")
    database.close()
    with Ledger(path) as ledger:
        assert ledger.totals().guessed_windows == 0
        assert ledger.images(1)[0].receipt == RECEIPT


def test_a_job_does_not_go_on_under_other_settings(ledger):
    ledger.bind("aa", {"epsilon": 8})
    ledger.bind("aa", {"epsilon": 8})
    with pytest.raises(ConfigurationError) as caught:
        ledger.bind("bb", {"epsilon": 4})
    assert caught.value.code == "settings-changed"


def test_what_is_no_ledger_is_a_storage_error(tmp_path):
    (tmp_path / "bad.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(StorageError) as caught:
        Ledger(tmp_path / "bad.sqlite")
    assert caught.value.code == "ledger-damaged"


def test_the_ledger_is_for_its_owner_only(tmp_path, ledger):
    assert (tmp_path / "ledger.sqlite").stat().st_mode & 0o077 == 0


def lines(count: int) -> list[LogLine]:
    found: list[LogLine] = []
    for i in range(count):
        previous = found[-1].hash if found else GENESIS
        found.append(chained(previous, i + 1, f"t{i}", "verified", f"s{i}", ""))
    return found


@given(st.integers(1, 6), st.data())
def test_the_first_changed_line_is_named(count, data):
    log = lines(count)
    head = log[-1].hash
    assert first_changed_line(log, head) is None
    at = data.draw(st.integers(0, count - 1))
    field = data.draw(st.sampled_from(["time", "event", "subject", "detail"]))
    values = {name: getattr(log[at], name) for name in LogLine.__slots__}
    log[at] = LogLine(**{**values, field: "changed"})
    assert first_changed_line(log, head) == at + 1


def test_lines_that_were_cut_off_or_taken_out_are_noticed():
    log = lines(4)
    head = log[-1].hash
    assert first_changed_line(log[:-1], head) == 4
    assert first_changed_line(log[:1] + log[2:], head) == 2
    assert first_changed_line([], head) == 1


def test_a_line_changed_behind_the_ledgers_back_is_named(tmp_path, ledger):
    with ledger.transaction():
        for i in range(3):
            ledger.log("verified", f"image {i}", "")
    assert ledger.first_changed_line() is None
    with sqlite3.connect(tmp_path / "ledger.sqlite") as other:
        other.execute("UPDATE log SET subject = 'another' WHERE sequence = 2")
    other.close()
    assert ledger.first_changed_line() == 2


def test_a_job_begins_once(ledger):
    moment, later = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    assert ledger.begun() is None
    ledger.begin(moment)
    ledger.begin(moment)
    assert ledger.begun() == moment
    with pytest.raises(BusyError):
        ledger.begin(later)
