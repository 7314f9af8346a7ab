"""Every shared file of a hospital format: protected and read back exactly, or named; none crashes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_survey import Outcome, Result, survey, table
from medveil.agent.imageio.nifti import NiftiFormat

EPSILON = 8.0

REFUSED = {
    "dicom_pydicom_data": {
        "JLSL_RGB_ILV0.dcm": "missing-attribute",
        "JLSL_RGB_ILV1.dcm": "missing-attribute",
        "JLSL_RGB_ILV2.dcm": "missing-attribute",
        "JLSN_RGB_ILV0.dcm": "missing-attribute",
        "SC_rgb_32bit.dcm": "32-bit",
        "SC_rgb_expb_32bit.dcm": "32-bit",
        "emri_small_jpeg_2k_lossless_too_short.dcm": "truncated",
        "liver_deflate.dcm": "unsupported-transfer-syntax",
        "liver_nonbyte_aligned_deflate.dcm": "unsupported-transfer-syntax",
        "parametric_map_double_float.dcm": "parametric-map",
        "parametric_map_float.dcm": "parametric-map",
    },
    "dicom_highdicom": {},
    "dicom_mr_series": {},
    "nii_ivadomed": {"rgb_test_file.nii.gz": "rgb"},
    "nii_hippocampus_a": {},
}
PROTECTED = {
    "dicom_pydicom_data": 55,
    "dicom_highdicom": 10,
    "dicom_mr_series": 62,
    "nii_ivadomed": 9,
    "nii_hippocampus_a": 201,
}
COMPANIONS = {
    "dicom_pydicom_data": 7,
    "dicom_highdicom": 15,
    "dicom_mr_series": 0,
    "nii_ivadomed": 11,
    "nii_hippocampus_a": 200,
}


@pytest.fixture
def results(
    request: pytest.FixtureRequest, dicom: DicomFormat, shared_data: Path, tmp_path: Path
) -> list[Result]:
    return list(survey(shared_data / request.param, (dicom, NiftiFormat()), EPSILON, tmp_path))


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "results"),
    [
        pytest.param("dicom_pydicom_data", "dicom_pydicom_data", marks=pytest.mark.slow),
        ("dicom_highdicom", "dicom_highdicom"),
        ("dicom_mr_series", "dicom_mr_series"),
        ("nii_ivadomed", "nii_ivadomed"),
        pytest.param("nii_hippocampus_a", "nii_hippocampus_a", marks=pytest.mark.slow),
    ],
    indirect=["results"],
)
def test_every_file_is_protected_renamed_or_refused_by_name(folder: str, results: list[Result]) -> None:
    print(table(results))  # noqa: T201 - shown by `pytest -s`
    counts = Counter(result.outcome for result in results)
    refused = {str(r.relative): r.reason for r in results if r.outcome is Outcome.REFUSED}
    assert counts[Outcome.DIFFERS] == 0
    assert counts[Outcome.PROTECTED] == PROTECTED[folder]
    assert counts[Outcome.COMPANION] == COMPANIONS[folder]
    assert {name: reason for name, reason in refused.items() if reason != "not-an-image"} == REFUSED[folder]
    assert all(0 < r.largest <= EPSILON + 1e-4 for r in results if r.outcome is Outcome.PROTECTED)


def test_the_table_counts_what_it_lists(dicom: DicomFormat, tmp_path: Path) -> None:
    source, scratch = tmp_path / "source", tmp_path / "scratch"
    source.mkdir()
    scratch.mkdir()
    (source / "notes.txt").write_text("not an image")
    results = list(survey(source, (dicom, NiftiFormat()), EPSILON, scratch))
    assert "| notes.txt | refused | not-an-image |" in table(results)
    assert table(results).endswith("1 refused")
