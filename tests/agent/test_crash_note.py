"""A decoder that takes the whole process along ends a run, but no job: the next run names the file and goes on.

Real processes, real signals: `crashing_job.py` dies while it decodes the file that it is told.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.crash_note import DECODER_CRASH, CrashNote, crash_note
from medveil.agent.imageio import Item, raster_formats
from medveil.agent.ledger import Ledger
from medveil.agent.workspace import Workspace
from medveil.models.errors import ImageError

PROGRAM = Path(__file__).with_name("crashing_job.py")
FATAL = [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE]


@pytest.fixture
def job(folder_source: Path, tmp_path: Path) -> Callable[..., int]:
    """Run the job and return how it ended: 0, or the signal that it died of."""

    def go(dies_at: str = "", of: int = 0, *, when: str = "open", retry: bool = False) -> int:
        call = [
            sys.executable,
            str(PROGRAM),
            str(folder_source),
            str(tmp_path / "out"),
            dies_at,
            str(int(of)),
            when,
        ]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"}
        done = subprocess.run(
            [*call, *(["retry"] if retry else [])],
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=120,
            check=False,
        )
        return -done.returncode

    return go


def item_of(path: Path) -> Item:
    return raster_formats()[0].inspect(path, PurePosixPath(path.name))


@pytest.fixture
def left_out(tmp_path: Path) -> Callable[[], dict[str, str]]:
    """Return the reason of every image that is quarantined."""

    def look() -> dict[str, str]:
        with Ledger(tmp_path / "out.private/ledger.sqlite") as ledger:
            assert ledger.totals().images == 6
            return {file.relative.as_posix(): image.reason or "" for file, image in ledger.quarantined()}

    return look


@pytest.mark.parametrize("fatal", FATAL)
def test_a_file_whose_decoder_ends_the_process_is_left_out_of_the_next_run(fatal, job, left_out, tmp_path):
    assert job("1.png", fatal) == fatal
    assert job("1.png", fatal) == fatal  # there are two of this name; each ends one run
    assert job("1.png", fatal) == 0
    assert left_out() == {"normal/1.png": DECODER_CRASH, "pneumonia/1.png": DECODER_CRASH}
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.png")) == ["0.png", "0.png", "2.png", "2.png"]


@pytest.mark.parametrize("when", ["write", "read_back"])
def test_a_crash_over_the_copy_that_is_made_of_a_file_counts_as_well(when, job, left_out):
    assert job("normal/2.png", signal.SIGSEGV, when=when) == signal.SIGSEGV
    assert job() == 0
    assert left_out() == {"normal/2.png": DECODER_CRASH}


def test_no_file_is_suspected_for_a_kill(job, left_out):
    assert job("normal/1.png", signal.SIGKILL) == signal.SIGKILL
    assert job() == 0
    assert left_out() == {}


def test_no_file_is_suspected_for_a_crash_in_something_else(job, left_out):
    assert job("normal/1.png", signal.SIGSEGV, when="perturb") == signal.SIGSEGV
    assert job() == 0
    assert left_out() == {}


def test_a_file_that_was_exported_again_is_read_again(job, left_out, folder_source):
    assert job("normal/1.png", signal.SIGSEGV) == signal.SIGSEGV
    assert job("normal/1.png", signal.SIGSEGV) == 0
    assert left_out() == {"normal/1.png": DECODER_CRASH}
    again = np.random.default_rng(3).integers(30, 220, (9, 9), np.uint8)
    PillowImage.fromarray(again).save(folder_source / "normal/1.png")
    assert job() == 0
    assert left_out() == {}


def test_a_steward_can_ask_for_another_try(job, left_out):
    assert job("normal/1.png", signal.SIGSEGV) == signal.SIGSEGV
    assert job() == 0
    assert left_out() == {"normal/1.png": DECODER_CRASH}
    assert job(retry=True) == 0
    assert left_out() == {}


def test_what_a_run_notes_says_nothing_about_the_files(job, tmp_path):
    job("normal/1.png", signal.SIGSEGV)
    note = (tmp_path / "out.private/reading").read_bytes()
    assert len(note) > 64
    assert b"normal" not in note
    assert job() == 0
    assert (tmp_path / "out.private/reading").read_bytes() == b" " * 64


def test_an_image_is_tried_again_when_its_mask_was_exported_again(folder_source, tmp_path):
    """Decoding the mask may have been what went wrong, and the image's own file stays as it is then."""
    image, mask = (item_of(folder_source / f"normal/{number}.png") for number in (0, 1))
    workspace = Workspace(tmp_path / "out", tmp_path / "private")
    workspace.private.mkdir()

    def note(ledger: Ledger) -> AbstractContextManager[CrashNote]:
        return crash_note(workspace, ledger, lambda item: (item, mask))

    with Ledger(workspace.ledger_path) as ledger:
        with note(ledger) as first, first.reading(image):
            in_hand = workspace.crash_note.read_bytes()
        workspace.crash_note.write_bytes(in_hand + b"Fatal Python error: Segmentation fault")
        with (
            note(ledger) as second,
            pytest.raises(ImageError, match="export both again"),
            second.reading(image),
        ):
            pytest.fail("read again")
        mask.path.write_bytes(mask.path.read_bytes() + b"\0")
        with note(ledger) as third, third.reading(image):
            pass


def test_a_fault_handler_that_someone_else_set_stays(analytic, folder_source, tmp_path):
    """pytest's own tells where a test crashed; a job inside a test must not take it away."""
    import faulthandler

    assert faulthandler.is_enabled()
    analytic.protect(analytic.make_job(folder_source, tmp_path / "out", formats=raster_formats()))
    assert faulthandler.is_enabled()
