"""Tiny sources, and jobs on an analytic surrogate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image as PillowImage

# A loaded machine is slow, not wrong: time limits belong to pytest-timeout.
settings.register_profile("medveil", deadline=None)
settings.load_profile("medveil")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site's own folder: never the developer's."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MEDVEIL_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def analytic() -> ModuleType:
    """The module `analytic_job.py` beside this file."""
    path = Path(__file__).with_name("analytic_job.py")
    spec = importlib.util.spec_from_file_location("analytic_job", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def picture(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Draw a picture with room on both sides of every value."""

    def draw(*shape: int, dtype: str = "uint8", maximum: int | None = None) -> np.ndarray:
        top = maximum or np.iinfo(dtype).max
        return rng.integers(top // 8, top - top // 8, shape or (8, 8), dtype)

    return draw


@pytest.fixture
def folder_source(tmp_path: Path, picture: Callable[..., np.ndarray]) -> Path:
    """Six 8x8 grey PNGs in two class folders."""
    root = tmp_path / "source"
    for name in ("normal", "pneumonia"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            PillowImage.fromarray(picture()).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def npz_source(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A MedMNIST-layout NPZ of three splits, 40 images of 8x8."""
    path = tmp_path / "set.npz"
    arrays = {}
    for split, rows in (("train", 24), ("val", 6), ("test", 10)):
        arrays[f"{split}_images"] = rng.integers(30, 220, (rows, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (rows, 1), np.uint8)
    np.savez_compressed(path, **arrays)
    return path
