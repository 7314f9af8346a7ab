"""Read images with their label maps: ``images/`` beside ``masks/`` or ``labels/``, or an NPZ of both.

    DATA/images/NAME.png     DATA/masks/NAME.png         8 or 16 bits, grey or RGB; masks hold one value per class
    DATA/images/NAME.nii.gz  DATA/labels/NAME.nii.gz     volumes, in the window of their own percentiles
    DATA/imagesTr/...        DATA/labelsTr/...           the same, as the Medical Segmentation Decathlon calls it
    DATA.npz                 images (N, H, W[, 3]), masks (N, H, W); or train_images, train_masks

The value 0 is background. Images keep their own size: generators are trained at the resolution they are used at.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medveil.models.datasets.decode import decode, is_image
from medveil.models.errors import ConfigurationError, InputError
from medveil.models.methods.oracle import FloatArray

__all__ = ["MaskedSet", "Patches", "cut_patches", "load_masked"]

_IntArray = npt.NDArray[np.int64]

_FOLDERS = (("images", "masks"), ("images", "labels"), ("imagesTr", "labelsTr"))
_VOLUME_SUFFIXES = (".nii", ".nii.gz")
# The window of a volume without one, as the site's NIfTI reader takes it.
_WINDOW_PERCENTILES = (0.5, 99.5)
# Draws per patch before a position without foreground is taken: half of all patches should hold some.
_TRIES = 8
_MOST_VALUES = 1 << 16  # of a 16-bit mask


@dataclass(frozen=True, eq=False)
class MaskedSet:
    """Images with label maps, each of its own size.

    Attributes:
        images: ``(C, rows, columns)`` or ``(C, slices, rows, columns)`` float32 in [0, 1] each, all of one C.
        labels: int64 over the same pixels, index into ``classes``.
        classes: class names; the first is background.
        stored_values: the mask value each class is stored under; the first is 0.
        digest: SHA-256 over pixels, label maps and names.
    """

    images: tuple[FloatArray, ...]
    labels: tuple[_IntArray, ...]
    classes: tuple[str, ...]
    stored_values: tuple[int, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return int(self.images[0].shape[0])


@dataclass(frozen=True, eq=False)
class Patches:
    """Images of one size with their label maps.

    Attributes:
        images: ``(N, C, rows, columns)`` or ``(N, C, slices, rows, columns)``, float32 in [0, 1].
        labels: ``(N, ...)`` int64 class index over the same pixels, 0 for background.
        classes: K, background included.
    """

    images: FloatArray
    labels: _IntArray
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: _IntArray) -> Patches:
        """Return the patches at ``index``, in that order."""
        return Patches(self.images[index], self.labels[index], self.classes)


def load_masked(path: Path, *, class_names: Sequence[str] | None = None) -> MaskedSet:
    """Read images and their label maps.

    Args:
        path: folder or NPZ file.
        class_names: names for the mask values in ascending order, background first; None: the values themselves.

    Raises:
        InputError: "data-missing", "data-format", "no-images", "mask-missing", "mask-size", "mask-values",
            "no-foreground", "not-finite", "unreadable-image".
        ConfigurationError: "class-names".
    """
    if not path.exists():
        raise InputError("data-missing", "The data is not there; check its path.", private=str(path))
    pairs = list(_from_npz(path) if path.is_file() else _from_folder(path))
    if not pairs:
        raise InputError("no-images", "The data holds no images.")
    values = sorted({int(value) for _, mask in pairs for value in np.unique(mask)} | {0})
    if values[0] < 0 or len(values) < 2:
        code, what = ("mask-values", "values below 0") if values[0] < 0 else ("no-foreground", "no class")
        raise InputError(code, f"The masks hold {what}: 0 is background, each class has a value above it.")
    channels = max(image.shape[0] for image, _ in pairs)
    images = tuple(np.broadcast_to(i, (channels, *i.shape[1:])).astype(np.float32) for i, _ in pairs)
    labels = tuple(np.searchsorted(values, mask).astype(np.int64) for _, mask in pairs)
    names = ("background", *(str(value) for value in values[1:]))
    if class_names is not None:
        if len(class_names) != len(values) or len(set(class_names)) != len(values):
            raise ConfigurationError(
                "class-names", f"The masks hold {len(values)} values, background included; name each once."
            )
        names = tuple(class_names)
    return MaskedSet(images, labels, names, tuple(values), _digest(images, labels, names))


def _from_folder(path: Path) -> Iterator[tuple[FloatArray, _IntArray]]:
    pairs = [(path / images, path / masks) for images, masks in _FOLDERS]
    folder, masks = next((pair for pair in pairs if all(each.is_dir() for each in pair)), (path, None))
    if masks is None:
        raise _data_format(path)
    by_stem = {_stem(file): file for file in sorted(masks.iterdir()) if not file.name.startswith(".")}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file():
            continue
        mask = by_stem.get(_stem(file))
        if mask is None:
            raise InputError("mask-missing", "An image has no mask of its name.", private=str(file))
        yield _fitting(*_read_pair(file, mask), file)


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").rpartition(".")[0] or file.name


def _read_pair(image: Path, mask: Path) -> tuple[FloatArray, _IntArray]:
    if image.name.endswith(_VOLUME_SUFFIXES):
        return _windowed(_volume(image))[None], _whole(_volume(mask), mask)
    if not is_image(image):
        raise InputError(
            "unreadable-image", "A file among the images is none; remove it.", private=str(image)
        )
    stored, marks = decode(image), decode(mask)
    if marks.ndim == 3:  # an indexed or grey mask that was saved as RGB
        if (marks != marks[..., :1]).any():
            raise InputError("mask-values", "A mask is in colour: give each class one grey value.")
        marks = marks[..., 0]
    return _planes(stored), marks.astype(np.int64)


def _planes(stored: npt.NDArray[np.unsignedinteger]) -> FloatArray:
    """Return ``(C, rows, columns)`` in [0, 1] of the stored type's range."""
    planes = stored[None] if stored.ndim == 2 else np.moveaxis(stored, 2, 0)
    return np.asarray(planes / np.float32(np.iinfo(stored.dtype).max), np.float32)


def _volume(file: Path) -> npt.NDArray[np.float64]:
    """Return ``(slices, rows, columns)``: NIfTI's last axis first, so that a slice is a plane."""
    import nibabel

    try:
        values = np.asarray(nibabel.load(file).dataobj, np.float64)  # type: ignore[attr-defined]
    except Exception as exc:  # nibabel, gzip and zlib each have their own errors for damaged bytes
        raise InputError(
            "unreadable-image", "A volume is damaged or of a kind that is not read.", private=str(file)
        ) from exc
    if values.ndim != 3:
        raise InputError("data-format", "A volume must have three axes.", private=str(file))
    if not np.isfinite(values).all():
        raise InputError("not-finite", "A volume holds values that are not numbers.", private=str(file))
    return np.moveaxis(values, 2, 0)


def _whole(values: npt.NDArray[np.float64], file: Path) -> _IntArray:
    if (values != np.rint(values)).any():
        raise InputError("mask-values", "A mask holds values that are no whole numbers.", private=str(file))
    return values.astype(np.int64)


def _windowed(values: npt.NDArray[np.float64]) -> FloatArray:
    low, high = np.percentile(values, _WINDOW_PERCENTILES)
    return np.asarray(np.clip((values - low) / max(high - low, np.finfo(np.float64).tiny), 0, 1), np.float32)


def _from_npz(path: Path) -> Iterator[tuple[FloatArray, _IntArray]]:
    try:
        # The file is ours to close: NumPy leaves it open when it is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            prefix = "train_" if "train_images" in archive.files else ""
            images, masks = archive[f"{prefix}images"], archive[f"{prefix}masks"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as exc:
        raise _data_format(path) from exc
    grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if not grey_or_rgb or images.dtype not in (np.uint8, np.uint16) or masks.dtype.kind not in "iu":
        raise _data_format(path)
    if len(masks) != len(images):
        raise InputError("mask-missing", "Every image needs exactly one mask.")
    for image, mask in zip(images, masks, strict=True):
        yield _fitting(_planes(image), mask.astype(np.int64), path)


def _fitting(image: FloatArray, mask: _IntArray, file: Path) -> tuple[FloatArray, _IntArray]:
    if mask.shape != image.shape[1:]:
        raise InputError("mask-size", "A mask does not have its image's size.", private=str(file))
    if mask.max(initial=0) >= _MOST_VALUES:
        raise InputError("mask-values", "A mask holds values too large for a class.", private=str(file))
    return image, mask


def _data_format(path: Path) -> InputError:
    return InputError(
        "data-format",
        "The data must be a folder with images/ and masks/ (or labels/, or imagesTr/ and labelsTr/), or an NPZ with "
        "images and masks.",
        private=str(path),
    )


def cut_patches(
    data: MaskedSet, side: int, per_image: int, rng: np.random.Generator, *, depth: int | None = None
) -> Patches:
    """Return patches drawn from every image, most of them with foreground.

    Args:
        data: the images; those of volumes are cut to slices unless ``depth`` is given.
        side: rows and columns of a patch; smaller images are padded with zeros at the bottom and the right.
        per_image: patches of each image.
        rng: where they lie.
        depth: slices of a patch of a volume.
    """
    images, labels = [], []
    for image, label in zip(data.images, data.labels, strict=True):
        shape = (side, side) if label.ndim == 2 else (depth or 1, side, side)
        pixels, marks = _padded(image, shape), _padded(label, shape)
        for _ in range(per_image):
            where = _position(marks, shape, rng)
            images.append(pixels[(slice(None), *where)])
            labels.append(marks[where])
    found = Patches(np.stack(images), np.stack(labels), len(data.classes))
    if found.labels.ndim == 4 and depth is None:
        return Patches(found.images[:, :, 0], found.labels[:, 0], found.classes)
    return found


def _padded(array: npt.NDArray[np.generic], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    space = array.shape[-len(shape) :]
    missing = [(0, max(0, wanted - length)) for wanted, length in zip(shape, space, strict=True)]
    return np.pad(array, [(0, 0)] * (array.ndim - len(shape)) + missing)


def _position(
    marks: npt.NDArray[np.generic], shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[slice, ...]:
    """Return a place for a patch: the first of a few draws that holds foreground, else the last one."""
    for _ in range(_TRIES):
        starts = [
            int(rng.integers(length - wanted + 1)) for length, wanted in zip(marks.shape, shape, strict=True)
        ]
        where = tuple(slice(start, start + wanted) for start, wanted in zip(starts, shape, strict=True))
        if marks[where].any():
            break
    return where


def _digest(images: Sequence[FloatArray], labels: Sequence[_IntArray], names: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(tuple(names)).encode())
    for image, label in zip(images, labels, strict=True):
        digest.update(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image, "<f4").tobytes())
        digest.update(np.ascontiguousarray(label, "<i8").tobytes())
    return digest.hexdigest()
