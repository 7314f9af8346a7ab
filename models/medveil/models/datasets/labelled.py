"""Read a labelled set: a MedMNIST-layout NPZ, a folder per class, or images beside a labels CSV."""

from __future__ import annotations

import csv
import hashlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medveil.models.datasets.decode import decode, is_image
from medveil.models.errors import ConfigurationError, InputError
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.transforms import Channels, Resize

__all__ = ["LabelledSet", "load_labelled", "split_names"]

_Stored = npt.NDArray[np.unsignedinteger]

_LABELS_FILE = "labels.csv"
_SPLIT_FOLDERS = frozenset({"train", "val", "test"})
_NPZ_IMAGES = re.compile(r"(\w+)_images")
_LARGEST_DEFAULT_SIZE = 64
"""Side to which larger images are brought when nobody names one: what trains in minutes on a CPU (our choice)."""


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Images and their classes.

    Attributes:
        images: ``(N, C, size, size)`` float32 in [0, 1] (0 and 1 are the ends of the stored type's range).
        labels: ``(N,)`` int64, index into ``classes``.
        classes: class names, in the order of their stored values.
        stored_values: the label value each class is stored under.
        digest: SHA-256 over shape, pixels, labels and names; the same for the same content in any container.
    """

    images: FloatArray
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    stored_values: tuple[int, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


def split_names(path: Path) -> tuple[str, ...]:
    """Return the splits that lie in `path`, sorted; ``("train",)`` when it is not divided.

    Raises:
        InputError: "data-missing", "data-format".
    """
    if _is_file(path):
        with _npz(path) as archive:
            return tuple(sorted(m[1] for name in archive.files if (m := _NPZ_IMAGES.fullmatch(name))))
    table = _labels_table(path)
    if table is not None:
        return tuple(sorted({split for _, _, split in table}))
    folders = {folder.name for folder in _folders(path)}
    return tuple(sorted(folders)) if "train" in folders and folders <= _SPLIT_FOLDERS else ("train",)


def load_labelled(
    path: Path,
    *,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
) -> LabelledSet:
    """Read one split of a labelled set.

    Args:
        path: NPZ file, or folder.
        split: which part; see `split_names`.
        size: rows and columns to bring the images to (antialiased); None: as they are when they are all square
            and alike, and at most 64 pixels.
        channels: 1 or 3; None: 3 when an image has colour, else 1.
        class_names: names for the stored label values in ascending order; None: the folders' or the CSV's own,
            or the values themselves.

    Raises:
        InputError: "data-missing", "data-format", "split-missing", "labels-missing", "labels-mismatch",
            "image-missing", "no-images", "unreadable-image".
        ConfigurationError: "class-names".
    """
    pixels, texts = _read(path, split)
    if not len(pixels):
        raise InputError("no-images", "The data holds no images.")
    names, stored, labels = _encode(texts, class_names)
    images = _common_form(pixels, size, channels)
    return LabelledSet(images, labels, names, stored, _digest(images, labels, names))


def _read(path: Path, split: str) -> tuple[Sequence[_Stored], list[str]]:
    """Return stored pixels and label texts, in one order whatever the file system's."""
    if _is_file(path):
        return _read_npz(path, split)
    table = _labels_table(path)
    if table is not None:
        rows = [(path / name, label) for name, label, row_split in table if row_split == split]
    else:
        root = path / split if split_names(path) != ("train",) or (path / "train").is_dir() else path
        rows = [(file, folder.name) for folder in _folders(root) for file in _files(folder)]
        _refuse_unlabelled(root)
    return _decode_all([file for file, _ in rows]), [label for _, label in rows]


# --- containers ---------------------------------------------------------------------------------------------


def _is_file(path: Path) -> bool:
    if not path.exists():
        raise InputError("data-missing", "The data is not there; check its path.", private=str(path))
    return path.is_file()


@contextmanager
def _npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an archive; the file is ours to close, for NumPy leaves it open when it is no archive."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _data_format(path)
            yield archive
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:  # no archive, cut short, object arrays
        raise _data_format(path) from exc


def _data_format(path: Path) -> InputError:
    return InputError(
        "data-format",
        "The data must be an NPZ with {split}_images and {split}_labels, or a folder of images.",
        private=str(path),
    )


def _read_npz(path: Path, split: str) -> tuple[Sequence[_Stored], list[str]]:
    with _npz(path) as archive:
        if f"{split}_images" not in archive.files:
            raise InputError("split-missing", f"The data has no images for the split {split!r}.")
        if f"{split}_labels" not in archive.files:
            raise InputError("labels-missing", f"The data has no labels for the split {split!r}.")
        images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if not grey_or_rgb or images.dtype not in (np.uint8, np.uint16) or labels.dtype.kind not in "iu":
        raise _data_format(path)
    labels = labels.reshape(len(labels), -1) if len(labels) else labels.reshape(0, 1)
    if len(labels) != len(images) or labels.shape[1] != 1:
        raise InputError("labels-mismatch", "Every image needs exactly one label.")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    return list(images), [str(value) for value in labels[:, 0].tolist()]


def _labels_table(path: Path) -> list[tuple[str, str, str]] | None:
    """Return (file, label, split) of every row of labels.csv, sorted by file; None where there is none."""
    file = path / _LABELS_FILE
    if not file.is_file():
        return None
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise _bad_table(file) from exc
    table = []
    for row in rows:
        name, label = (row.get("file") or "").strip(), (row.get("label") or "").strip()
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise _bad_table(file)
        if not label:
            raise InputError("labels-missing", "A row of the labels file has no label.", private=name)
        table.append((name, label, (row.get("split") or "train").strip()))
    return sorted(table)


def _bad_table(file: Path) -> InputError:
    return InputError(
        "data-format",
        "The labels file needs the columns file and label, one row per image.",
        private=str(file),
    )


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    files = (entry for entry in folder.rglob("*") if entry.is_file() and not entry.name.startswith("."))
    return sorted(files)


def _refuse_unlabelled(root: Path) -> None:
    """Images beside the class folders have no label: to leave them out in silence would be a guess."""
    loose = [e for e in root.iterdir() if e.is_file() and not e.name.startswith(".") and is_image(e)]
    if loose:
        raise InputError(
            "labels-missing",
            "Some images lie outside the class folders and have no label; move them or add labels.csv.",
            private=str(loose[0]),
        )


def _decode_all(files: Iterable[Path]) -> list[_Stored]:
    pixels: list[_Stored] = []
    for file in files:
        if not file.is_file():
            raise InputError(
                "image-missing", "The labels file names an image that is not there.", private=str(file)
            )
        pixels.append(decode(file))
    return pixels


# --- one common form ----------------------------------------------------------------------------------------


def _encode(
    texts: Sequence[str], class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[int, ...], npt.NDArray[np.int64]]:
    """Return class names, stored values and label indices; whole numbers keep their value, names are counted."""
    distinct = sorted(set(texts))
    try:
        by_value = sorted((int(text), text) for text in distinct)
    except ValueError:
        by_value = list(enumerate(distinct))
    index = {text: position for position, (_, text) in enumerate(by_value)}
    names = tuple(text for _, text in by_value)
    if class_names is not None:
        if len(class_names) != len(names) or len(set(class_names)) != len(names):
            raise ConfigurationError(
                "class-names", f"The data has {len(names)} classes; name each of them once."
            )
        names = tuple(class_names)
    labels = np.array([index[text] for text in texts], dtype=np.int64)
    return names, tuple(value for value, _ in by_value), labels


def _common_form(pixels: Sequence[_Stored], size: int | None, channels: int | None) -> FloatArray:
    if size is None:
        sides = {side for image in pixels for side in image.shape[:2]}
        size = min(max(sides), _LARGEST_DEFAULT_SIZE)
    if channels is None:
        channels = 3 if any(_has_colour(image) for image in pixels) else 1
    images = np.empty((len(pixels), channels, size, size), np.float32)
    for target, image in zip(images, pixels, strict=True):
        target[:] = _one(image, size, channels)
    return images


def _has_colour(image: _Stored) -> bool:
    return image.ndim == 3 and bool((image != image[..., :1]).any())


def _one(image: _Stored, size: int, channels: int) -> FloatArray:
    """Return one image as ``(channels, size, size)`` float32 in [0, 1]."""
    full_scale = np.float32(np.iinfo(image.dtype).max)
    planes = image[None, None] if image.ndim == 2 else np.moveaxis(image, 2, 0)[None]
    scaled = planes.astype(np.float32) / full_scale
    if scaled.shape[1] == 3 and channels == 1 and not _has_colour(image):
        scaled = scaled[:, :1]
    if scaled.shape[1] != channels:
        scaled = Channels(scaled.shape[1], channels).apply(scaled)
    if scaled.shape[2:] != (size, size):
        scaled = Resize((scaled.shape[2], scaled.shape[3]), (size, size)).apply(scaled)
    return np.asarray(np.clip(scaled[0], 0, 1), np.float32)


def _digest(images: FloatArray, labels: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((images.shape, tuple(names))).encode())
    digest.update(np.ascontiguousarray(images, "<f4").tobytes())
    digest.update(np.ascontiguousarray(labels, "<i8").tobytes())
    return digest.hexdigest()
