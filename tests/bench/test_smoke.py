"""The benchmarks run from end to end on a handful of drawn images; their figures are nobody's business here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = [pytest.mark.train, pytest.mark.slow]

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MedMNIST-layout NPZ: a bright square in the upper or lower half, which is its class."""
    rng = np.random.default_rng(20261121)
    arrays = {}
    for split, count in (("train", 150), ("test", 40)):
        labels = (np.arange(count) % 2).astype(np.uint8)
        images = rng.integers(20, 60, (count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = rng.integers(0, 8) + 14 * int(label), rng.integers(0, 22)
            image[row : row + 6, column : column + 6] = 200
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None]}
    file = tmp_path_factory.mktemp("data") / "squares.npz"
    np.savez(file, **arrays)
    return file


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("methods", {"methods", "masks"}),
        ("generator", {"runs"}),
        ("attempts", {"runs", "white_box", "linear"}),
    ],
    ids=["methods", "generator", "attempts"],
)
def test_a_quick_run_leaves_its_table_in_its_own_folder(
    data: Path, tmp_path: Path, name: str, parts: set[str]
) -> None:
    results = BENCH / "results" / f"{name}.json"
    before = results.read_bytes() if results.exists() else None
    command = [sys.executable, str(BENCH / f"{name}.py"), "--quick", "--seeds", "0"]
    subprocess.run(
        [*command, "--data", str(data), "--work", str(tmp_path)],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    figures = json.loads((tmp_path / f"{name}.json").read_text())
    assert parts <= figures.keys()
    assert (tmp_path / f"{name}.md").read_text().count("|---") >= 2
    assert (results.read_bytes() if results.exists() else None) == before, "a smoke run is no result"
