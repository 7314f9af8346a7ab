"""DICOM files built in memory, small enough to read at a glance."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset

from medveil.agent.imageio.derived import Derivation
from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_survey import sign_noise
from medveil.agent.imageio.uid import DerivedUids

Pixels = npt.NDArray[Any]
MakeDicom = Callable[..., Path]


@pytest.fixture
def derivation() -> Derivation:
    return Derivation(
        DerivedUids(bytes(range(32)), "chest-2026", "policy-1"),
        datetime(2026, 11, 21, 12, 0, 0),
        "Protected against unauthorised training",
        "0.1.0",
    )


@pytest.fixture
def dicom(derivation: Derivation) -> DicomFormat:
    return DicomFormat(derivation)


@pytest.fixture
def make_dataset() -> Callable[..., Dataset]:
    """Return a function that builds a data set around ``pixels`` ((frames,) rows, columns (, 3))."""

    def build(pixels: Pixels, *, syntax: str = uids.ExplicitVRLittleEndian, **attributes: Any) -> Dataset:
        colour = pixels.shape[-1] == 3 and pixels.ndim > 2
        grid = pixels.shape[:-1] if colour else pixels.shape
        bits = pixels.dtype.itemsize * 8
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = uids.CTImageStorage, "1.2.3.4.5.6"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.4", "1.2.3.4.5"
        dataset.FrameOfReferenceUID = "1.2.3.4.9"
        dataset.PatientName, dataset.PatientID, dataset.Modality = "Canary^Cora", "CANARY-7", "CT"
        dataset.SeriesNumber, dataset.SeriesDescription = 3, "Axial"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Rows, dataset.Columns = grid[-2:]
        if len(grid) == 3:
            dataset.NumberOfFrames = grid[0]
        dataset.SamplesPerPixel = 3 if colour else 1
        dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        if colour:
            dataset.PlanarConfiguration = 0
        dataset.BitsAllocated = bits
        dataset.BitsStored = attributes.pop("BitsStored", bits)
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
        data = pixels.tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
        dataset["PixelData"].VR = "OW" if bits == 16 else "OB"
        if syntax in (uids.ImplicitVRLittleEndian, uids.DeflatedExplicitVRLittleEndian):
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset["PixelData"].VR = "OW"
        elif syntax != uids.ExplicitVRLittleEndian:
            plugins = {uids.JPEGLSLossless: "pyjpegls"}
            dataset.compress(
                syntax, encoding_plugin=plugins.get(syntax, "pylibjpeg"), generate_instance_uid=False
            )
        return dataset

    return build


@pytest.fixture
def make_dicom(make_dataset: Callable[..., Dataset], tmp_path: Path) -> MakeDicom:
    """Return a function that writes such a data set and returns its path."""

    def write(pixels: Pixels, *, name: str = "source.dcm", **settings: Any) -> Path:
        path = tmp_path / name
        pydicom.dcmwrite(path, make_dataset(pixels, **settings), enforce_file_format=True)
        return path

    return write


@pytest.fixture
def protect(dicom: DicomFormat, tmp_path: Path) -> Callable[..., tuple[list[Pixels], Path]]:
    """Return a function that writes a protected copy and returns the frames that were meant, and its path."""

    def run(path: Path, *, epsilon: float = 8.0, using: DicomFormat = dicom) -> tuple[list[Pixels], Path]:
        item = using.inspect(path, PurePosixPath(path.name))
        target = tmp_path / f"protected-{path.name}"
        with using.open(item, tmp_path) as frames:
            meant = [sign_noise(frames[number], epsilon) for number in range(item.frames)]
        using.write(item, range(item.frames), iter(meant), target)
        return meant, target

    return run


@pytest.fixture
def ct_slice(rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """A signed 12-bit slice: soft tissue around 40 with a padded corner at -2000 (as stored, slope 1)."""
    pixels = rng.integers(-100, 200, (48, 40)).astype(np.int16)
    pixels[:12, :12] = -2000
    return pixels
