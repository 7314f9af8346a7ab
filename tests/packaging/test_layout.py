"""The layout that imports and installation rest on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SITE_MODULES = (
    "medveil.agent.cli",
    "medveil.models.autodiff",
    "medveil.models.bundle",
    "medveil.models.cli",
    "medveil.models.methods",
    "medveil.models.quality",
)


def test_no_source_root_makes_medveil_a_regular_package() -> None:
    """One ``medveil/__init__.py`` and the other source roots would vanish from the namespace."""
    assert not list(REPOSITORY.glob("*/medveil/__init__.py"))


@pytest.mark.parametrize("module", SITE_MODULES)
def test_the_site_side_never_loads_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif("MEDVEIL_EXPECT_NO_TORCH" not in os.environ, reason="only in the site environment")
def test_the_site_environment_has_no_torch() -> None:
    assert importlib.util.find_spec("torch") is None
