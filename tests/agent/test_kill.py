"""A real process, killed without warning again and again, ends with the same release as one that was left alone."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.ledger import Ledger

PROGRAM = Path(__file__).with_name("analytic_job.py")
ENOUGH_KILLS = 5
DELAY_S = 0.02
"""The surrogate answers this late, so that there is a time to kill in."""


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(source), str(out), str(DELAY_S)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def log_length(out: Path) -> int:
    """Return how many lines the job's audit log has, as an onlooker sees it."""
    path = out.with_name(out.name + ".private") / "ledger.sqlite"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
            return int(ledger.execute("SELECT COUNT(*) FROM images WHERE state != 'found'").fetchone()[0])
    except sqlite3.Error:
        return -1


@pytest.fixture(params=["folder", "npz"])
def source(request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator) -> Path:
    """Images of many sizes, so that there are many batches; or one NPZ of several batches."""
    if request.param == "npz":
        images = rng.integers(30, 220, (520, 8, 8), np.uint8)
        np.savez_compressed(tmp_path / "s.npz", a_images=images, a_labels=rng.integers(0, 2, 520, np.uint8))
        return tmp_path / "s.npz"
    root = tmp_path / "source"
    for i in range(32):
        path = root / ("normal" if i % 2 else "pneumonia") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 8 + i // 4
        PillowImage.fromarray(rng.integers(30, 220, (side, side), np.uint8)).save(path)
    return root


def test_killed_at_any_moment_a_rerun_continues_repeats_nothing_and_loses_nothing(source, tmp_path, rng):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(source, whole).wait(60) == 0

    kills = 0
    seen = -1
    for _ in range(ENOUGH_KILLS):
        process = start(source, out)
        # Wait for progress beyond the last kill, then strike after a random moment.
        while process.poll() is None and log_length(out) <= seen:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.15)))
        process.send_signal(signal.SIGKILL)
        if process.wait(60) == 0:
            break
        kills += 1
        seen = log_length(out)
        finished = {name for name in tree(out) if ".medveil-part-" not in name}
        assert all(tree(out)[name] == tree(whole)[name] for name in finished)

    assert kills >= 3
    assert start(source, out).wait(60) == 0
    assert tree(out) == tree(whole)
    with Ledger(tmp_path / "out.private/ledger.sqlite") as ledger:
        assert ledger.first_changed_line() is None
        verified = Counter(line.subject for line in ledger.log_lines() if line.event == "verified")
        assert set(verified.values()) == {1}
        assert ledger.totals().verified == sum(verified.values()) == ledger.totals().images
    leftovers = [
        p.name for p in (tmp_path / "out.private").rglob("*") if "part" in p.name or "frames" in p.name
    ]
    assert leftovers == []
