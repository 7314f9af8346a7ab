"""Where CI requires the PACS tests, they may not skip: a skipped test is no passed test."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest


@pytest.mark.skipif("MEDVEIL_REQUIRE_PACS" not in os.environ, reason="MEDVEIL_REQUIRE_PACS is not set")
@pytest.mark.parametrize("module", ["pynetdicom", "httpx"])
def test_ci_has_the_libraries_of_the_pacs_door(module: str) -> None:
    assert importlib.util.find_spec(module) is not None, "install the extra [dicom-net]"


@pytest.mark.skipif("MEDVEIL_REQUIRE_PACS" not in os.environ, reason="MEDVEIL_REQUIRE_PACS is not set")
def test_ci_has_a_pacs(shared_orthanc: Any) -> None:
    assert shared_orthanc.process.poll() is None
