"""Images for the demonstration's sites: unequal in number and in their shares of each class, as hospitals are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from medveil.agent.workspace import LABELS_NAME
from medveil.models.disk import disk_errors
from medveil.models.errors import ConfigurationError, InputError
from medveil.models.phantoms import CLASS_NAMES, draw

__all__ = ["SITES", "Hospitals", "draw_sites", "split_sites"]

SITES: Final = ("st-anna", "northside", "lakeview")
_SIZES: Final = (0.42, 0.32, 0.26)
"""Shares of all images; our choice: no two alike."""
_SKEW: Final = (1.4, 1.0, 0.75)
"""How much likelier a site gets an image of the first class; our choice: every class stays large enough to check."""
_PHANTOMS: Final = 360
_MOST_IMAGES: Final = 600
"""Of the user's own; more would take longer than a demonstration may."""
_SIDE: Final = 64
_SEED: Final = 1
"""Other than that of the surrogates' training images."""
_STORED_MAXIMUM: Final = 4095  # 12 bits stored, as a detector delivers them
_ROOT: Final = "2.25."  # UIDs from a digest, PS3.5 B.2: the same every time

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Hospitals:
    """What the sites of a demonstration hold.

    Attributes:
        sources: each site's folder of images, or its NPZ.
        aliases: what the sites call the shipped bundle's classes, where these are the user's own: its surrogates know
            drawn images only, so the campaign is real and the noise means nothing to these images.
    """

    sources: Mapping[str, Path]
    aliases: Mapping[str, str] = field(default_factory=dict)


def draw_sites(folder: Path) -> Hospitals:
    """Draw phantoms as DICOM, a folder per class, and deal them out.

    Raises:
        StorageError: the disk takes no more.
    """
    images, labels = draw(_PHANTOMS, np.random.default_rng(_SEED), size=_SIDE)
    places = {}
    for site, chosen in _shares(labels, np.random.default_rng(_SEED)).items():
        places[site] = folder / site / "images"
        for number in chosen:
            target = places[site] / CLASS_NAMES[labels[number]] / f"{number:03}.dcm"
            with disk_errors():
                target.parent.mkdir(parents=True, exist_ok=True)
                _dicom(images[number], f"{site}-{number}").save_as(target, enforce_file_format=True)
    return Hospitals(places)


def split_sites(data: Path, folder: Path, *, own_bundle: bool) -> Hospitals:
    """Deal the user's images out to the sites.

    Args:
        data: an NPZ in MedMNIST layout, a folder with one such file, or a folder per class.
        folder: of the demonstration.
        own_bundle: whether a bundle for these classes was named; if not, they stand for the shipped bundle's.

    Raises:
        ConfigurationError: ``demo-bundle``: there are more classes than the shipped bundle has.
        InputError: ``data-format``: the data is none of these.
    """
    archives = [data] if data.is_file() else sorted(data.glob("*.npz"))
    if len(archives) > 1:
        raise InputError("data-format", "The folder holds several NPZ files; name one of them.")
    sources, names = _split_npz(archives[0], folder) if archives else _split_folders(data, folder)
    return Hospitals(sources, {} if own_bundle else _standing_for_shipped(names))


def _standing_for_shipped(names: Sequence[str]) -> dict[str, str]:
    if len(names) > len(CLASS_NAMES):
        raise ConfigurationError(
            "demo-bundle",
            f"The bundle of this demonstration has {len(CLASS_NAMES)} classes, these images have {len(names)}: name "
            "a bundle for them with --bundle (`medveil-coordinator train` makes one from public images of the kind).",
        )
    return dict(zip(names, CLASS_NAMES, strict=False))


def _split_npz(archive: Path, folder: Path) -> tuple[dict[str, Path], list[str]]:
    try:
        with np.load(archive, allow_pickle=False) as arrays:
            images, labels = arrays["train_images"], arrays["train_labels"].reshape(-1).astype(np.int64)
    except (OSError, ValueError, KeyError) as exc:
        raise InputError(
            "data-format", "The NPZ holds no train_images and train_labels.", private=str(exc)
        ) from exc
    places = {}
    for site, chosen in _shares(labels, np.random.default_rng(_SEED)).items():
        places[site] = folder / site / "images.npz"
        with disk_errors():
            places[site].parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(
                places[site],
                train_images=images[chosen],
                train_labels=labels[chosen].astype(np.uint8)[:, None],
            )
    return places, [str(label) for label in np.unique(labels)]


def _split_folders(data: Path, folder: Path) -> tuple[dict[str, Path], list[str]]:
    if (data / LABELS_NAME).is_file():
        raise ConfigurationError(
            "demo-labels", "For three sites, sort the images into a folder per class first."
        )
    files = sorted(path for path in data.glob("*/*") if path.is_file())
    names = sorted({path.parent.name for path in files})
    if not names:
        raise InputError("data-format", "There is no folder per class with images in it.")
    labels = np.array([names.index(path.parent.name) for path in files], np.int64)
    places = {}
    for site, chosen in _shares(labels, np.random.default_rng(_SEED)).items():
        places[site] = folder / site / "images"
        for number in chosen:
            target = places[site] / names[labels[number]] / files[number].name
            with disk_errors():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(files[number], target)
    return places, names


def _shares(labels: Labels, rng: np.random.Generator) -> dict[str, Labels]:
    """Return the image numbers of each site: sizes and class shares differ, no image goes to two."""
    first = int(labels.min())
    weights = np.array(
        [
            [size * (skew if label == first else 1) for size, skew in zip(_SIZES, _SKEW, strict=True)]
            for label in (0, 1)
        ]
    )
    dealt: dict[str, list[int]] = {site: [] for site in SITES}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        members = members[: max(1, round(_MOST_IMAGES * len(members) / len(labels)))]
        shares = weights[0 if label == first else 1]
        for site, part in zip(SITES, np.split(members, _cuts(shares, len(members))), strict=True):
            dealt[site].extend(int(number) for number in part)
    return {site: np.array(sorted(numbers), np.int64) for site, numbers in dealt.items()}


def _cuts(shares: Sequence[float] | npt.NDArray[np.float64], count: int) -> list[int]:
    whole = np.cumsum(shares) / np.sum(shares)
    return [round(float(end) * count) for end in whole[:-1]]


def _dicom(image: npt.NDArray[np.uint8], name: str) -> Dataset:
    """Return a phantom as an object that a radiography system could have made of a phantom."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = generate_uid(_ROOT, [name])
    dataset.StudyInstanceUID = generate_uid(_ROOT, [name, "study"])
    dataset.SeriesInstanceUID = generate_uid(_ROOT, [name, "series"])
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.PatientName, dataset.PatientID = "Phantom", name
    dataset.PatientBirthDate, dataset.PatientSex, dataset.Laterality = "", "", ""
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = "", "", ""
    dataset.ReferringPhysicianName, dataset.StudyID, dataset.Manufacturer = "", "", "medveil"
    dataset.SeriesNumber, dataset.InstanceNumber, dataset.Modality = "1", "1", "CR"
    dataset.BodyPartExamined, dataset.ViewPosition, dataset.PatientOrientation = "CHEST", "PA", ""
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = (_STORED_MAXIMUM + 1) // 2, _STORED_MAXIMUM + 1
    stored = np.rint(image.astype(np.float64) / 255 * _STORED_MAXIMUM).astype("<u2")
    dataset.PixelData = stored.tobytes()
    return dataset
