"""Other people's programs read what we write: the intended integers, and no attribute that a validator objects to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 (its own convention)
from pydicom import uid as uids
from pydicom.dataset import Dataset

from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_header import quiet
from medveil.agent.imageio.dicom_survey import sign_noise
from medveil.models.errors import ImageError

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
    "dicom_pydicom_data/emri_small.dcm",  # Enhanced MR that an anonymiser robbed of its functional groups
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


FORBIDDEN = re.compile(
    r"Error - </(\w+)\(\w+,\w+\)> - Attribute present when condition unsatisfied"
    r" \(which may not be present otherwise\) for Type 1C Conditional"
    r" - Module=<(?:MRPulseSequence|BulkMotionSynchronization)>"
)

OTHERWISE_PRESENT = frozenset(
    {
        "BulkMotionCompensationTechnique",
        "EchoPlanarPulseSequence",
        "EchoPulseSequence",
        "GeometryOfKSpaceTraversal",
        "MRAcquisitionType",
        "MultiPlanarExcitation",
        "NumberOfKSpaceTrajectories",
        "OversamplingPhase",
        "PhaseContrast",
        "PulseSequenceName",
        "SaturationRecovery",
        "SegmentedKSpaceTraversal",
        "SpectrallySelectedSuppression",
        "SteadyStatePulseSequence",
        "TimeOfFlightContrast",
    }
)
"""How an Enhanced MR image was acquired. Each is required where Image Type says ORIGINAL or MIXED and "may be present
otherwise" (PS3.3 2024e, tables C.8-87 and C.7.6.18-3); dciodvfy of 2022 has the condition and not the second half."""

PRESENT_IF_DERIVED = {
    "CoverageOfKSpace": ("MRAcquisitionType", "3D"),
    "RectilinearPhaseEncodeReordering": ("GeometryOfKSpaceTraversal", "RECTILINEAR"),
}
"""Of the same table, what a DERIVED image may hold only where another attribute has this value."""

DICOM_FOLDERS = ("dicom_highdicom", "dicom_mr_series", "dicom_pydicom_data")


def is_false_alarm(line: str, dataset: Dataset) -> bool:
    """Return whether the standard allows, in this object, what the validator objects to."""
    if (found := FORBIDDEN.fullmatch(line)) is None:
        return False
    keyword = found[1]
    if keyword in PRESENT_IF_DERIVED:
        other, value = PRESENT_IF_DERIVED[keyword]
        return bool(dataset.ImageType[0] == "DERIVED" and dataset.get(other) == value)
    return keyword in OTHERWISE_PRESENT


def said_of(validator: str, path: Path) -> set[str]:
    run = subprocess.run(
        [validator, "-new", path], capture_output=True, text=True, errors="replace", check=False
    )
    return set((run.stdout + run.stderr).splitlines())


def errors_of(validator: str, path: Path) -> set[str]:
    with quiet():
        dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        lines = [line for line in said_of(validator, path) if line.startswith("Error")]
        return {line for line in lines if not is_false_alarm(line, dataset)}


@pytest.mark.parametrize(
    ("attributes", "forgiven"),
    [
        ({"ImageType": ["DERIVED", "PRIMARY"], "MRAcquisitionType": "3D"}, True),
        ({"ImageType": ["DERIVED", "PRIMARY"], "MRAcquisitionType": "2D"}, False),
        ({"ImageType": ["ORIGINAL", "PRIMARY"], "MRAcquisitionType": "3D"}, False),
    ],
)
def test_an_alarm_is_false_only_where_the_standard_says_so(
    attributes: dict[str, Any], forgiven: bool
) -> None:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    alarm = (
        "Error - </{}> - Attribute present when condition unsatisfied (which may not be present otherwise)"
        " for Type 1C Conditional - Module=<{}>"
    )
    assert is_false_alarm(alarm.format("CoverageOfKSpace(0018,9094)", "MRPulseSequence"), dataset) is forgiven
    assert is_false_alarm(alarm.format("EchoPulseSequence(0018,9008)", "MRPulseSequence"), dataset)
    assert not is_false_alarm(alarm.format("EchoTime(0018,0081)", "MRPulseSequence"), dataset)
    assert not is_false_alarm(alarm.format("EchoPulseSequence(0018,9008)", "MRImage"), dataset)


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
def test_an_enhanced_image_holds_nothing_that_its_class_has_no_place_for(
    shared_data: Path, protect: Protect
) -> None:
    validator = tool("dciodvfy", "dicom3tools")
    source = shared_data / "dicom_pydicom_data/eCT_Supplemental.dcm"
    _, target = protect(source)
    assert said_of(validator, target) - said_of(validator, source) == set(), "not even a warning"


@pytest.mark.data
@pytest.mark.parametrize("folder", DICOM_FOLDERS)
def test_the_validator_finds_no_new_error_in_any_file(
    shared_data: Path, dicom: DicomFormat, tmp_path: Path, folder: str
) -> None:
    validator = tool("dciodvfy", "dicom3tools")
    checked = 0
    for source in sorted(path for path in (shared_data / folder).rglob("*") if path.is_file()):
        try:
            item = dicom.inspect(source, PurePosixPath(source.name))
        except ImageError:
            continue
        target = tmp_path / "protected.dcm"
        with dicom.open(item, tmp_path) as frames:
            dicom.write(
                item, range(item.frames), (sign_noise(frames[n], 8) for n in range(item.frames)), target
            )
        assert errors_of(validator, target) - errors_of(validator, source) == set(), source.name
        checked += 1
    assert checked > 20


def meant_in(found: np.ndarray, meant: list[np.ndarray]) -> bool:
    """Return whether another reader found the intended integers, however it arranges a single frame."""
    return np.array_equal(found.reshape(np.stack(meant).shape), np.stack(meant))


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
    assert meant_in(found, meant)


DCMTK_DECODERS = {uids.RLELossless: "dcmdrle", uids.JPEGLSLossless: "dcmdjpls"}
"""JPEG 2000 is not among them: DCMTK's free part has no decoder for it, so of those files only the header is read."""


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_dcmtk_reads_the_intended_integers(
    shared_data: Path, protect: Protect, tmp_path: Path, name: str
) -> None:
    dump = tool("dcmdump", "dcmtk")
    meant, target = protect(shared_data / name)
    subprocess.run([dump, "+L", "-q", target], check=True, capture_output=True)
    dataset = pydicom.dcmread(target, stop_before_pixels=True)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == uids.JPEG2000Lossless:
        return
    if syntax in DCMTK_DECODERS:
        plain = tmp_path / "plain.dcm"
        subprocess.run(
            [tool(DCMTK_DECODERS[syntax], "dcmtk"), target, plain], check=True, capture_output=True
        )
        target = plain
    folder = tmp_path / "raw"
    folder.mkdir()
    subprocess.run([dump, "-q", "+W", folder, target], check=True, capture_output=True)
    words = max(folder.iterdir(), key=lambda file: file.stat().st_size).read_bytes()
    pixels = np.stack(meant)
    if dataset.get("PlanarConfiguration") == 1:
        pixels = np.moveaxis(pixels, 3, 1)
    # dcmdump writes the words of bits stored and unused ones alike; the latter may hold an overlay.
    found = np.frombuffer(words, pixels.dtype)[: pixels.size].reshape(pixels.shape)
    used = np.array((1 << dataset.BitsStored) - 1, f"u{pixels.itemsize}")
    unsigned = f"u{pixels.itemsize}"
    assert np.array_equal(found.view(unsigned) & used, np.ascontiguousarray(pixels).view(unsigned) & used)


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_simpleitk_reads_the_intended_integers(shared_data: Path, protect: Protect, name: str) -> None:
    meant, target = protect(shared_data / name)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(target))
    reader.SetImageIO("GDCMImageIO")
    reader.LoadPrivateTagsOff()
    found = sitk.GetArrayFromImage(reader.Execute()).astype(np.float64)
    dataset = pydicom.dcmread(target, stop_before_pixels=True)
    # SimpleITK turns MONOCHROME1 around and applies the rescale: what is left beside the integers is one constant.
    step = float(dataset.get("RescaleSlope") or 1) * (
        -1 if dataset.PhotometricInterpretation == "MONOCHROME1" else 1
    )
    pixels = np.stack(meant).astype(np.float64)
    assert np.ptp(found.reshape(pixels.shape) - step * pixels) == pytest.approx(0, abs=1e-6)
