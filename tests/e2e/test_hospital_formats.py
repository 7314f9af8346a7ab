"""A hospital's DICOM and NIfTI files through the whole command: protected, accounted for, restored."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids

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
    declared = (
        2 + pydicom.dcmread(hospital / "NORMAL/slide.dcm").NumberOfFrames
    )  # CT, DX, and colour as it is
    assert done.json["guessed_windows"] == done.json["verified"] - declared > 0

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
    # Compressed, or of an odd length that the standard forbids: these come back as the files that they were.
    for name in ("NORMAL/slide.dcm", "PNEUMONIA/dx.dcm"):
        assert (back / name).read_bytes() == (hospital / name).read_bytes()
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


def ct_slice(uid: str) -> pydicom.Dataset:
    """Return a small CT slice, uncompressed, as a data set that can be written."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = uids.CTImageStorage, uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = "1.2.1", "1.2.2", "CT"
    dataset.Rows = dataset.Columns = 32
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = np.random.default_rng(0).integers(500, 3500, (32, 32), np.uint16).tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    return dataset


def encoded(dataset: pydicom.Dataset) -> bytes:
    stream = BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def changed(uid: str, **attributes: Any) -> bytes:
    """Return a slice with other attributes; None removes one."""
    dataset = ct_slice(uid)
    for keyword, value in attributes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    return encoded(dataset)


def compressed(uid: str, side: int = 32) -> bytes:
    """Return a slice in JPEG 2000 whose header says that it is ``side`` x ``side`` pixels."""
    dataset = ct_slice(uid)
    dataset.compress(uids.JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    dataset.Rows = dataset.Columns = side
    return encoded(dataset)


def with_garbled_stream(data: bytes) -> bytes:
    """Return a compressed file whose stream turns to zeros after its header."""
    start = data.index(b"\xff\x93")  # start of data (ISO 15444-1, A.4)
    return data[:start] + bytes(len(data) - start - 8) + data[-8:]


def protected_copy(uid: str) -> bytes:
    """Return what another site's medveil has made."""
    equipment = pydicom.Dataset()
    equipment.Manufacturer, equipment.ManufacturerModelName = "medveil", "medveil site agent"
    return changed(uid, ContributingEquipmentSequence=[equipment])


def dicomdir() -> bytes:
    """Return the index that a CD of images carries."""
    index = ct_slice("1.2.3.9")
    index.SOPClassUID, index.FileSetID = uids.MediaStorageDirectoryStorage, "CD"
    for keyword in ("PixelData", "Rows", "Columns"):
        del index[keyword]
    return encoded(index)


def with_wrong_vr(data: bytes) -> bytes:
    """Return a file whose Rows (0028,0010) claims to be text."""
    return data.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00PN")


def with_flipped_bit(data: bytes) -> bytes:
    """Return a file in which Bits Allocated (0028,0100) claims to be 130 bytes long instead of 2."""
    element = b"\x28\x00\x00\x01US"
    return data.replace(element + b"\x02\x00", element + b"\x82\x00")


GOOD = encoded(ct_slice("1.2.3.1"))
BAD_FILES = {
    "truncated.dcm": (encoded(ct_slice("1.2.3.2"))[:-700], "truncated"),
    "flipped.dcm": (with_flipped_bit(encoded(ct_slice("1.2.3.3"))), "truncated"),
    "cut-stream.dcm": (compressed("1.2.3.10")[:-300], "truncated"),
    "garbled-stream.dcm": (with_garbled_stream(compressed("1.2.3.11")), "corrupt-pixels"),
    "protected.dcm": (protected_copy("1.2.3.12"), "already-protected"),
    "zeros.dcm": (bytes(len(GOOD)), "not-an-image"),
    "zero-filled.dcm": (GOOD[:132] + bytes(len(GOOD) - 132), "truncated"),
    "wrong-vr.dcm": (with_wrong_vr(encoded(ct_slice("1.2.3.4"))), "missing-attribute"),
    "no-rows.dcm": (changed("1.2.3.5", Rows=None), "missing-attribute"),
    "huge.dcm": (changed("1.2.3.6", Rows=65535, Columns=65535), "too-large"),
    "bomb.dcm": (compressed("1.2.3.7", side=65535), "too-large"),
    "DICOMDIR": (dicomdir(), "dicomdir"),
    "notes.txt": (b"Call the ward back.", "not-an-image"),
    "twin-a.dcm": (changed("1.2.3.8"), "duplicate-instance"),
    "twin-b.dcm": (changed("1.2.3.8", WindowWidth=2000), "duplicate-instance"),
}


def test_a_batch_with_every_kind_of_bad_file_finishes_and_names_each(agent, bundle, tmp_path):
    source = tmp_path / "source" / "NORMAL"
    source.mkdir(parents=True)
    (source / "good.dcm").write_bytes(GOOD)
    for name, (data, _) in BAD_FILES.items():
        (source / name).write_bytes(data)
    (source / "again").symlink_to(source, target_is_directory=True)
    out = tmp_path / "out"

    done = agent("protect", source.parent, "--out", out, "--bundle", bundle.path, "--format", "json")
    assert (done.code, done.json["verified"], done.json["ignored_files"]) == (3, 1, 1)
    listed = agent("quarantine", "list", out, "--format", "json").json["quarantined"]
    reasons = {entry["file"].removeprefix("NORMAL/"): entry["reason"] for entry in listed}
    assert reasons == {name: reason for name, (_, reason) in BAD_FILES.items()}
    assert all(entry["message"].endswith(".") for entry in listed)
    assert [path.name for path in out.rglob("*.dcm")] == ["good.dcm"]
