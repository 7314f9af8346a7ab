"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ["COLUMNS"] = "200"  # tables as on a wide terminal, whatever runs the tests

_REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real medical images beside the checkout; skips without it, fails where CI requires it.

    ``MEDVEIL_SHARED_DATA`` names another folder; ``MEDVEIL_REQUIRE_DATA=1`` turns the skip into a failure.
    """
    folder = Path(os.environ.get("MEDVEIL_SHARED_DATA", _REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        reason = "the shared medical images are not beside this checkout (set MEDVEIL_SHARED_DATA)"
        if os.environ.get("MEDVEIL_REQUIRE_DATA"):
            pytest.fail(f"{reason}, and this run requires them")
        pytest.skip(reason)
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed: a test that needs luck is not a test."""
    return np.random.default_rng(20261121)
