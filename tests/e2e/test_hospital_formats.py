"""A hospital's DICOM and NIfTI files through the whole command: protected, accounted for, restored."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from datetime import datetime
from pathlib import Path

import pydicom
import pytest

from medveil.agent.imageio.dicom_header import read_dataset
from medveil.agent.preparation import Wishes
from medveil.agent.release_job import Call, make_release

LATER = datetime(2026, 11, 21, 12, 0, 0)
EARLIER = datetime(2026, 11, 20, 8, 30, 0)


@pytest.fixture
def hospital(shared_data: Path, tmp_path: Path) -> Path:
    """A class per folder; CT with its segmentation and a report, DX, colour microscopy, MR, a volume, a bad copy."""
    highdicom = shared_data / "dicom_highdicom"
    hippocampus = shared_data / "nii_hippocampus_a"
    volume = min(path.name for path in (hippocampus / "images").glob("*.nii.gz"))
    placed = {
        "NORMAL/ct.dcm": highdicom / "ct_image.dcm",
        "NORMAL/seg.dcm": highdicom / "seg_image_ct_binary_single_frame.dcm",
        "NORMAL/report.dcm": highdicom / "sr_document.dcm",
        "NORMAL/slide.dcm": highdicom / "sm_image_jpegls.dcm",
        "PNEUMONIA/dx.dcm": highdicom / "dx_image.dcm",
        "PNEUMONIA/mr.dcm": shared_data / "dicom_pydicom_data/emri_small_jpeg_ls_lossless.dcm",
        "PNEUMONIA/mr-copy.dcm": shared_data / "dicom_pydicom_data/emri_small_jpeg_ls_lossless.dcm",
        "PNEUMONIA/volume.nii.gz": hippocampus / "images" / volume,
        "labels/volume.nii.gz": hippocampus / "labels" / volume,
    }
    root = tmp_path / "hospital"
    for name, original in placed.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, root / name)
    return root


@pytest.mark.data
def test_hospital_files_are_protected_and_every_original_comes_back(agent, bundle, hospital, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    done = agent("protect", hospital, "--out", out, "--bundle", bundle.path, "--format", "json")
    assert done.code == 3, done.stdout
    assert done.json["quarantined_by_reason"] == {"duplicate-instance": 2}
    assert done.json["verified"] == done.json["images"] - 2
    assert 0 < done.json["epsilon_max"] <= 8

    released = pydicom.dcmread(out / "NORMAL/ct.dcm")
    original = pydicom.dcmread(hospital / "NORMAL/ct.dcm")
    assert released.SOPInstanceUID != original.SOPInstanceUID
    assert released.PatientID == original.PatientID
    assert (released.pixel_array != original.pixel_array).any()
    segmentation = pydicom.dcmread(out / "NORMAL/seg.dcm")
    assert segmentation.PixelData == pydicom.dcmread(hospital / "NORMAL/seg.dcm").PixelData
    assert (out / "labels/volume.nii.gz").read_bytes() == (hospital / "labels/volume.nii.gz").read_bytes()

    restored = agent("restore", out, "--out", back, "--format", "json")
    assert (restored.code, restored.json["restored"]) == (0, 7)
    for name in ("NORMAL/ct.dcm", "NORMAL/seg.dcm", "NORMAL/report.dcm"):
        assert read_dataset(back / name) == read_dataset(hospital / name)
    # Its pixels end on an odd byte, which the standard forbids; what medveil writes is padded to an even one.
    dx, clean_dx = (read_dataset(folder / "PNEUMONIA/dx.dcm") for folder in (back, hospital))
    assert dx.PixelData == clean_dx.PixelData + b"\0"
    del dx.PixelData, clean_dx.PixelData
    assert dx == clean_dx
    for name in ("PNEUMONIA/volume.nii.gz", "labels/volume.nii.gz"):
        assert gzip.decompress((back / name).read_bytes()) == gzip.decompress((hospital / name).read_bytes())


@pytest.mark.data
def test_a_lost_copy_is_written_again_with_the_same_bytes_on_another_day(home, bundle, hospital, tmp_path):
    copy = tmp_path / "out/NORMAL/ct.dcm"
    call = Call(hospital, tmp_path / "out", None, None, Wishes(bundle.path))
    make_release(call, now=lambda: EARLIER)
    first = hashlib.sha256(copy.read_bytes()).hexdigest()
    assert pydicom.dcmread(copy).InstanceCreationDate == "20261120"
    copy.unlink()
    make_release(call, now=lambda: LATER)
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == first


@pytest.mark.data
def test_another_policy_for_the_windows_gives_other_identities(agent, bundle, hospital, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text("name_source = false\n[windows]\nchoice = 'presets'\npresets = { CT = [[40, 80]] }\n")
    for name in ("PNEUMONIA", "labels"):
        shutil.rmtree(hospital / name)
    for out, more in (("one", ()), ("two", ("--policy", policy))):
        agent("protect", hospital, "--out", tmp_path / out, "--bundle", bundle.path, *more)
    one, two = (pydicom.dcmread(tmp_path / out / "NORMAL/ct.dcm") for out in ("one", "two"))
    assert one.SOPInstanceUID != two.SOPInstanceUID
    assert "SourceImageSequence" in one
    assert "SourceImageSequence" not in two
    narrow, wide = (abs(x.pixel_array.astype(int) - y).max() for x, y in ((two, one.pixel_array), (one, 0)))
    assert narrow < wide
