"""The imaging benchmark counts what it says it counts; its figures are nobody's business here."""

from __future__ import annotations

import gzip
import importlib
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmarks' modules importable, as they are for one another."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def imaging_files(bench: None) -> ModuleType:
    return importlib.import_module("imaging_files")


@pytest.fixture
def imaging_survival(bench: None) -> ModuleType:
    return importlib.import_module("imaging_survival")


def write_slice(path: Path, uid: str, syntax: str = uids.ExplicitVRLittleEndian) -> None:
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = uids.CTImageStorage, uid, "CT"
    dataset.Rows = dataset.Columns = 32
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = np.random.default_rng(0).integers(500, 3500, (32, 32), np.uint16).tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    if syntax != uids.ExplicitVRLittleEndian:
        dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


@pytest.mark.slow
def test_every_file_has_one_fate_and_two_codings_of_one_object_are_both_tried(
    imaging_files: ModuleType, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    (data / "ct").mkdir(parents=True)
    write_slice(data / "ct/plain.dcm", "1.2.1")
    write_slice(data / "ct/rle.dcm", "1.2.1", uids.RLELossless)
    (data / "ct/short.dcm").write_bytes((data / "ct/plain.dcm").read_bytes()[:-500])
    (data / "ct/notes.txt").write_text("not an image")
    bundle = Path(str(files("medveil.agent.demo") / "phantom.medveil"))
    found = imaging_files.fates(data, imaging_files.files_of(data, "ct"), bundle, tmp_path / "work")
    assert [(fate.file, fate.outcome, fate.reason, fate.restored) for fate in found] == [
        ("ct/notes.txt", "refused", "not-an-image", ""),
        ("ct/plain.dcm", "protected", "", "same bytes"),
        ("ct/rle.dcm", "protected", "", "same bytes"),
        ("ct/short.dcm", "quarantined", "truncated", ""),
    ]
    assert list(imaging_files.counts(found, ["ct"]))[-1] == ["all", "4", "2", "2", "0", "1", "1"]


def test_a_file_that_is_not_its_original_ends_the_benchmark(
    imaging_files: ModuleType, tmp_path: Path
) -> None:
    one, other, packed = tmp_path / "a.dcm", tmp_path / "b.dcm", tmp_path / "a.gz"
    write_slice(one, "1.2.1")
    write_slice(other, "1.2.2")
    assert imaging_files.same(one, one) == "same bytes"
    for path, level in ((packed, 1), (tmp_path / "b.gz", 9)):
        path.write_bytes(gzip.compress(b"voxels" * 99, compresslevel=level, mtime=0))
    assert imaging_files.same(packed, tmp_path / "b.gz") == "same content"
    with pytest.raises(SystemExit):
        imaging_files.same(one, other)


def test_survival_is_direction_and_energy(imaging_survival: ModuleType, rng: np.random.Generator) -> None:
    wanted = rng.choice(np.array([-1, 1], np.float32), (64, 64)) / 32
    assert imaging_survival._compared(wanted, wanted) == pytest.approx([1, 1])
    assert imaging_survival._compared(-wanted / 2, wanted) == pytest.approx([-1, 0.25])
    assert imaging_survival._compared(np.zeros_like(wanted), wanted) == [0, 0]
    smaller = imaging_survival._compared(np.full((8, 8), 1 / 32), np.full((64, 64), 1 / 32, np.float32))
    assert smaller == pytest.approx([1, 1])
