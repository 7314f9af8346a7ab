"""The hospitals of the segmentation benchmark: real public images, cut to small patches, dealt out by image.

The images of one more set are drawn here: no patient is in them, so they may be shown and anybody has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from medveil.models.datasets.masked import Patches
from medveil.models.quality import constant_mask_dice

__all__ = [
    "COHORTS",
    "SITES",
    "VOLUME_COHORTS",
    "Difficulty",
    "SegmentationCohort",
    "difficulty",
    "joined",
    "planes_of",
]

SITES = 3
_SEED = 20261121
_SIDE = 48
_SLICE_SIDE = 48
# Patches per image, and the least share of vessels in one: a patch without any is scored 0 or 1 by a single pixel.
_DRIVE_PATCHES, _DRIVE_TEST_PATCHES, _LEAST_VESSELS = 20, 5, 0.04
_SLICES = 3
_EDGE = 32  # voxels of a volume's patch: the organ with some room around it
_DRAWN = 400
# Shares of [0, 1]: lesions a little darker than tissue whose own shades vary as much, so that clean victims reach
# two thirds, under fine noise.
_SHADES, _MOTTLE, _GRAIN, _DEPTH = 0.12, 0.035, 0.012, (0.06, 0.10)
_NORMAL_MEDIAN = 0.6745  # median of the absolute value of a standard normal
_LESION_SIZE, _LESION_SHARE = 3.0, 0.12


@dataclass(frozen=True, eq=False)
class SegmentationCohort:
    """What a public source, three hospitals and the test set hold; no image is in two of them."""

    public: Patches
    sites: tuple[Patches, ...]
    test: Patches

    @property
    def union(self) -> Patches:
        """What all sites hold together."""
        return joined(self.sites)


@dataclass(frozen=True)
class Difficulty:
    """What the images themselves leave for noise to do.

    Attributes:
        contrast_255: mean distance between foreground and background, median over images, in 1/255.
        grain_255: spread of the fine structure inside the foreground, in 1/255: smaller noise drowns in it.
        constant_mask: Dice of one mask, the same for every image: what positions alone teach.
    """

    contrast_255: float
    grain_255: float
    constant_mask: float


def difficulty(cohort: SegmentationCohort) -> Difficulty:
    """Return what the sites' images leave for noise to do."""
    held, test = cohort.union, cohort.test
    inside = np.broadcast_to(held.labels[:, None] > 0, held.images.shape)
    # The mixed second difference of white noise has twice its spread; of smooth tissue it is nothing.
    mixed = np.diff(np.diff(held.images, axis=-1), axis=-2) / 2
    apart = [
        abs(image[where].mean() - image[~where].mean())
        for image, where in zip(held.images, inside, strict=True)
        if where.any() and not where.all()
    ]
    constant = constant_mask_dice(held.labels, test.labels, held.classes)
    return Difficulty(
        contrast_255=255 * float(np.median(apart)),
        grain_255=255 * float(np.median(np.abs(mixed[inside[..., 1:, 1:]])) / _NORMAL_MEDIAN),
        constant_mask=float(np.mean(constant)),
    )


def joined(parts: Sequence[Patches]) -> Patches:
    """Return several sets as one."""
    images = np.concatenate([part.images for part in parts])
    return Patches(images, np.concatenate([part.labels for part in parts]), parts[0].classes)


def planes_of(volumes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a few slices of every volume, ``(N, C, rows, columns)``, with theirs of its label map."""
    chosen = [(at, z) for at, mask in enumerate(labels) for z in _fullest(mask)]
    return np.stack([volumes[at][:, z] for at, z in chosen]), np.stack([labels[at][z] for at, z in chosen])


def _fullest(labels: np.ndarray) -> np.ndarray:
    """Return the slices of a label map that mark most, every third of them: neighbours look alike."""
    return np.argsort(-(labels > 0).sum((1, 2)), kind="stable")[: 3 * _SLICES : 3]


def _drive(folder: Path) -> SegmentationCohort:
    """Retinal vessels: native-resolution patches of DRIVE inside the field of view, RGB; two classes."""
    rng = np.random.default_rng(_SEED)

    def patches(split: str, per_image: int) -> list[Patches]:
        found = []
        for file in sorted((folder / split / "image").glob("*.png")):
            image = _picture(file)
            vessels = _mask(next((folder / split / "vessel").glob(f"{file.stem}*")))
            view = _mask(next((folder / split / "fov").glob(f"{file.stem}*")))
            found.append(_cut(image, vessels, view, per_image, rng))
        return found

    train, test = patches("train", _DRIVE_PATCHES), patches("test", _DRIVE_TEST_PATCHES)
    return _dealt(train, public=8, test=test)


def _cut(
    image: np.ndarray, vessels: np.ndarray, view: np.ndarray, count: int, rng: np.random.Generator
) -> Patches:
    images, labels = [], []
    rows, columns = vessels.shape
    while len(images) < count:
        top, left = int(rng.integers(rows - _SIDE)), int(rng.integers(columns - _SIDE))
        where = np.s_[top : top + _SIDE, left : left + _SIDE]
        if view[where].all() and vessels[where].mean() >= _LEAST_VESSELS:
            images.append(image[where].transpose(2, 0, 1))
            labels.append(vessels[where])
    return Patches(np.stack(images), np.stack(labels).astype(np.int64), 2)


def _wbc(folder: Path) -> SegmentationCohort:
    """White blood cells: whole crops at 48 pixels, RGB; background, cytoplasm, nucleus."""
    found = []
    for file in sorted((folder / "images").glob("*.png")):
        image = Image.open(file).convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        mask = Image.open(folder / "masks" / file.name).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
        found.append(Patches(pixels[None], np.asarray(mask).astype(np.int64)[None], 3))
    return _quartered(found)


def _hippocampus(folder: Path) -> SegmentationCohort:
    """Hippocampus: slices of MR crops in 8 bits, padded or cut to 48 pixels; background, anterior, posterior."""
    found = []
    for scaled, labels in _volumes(folder):
        full = _fullest(labels.transpose(2, 0, 1))
        images = np.stack([_centred(scaled[:, :, z], _SLICE_SIDE) for z in full])
        found.append(
            Patches(images[:, None], np.stack([_centred(labels[:, :, z], _SLICE_SIDE) for z in full]), 3)
        )
    return _quartered(found)


def _hippocampus_volumes(folder: Path) -> SegmentationCohort:
    """Hippocampus: the MR crops themselves, 32 voxels a side; background, anterior, posterior."""
    found = []
    for scaled, labels in _volumes(folder):
        # NIfTI counts columns, rows, slices; patches count slices first.
        volume, mask = (_centred(array.transpose(2, 1, 0), _EDGE) for array in (scaled, labels))
        found.append(Patches(volume[None, None], mask[None], 3))
    return _quartered(found)


def _volumes(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield volumes in 8 bits, as float32 in [0, 1], with their label maps, int64."""
    import nibabel

    for file in sorted((folder / "images").glob("*.nii.gz")):
        volume = np.asarray(nibabel.load(file).dataobj, np.float32)
        labels = np.asarray(nibabel.load(folder / "labels" / file.name).dataobj).astype(np.int64)
        low, high = np.percentile(volume, (0.5, 99.5))
        scaled = np.rint(np.clip((volume - low) / max(high - low, 1e-6), 0, 1) * 255) / np.float32(255)
        yield scaled.astype(np.float32), labels


def _lesions(folder: Path) -> SegmentationCohort:
    """Drawn grey images: dark, irregular lesions on mottled tissue; background, lesion. No folder is read."""
    rng = np.random.default_rng(_SEED)
    found = []
    for _ in range(_DRAWN):
        lesion = _field(rng, _LESION_SIZE)
        mask = lesion > np.quantile(lesion, 1 - _LESION_SHARE)
        tissue = 0.5 + _SHADES * _field(rng, 12.0) + _MOTTLE * _field(rng, 2.0)
        tissue += _GRAIN * rng.standard_normal(tissue.shape)
        dark = rng.uniform(*_DEPTH) * ndimage.gaussian_filter(mask.astype(np.float64), 0.7)
        pixels = np.rint(255 * np.clip(tissue - dark, 0, 1)).astype(np.float32) / np.float32(255)
        found.append(Patches(pixels[None, None], mask.astype(np.int64)[None], 2))
    return _quartered(found)


def _field(rng: np.random.Generator, size: float) -> np.ndarray:
    """Return smooth noise of unit spread whose blobs are about ``size`` pixels wide."""
    smooth = ndimage.gaussian_filter(rng.standard_normal((_SIDE, _SIDE)), size, mode="wrap")
    return np.asarray((smooth - smooth.mean()) / smooth.std())


def _centred(array: np.ndarray, side: int) -> np.ndarray:
    """Return an array cut or zero-padded about its middle, ``side`` long on every axis."""
    out = np.zeros((side,) * array.ndim, array.dtype)
    take = [min(side, length) for length in array.shape]
    source = tuple(slice((n - t) // 2, (n - t) // 2 + t) for n, t in zip(array.shape, take, strict=True))
    target = tuple(slice((side - t) // 2, (side - t) // 2 + t) for t in take)
    out[target] = array[source]
    return out


def _quartered(images: Sequence[Patches]) -> SegmentationCohort:
    """Deal images out that come without a split: a quarter is the test, a quarter public."""
    order = np.random.default_rng(_SEED).permutation(len(images)).tolist()
    quarter = len(images) // 4
    shuffled = [images[i] for i in order]
    return _dealt(shuffled[quarter:], public=quarter, test=shuffled[:quarter])


def _dealt(images: Sequence[Patches], *, public: int, test: Sequence[Patches]) -> SegmentationCohort:
    """Deal images out: the first are public, the rest goes round the sites."""
    rest = images[public:]
    sites = tuple(joined(rest[number::SITES]) for number in range(SITES))
    return SegmentationCohort(joined(images[:public]), sites, joined(test))


def _picture(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"), np.float32) / np.float32(255)


def _mask(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("L")) > 127


COHORTS: dict[str, tuple[str, Callable[[Path], SegmentationCohort]]] = {
    "drive": ("seg_drive", _drive),
    "wbc": ("seg_wbc1", _wbc),
    "hippocampus": ("nii_hippocampus_a", _hippocampus),
    "drawn": ("", _lesions),
    "hippocampus-volumes": ("nii_hippocampus_a", _hippocampus_volumes),
}
"""Name to folder (none for what is drawn here) and reader."""
VOLUME_COHORTS = ("hippocampus-volumes",)
"""Those that hold volumes."""
