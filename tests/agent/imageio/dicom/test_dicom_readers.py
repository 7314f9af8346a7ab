"""Other people's programs read what we write: the intended integers, and no attribute that a validator objects to."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medveil.agent.imageio.dicom_header import quiet

FILES = [
    "dicom_pydicom_data/693_J2KR.dcm",  # CT, J2K, signed
    "dicom_pydicom_data/JLSL_16_15_1_1F.dcm",  # JPEG-LS, signed with an unused bit
    "dicom_pydicom_data/MR-SIEMENS-DICOM-WithOverlays.dcm",
    "dicom_pydicom_data/OBXXXX1A_rle.dcm",  # US, palette, RLE
    "dicom_pydicom_data/US1_J2KR.dcm",  # US, J2K colour
    "dicom_pydicom_data/RG3_J2KR.dcm",  # CR, MONOCHROME1
    "dicom_pydicom_data/JPEG-LL.dcm",  # NM, JPEG Lossless
    "dicom_pydicom_data/SC_rgb_expb.dcm",  # big endian
    "dicom_pydicom_data/gdcm-US-ALOKA-16.dcm",  # implicit, 16-bit palette
    "dicom_pydicom_data/eCT_Supplemental.dcm",  # Enhanced CT
    "dicom_pydicom_data/color-pl.dcm",  # planes; its UIDs are invalid
    "dicom_highdicom/dx_image.dcm",
    "dicom_highdicom/sm_image.dcm",
    "dicom_mr_series/11-T1post-18670/000000.dcm",
]

Protect = Callable[..., tuple[list[np.ndarray], Path]]


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed (Debian package {package})"
        if os.environ.get("MEDVEIL_REQUIRE_VALIDATORS"):
            pytest.fail(f"{reason}, and this run requires it")
        pytest.skip(reason)
    return found


def errors_of(validator: str, path: Path) -> set[str]:
    run = subprocess.run(
        [validator, "-new", path], capture_output=True, text=True, errors="replace", check=False
    )
    return {line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error")}


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_the_validator_finds_no_error_that_the_source_has_not(
    shared_data: Path, protect: Protect, name: str
) -> None:
    validator = tool("dciodvfy", "dicom3tools")
    source = shared_data / name
    _, target = protect(source)
    assert errors_of(validator, target) - errors_of(validator, source) == set()


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_gdcm_reads_the_intended_integers(
    shared_data: Path, protect: Protect, tmp_path: Path, name: str
) -> None:
    converter = tool("gdcmconv", "libgdcm-tools")
    meant, target = protect(shared_data / name)
    raw = tmp_path / "raw.dcm"
    subprocess.run([converter, "--raw", target, raw], check=True, capture_output=True)
    with quiet():
        found: Any = pydicom.dcmread(raw).pixel_array
    assert np.array_equal(found.reshape(np.stack(meant).shape), np.stack(meant))


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_dcmtk_reads_the_file(shared_data: Path, protect: Protect, name: str) -> None:
    dump = tool("dcmdump", "dcmtk")
    _, target = protect(shared_data / name)
    subprocess.run([dump, "+L", "-q", target], check=True, capture_output=True)
