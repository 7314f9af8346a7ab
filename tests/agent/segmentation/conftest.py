"""Sources with masks, and a job whose generator is a formula: no bundle, no onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image as PillowImage
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.sequence import Sequence as Items
from scipy import ndimage

from medveil.agent.budget import Budget
from medveil.agent.imageio import ImageFormat, Item, NiftiFormat, Taxonomy, raster_formats
from medveil.agent.job import Job
from medveil.agent.sealing import load_site_key
from medveil.agent.segmentation import ClassMap, MaskedPerturber, MaskFormat, Tiles
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.segmentation import SegmentationSettings, get_segmentation

HALO = 2


class LocalContrast:
    """A generator in closed form: how much brighter a pixel is than its 5x5 neighbourhood, beyond the edge dark.

    As a network with zero padding: what it says reaches `HALO` pixels and no further, in every direction.
    """

    def __init__(self, gain: float = 40.0) -> None:
        self._gain = gain
        self.shapes: list[tuple[int, ...]] = []

    def perturbation(self, images: FloatArray, targets: FloatArray | None = None) -> FloatArray:
        self.shapes.append(images.shape)
        size = (1, 1, *(2 * HALO + 1 for _ in images.shape[2:]))
        mean = ndimage.uniform_filter(images.astype(np.float64), size, mode="constant")
        return np.tanh(self._gain * (images - mean)).astype(np.float32)


class Says:
    """A generator that says one thing, whatever it is shown; a hostile one, too."""

    def __init__(self, value: float) -> None:
        self._value = np.float32(value)

    def perturbation(self, images: FloatArray, targets: FloatArray | None = None) -> FloatArray:
        return np.full_like(images, self._value)


def make_perturber(
    method: str = "umed",
    generator: object | None = None,
    *,
    epsilon: float = 4.0,
    tile: tuple[int, ...] = (16, 16),
    channels: int = 1,
    band_radius: int = 1,
) -> MaskedPerturber:
    parts = get_segmentation(method).generators
    return MaskedPerturber(
        method=get_segmentation(method),
        settings=SegmentationSettings(epsilon=epsilon / 255, band_radius=band_radius),
        generators={part: generator or LocalContrast() for part in parts},
        channels=channels,
        tiles=Tiles(tile, HALO, 4),
    )


def make_job(
    source: Path,
    out: Path,
    *,
    names: Sequence[str] = ("background", "vessel"),
    values: Sequence[int] | None = None,
    aliases: dict[str, str] | None = None,
    formats: Sequence[ImageFormat] = (),
    epsilon: float = 4.0,
    perturber: MaskedPerturber | None = None,
    **changes: object,
) -> Job:
    """Return a job with masks, for classes stored as 0, 1, 2, ..."""
    taxonomy = Taxonomy(tuple(names), tuple(values or range(len(names))))
    job = Job(
        source=source,
        release=out,
        private=None,
        labels_file=None,
        formats=(*formats, NiftiFormat(), *raster_formats(), MaskFormat()),
        allows_format=lambda name: True,
        taxonomy=taxonomy,
        perturber=perturber or make_perturber(epsilon=epsilon),
        budget=Budget(epsilon, 1.0),
        minimum_psnr_db=20.0,
        recipients=(load_site_key(create=True).recipient,),
        settings={"epsilon": epsilon},
        begun=datetime(2026, 11, 21, 12, 0, 0),
        invocation={},
        class_map=ClassMap(taxonomy, aliases or {}),
    )
    return replace(job, **changes)  # type: ignore[arg-type]


@pytest.fixture
def perturber() -> Callable[..., MaskedPerturber]:
    return make_perturber


@pytest.fixture
def says() -> type[Says]:
    return Says


@pytest.fixture
def local_contrast() -> type[LocalContrast]:
    return LocalContrast


@pytest.fixture
def job() -> Callable[..., Job]:
    return make_job


@pytest.fixture
def disc() -> Callable[..., np.ndarray]:
    """Return a label map with one disc in the middle, uint8."""

    def draw(rows: int = 40, columns: int = 36, radius: float = 10.0, value: int = 1) -> np.ndarray:
        row, column = np.mgrid[:rows, :columns]
        inside = (row - rows / 2) ** 2 + (column - columns / 2) ** 2 < radius**2
        return (inside * value).astype(np.uint8)

    return draw


@pytest.fixture
def save() -> Callable[..., Path]:
    """Save pixels as PNG or TIFF, by the name."""

    def write(path: Path, pixels: np.ndarray) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        PillowImage.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture
def save_volume() -> Callable[..., Path]:
    """Save ``(x, y, z)`` voxels as NIfTI."""

    def write(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def masked_source(tmp_path: Path, picture: Callable[..., np.ndarray], disc, save) -> Path:
    """Three grey PNGs of 40x36 in images/, their masks (0 and 255) in masks/."""
    root = tmp_path / "source"
    for number in range(3):
        save(root / "images" / f"{number}.png", picture(40, 36))
        save(root / "masks" / f"{number}.png", disc(radius=8 + number, value=255))
    return root


# DICOM: a series and its segmentation

SHAPE = (6, 7)  # 42 pixels: frames of one bit per pixel do not begin on whole bytes
SLICES = 3


def uid_of(slice_: int) -> str:
    return f"1.2.3.{slice_ + 1}"


def save_dicom(path: Path, dataset: Dataset) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "series").mkdir(exist_ok=True)
    return tmp_path / "series"


def described(path: Path, frames: int, identity: str) -> Item:
    relative = PurePosixPath(path.name)
    return Item(path, relative, relative, "dicom", frames, 1, 1, identity=identity)


@pytest.fixture
def slices(tmp_path: Path, rng: np.random.Generator) -> list[Item]:
    """Three axial slices of 6x7 pixels, 3 mm apart, in 12 bits."""
    items = []
    for number in range(SLICES):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = uids.CTImageStorage, uid_of(number)
        dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.9"
        dataset.Rows, dataset.Columns = SHAPE
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = (
            [-5, 7, 3 * number],
            [1, 0, 0, 0, 1, 0],
        )
        dataset.PixelSpacing, dataset.SliceThickness = [0.8, 0.6], 3
        dataset.PatientName, dataset.PatientID, dataset.Modality = "Canary^Cora", "CANARY-7", "CT"
        dataset.StudyInstanceUID, dataset.ImageType = "1.2", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation, dataset.WindowCenter, dataset.WindowWidth = 0, 2048, 4096
        dataset.PixelData = rng.integers(500, 3500, SHAPE, np.uint16).tobytes()
        dataset["PixelData"].VR = "OW"
        items.append(described(save_dicom(_folder(tmp_path) / f"ct{number}.dcm", dataset), 1, uid_of(number)))
    return items


@pytest.fixture
def segmentation(tmp_path: Path) -> Callable[..., Item]:
    """Write a SEG: ``frames`` gives (segment, slice, mask) in order."""

    def write(
        frames: list[tuple[int, int, np.ndarray]],
        *,
        kind: str = "BINARY",
        labels: tuple[str, ...] = ("Liver", "Tumour"),
        shift: tuple[float, float, float] = (0, 0, 0),
        derived: bool = True,
        named: range = range(SLICES),
        **changes: object,
    ) -> Item:
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = uids.SegmentationStorage, "1.2.3.77"
        dataset.FrameOfReferenceUID, dataset.SegmentationType = "1.9", kind
        dataset.Rows, dataset.Columns = frames[0][2].shape
        dataset.NumberOfFrames, dataset.SamplesPerPixel = len(frames), 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        bits = 1 if kind == "BINARY" else 8
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        dataset.MaximumFractionalValue = 200
        dataset.SegmentSequence = Items()
        for number, label in enumerate(labels, start=1):
            segment = Dataset()
            segment.SegmentNumber, segment.SegmentLabel = number, label
            dataset.SegmentSequence.append(segment)
        series = Dataset()
        series.SeriesInstanceUID = "1.2.3"
        series.ReferencedInstanceSequence = Items([_reference(uid_of(number)) for number in named])
        dataset.ReferencedSeriesSequence = Items([series] if named else [])
        shared = Dataset()
        shared.PlaneOrientationSequence = Items([_with(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])
        shared.PixelMeasuresSequence = Items([_with(PixelSpacing=[0.8, 0.6], SliceThickness=3)])
        dataset.SharedFunctionalGroupsSequence = Items([shared])
        dataset.PerFrameFunctionalGroupsSequence = Items()
        for segment, slice_, _ in frames:
            group = Dataset()
            place = [-5 + shift[0], 7 + shift[1], 3 * slice_ + shift[2]]
            group.PlanePositionSequence = Items([_with(ImagePositionPatient=place)])
            if kind != "LABELMAP":
                group.SegmentIdentificationSequence = Items([_with(ReferencedSegmentNumber=segment)])
            if derived:
                sources = Items([_reference(uid_of(slice_))])
                group.DerivationImageSequence = Items([_with(SourceImageSequence=sources)])
            dataset.PerFrameFunctionalGroupsSequence.append(group)
        pixels = np.stack([mask for _, _, mask in frames]).astype(np.uint8)
        data = pack_bits(pixels.ravel()) if kind == "BINARY" else pixels.tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
        dataset["PixelData"].VR = "OB"
        for keyword, value in changes.items():
            setattr(dataset, keyword, value)
        return described(save_dicom(_folder(tmp_path) / "seg.dcm", dataset), 0, "1.2.3.77")

    return write


def _with(**values: object) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _reference(instance: str) -> Dataset:
    return _with(ReferencedSOPClassUID=uids.CTImageStorage, ReferencedSOPInstanceUID=instance)


@pytest.fixture
def save_dataset() -> Callable[[Path, Dataset], Path]:
    return save_dicom


@pytest.fixture
def dicom_item() -> Callable[[Path, int, str], Item]:
    return described
