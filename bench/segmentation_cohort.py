"""The hospitals of the segmentation benchmark: real public images, cut to small patches, dealt out by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medveil.models.datasets.masked import Patches

__all__ = ["COHORTS", "SITES", "SegmentationCohort", "joined"]

SITES = 3
_SEED = 20261121
_SIDE = 48
_SLICE_SIDE = 48
# Patches per image, and the least share of vessels in one: a patch without any is scored 0 or 1 by a single pixel.
_DRIVE_PATCHES, _DRIVE_TEST_PATCHES, _LEAST_VESSELS = 20, 5, 0.04
_SLICES = 3


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


def joined(parts: Sequence[Patches]) -> Patches:
    """Return several sets as one."""
    images = np.concatenate([part.images for part in parts])
    return Patches(images, np.concatenate([part.labels for part in parts]), parts[0].classes)


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
    import nibabel

    found = []
    for file in sorted((folder / "images").glob("*.nii.gz")):
        volume = np.asarray(nibabel.load(file).dataobj, np.float32)
        labels = np.asarray(nibabel.load(folder / "labels" / file.name).dataobj).astype(np.int64)
        low, high = np.percentile(volume, (0.5, 99.5))
        scaled = np.rint(np.clip((volume - low) / max(high - low, 1e-6), 0, 1) * 255) / np.float32(255)
        full = np.argsort(-(labels > 0).sum((0, 1)), kind="stable")[: 3 * _SLICES : 3]
        images = np.stack([_square(scaled[:, :, z]) for z in full]).astype(np.float32)
        found.append(Patches(images[:, None], np.stack([_square(labels[:, :, z]) for z in full]), 3))
    return _quartered(found)


def _square(plane: np.ndarray) -> np.ndarray:
    """Return a plane cut or zero-padded about its middle."""
    out = np.zeros((_SLICE_SIDE, _SLICE_SIDE), plane.dtype)
    take = [min(_SLICE_SIDE, length) for length in plane.shape]
    source = tuple(slice((n - t) // 2, (n - t) // 2 + t) for n, t in zip(plane.shape, take, strict=True))
    target = tuple(slice((_SLICE_SIDE - t) // 2, (_SLICE_SIDE - t) // 2 + t) for t in take)
    out[target] = plane[source]
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
}
"""Name to folder and reader."""
