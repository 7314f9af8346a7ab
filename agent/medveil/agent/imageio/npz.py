"""NPZ in the MedMNIST layout: ``{split}_images`` with ``{split}_labels``, any split names, 8 or 16 bit.

Every split is protected: a split left clean would be training data. Rows that cannot be released are left
out of the copy together with their labels; they stay in the source and in the sealed sidecar.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import numpy as np
from numpy.lib import format as npy

from medveil.agent.imageio.base import Frames, Item
from medveil.agent.imageio.full_range import FullRange
from medveil.agent.imageio.image import Image, Label, StoredArray
from medveil.agent.imageio.limits import check_size, occupied_maximum
from medveil.models.disk import DAMAGE, decode_error
from medveil.models.errors import ImageError

__all__ = ["NpzFormat"]

_ZIP_MAGIC: Final = b"PK\x03\x04"
_IMAGES: Final = "_images"
_LABELS: Final = "_labels"
_ZIP_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest time a ZIP can name: same input, same bytes
_MAX_OTHER_BYTES: Final = 2**28  # labels and side arrays are held in memory; our choice
_COPY_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class _Array:
    """One member of the archive, as its header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    compressed: bool

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_images(self) -> bool:
        return self.name.endswith(_IMAGES)


@dataclass(frozen=True, slots=True)
class _Split:
    """One images array, its labels, and where its rows stand in the file's frame count."""

    images: _Array
    labels: Sequence[Label]
    first: int

    @property
    def rows(self) -> int:
        return self.images.shape[0]


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except (zipfile.BadZipFile, *DAMAGE) as exc:
        raise decode_error(exc, "damaged", "This NPZ cannot be read to its end; copy it again.") from exc


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy.read_magic(member)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = reader(member)
    except ValueError as exc:
        raise ImageError("damaged", "An array of this NPZ has no valid header.", private=str(exc)) from exc
    return tuple(shape), bool(fortran), dtype


def _arrays(archive: zipfile.ZipFile, *, holds_values: bool = True) -> list[_Array]:
    """List the members from their headers; no array is loaded and nothing is unpickled.

    Args:
        archive: the open archive.
        holds_values: False for the layout that `NpzFormat.patch` keeps, which has headers only for images.

    Raises:
        ImageError: ``object-array``, ``not-an-array`` or ``damaged``.
    """
    found = []
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            raise ImageError("not-an-array", "This NPZ holds something that is not an array; save it again.")
        with archive.open(info) as member:
            shape, fortran, dtype = _read_header(member)
            header_bytes = member.tell()
        if any(length < 0 for length in shape):
            raise ImageError("damaged", "An array of this NPZ claims a negative size.")
        if dtype.hasobject:
            raise ImageError(
                "object-array",
                "This NPZ holds Python objects, which medveil never loads; save plain arrays instead.",
            )
        array = _Array(info.filename[:-4], shape, dtype, fortran, info.compress_type != zipfile.ZIP_STORED)
        if holds_values and info.file_size - header_bytes != array.size_bytes:
            # Checked before anything is unpacked: a member may claim one size and hold another.
            raise ImageError("damaged", "An array of this NPZ is not as large as it says; copy it again.")
        found.append(array)
    return found


def _check_images(array: _Array) -> None:
    if array.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ImageError(
            "sample-type", "The images of this NPZ are neither uint8 nor uint16.", private=str(array.dtype)
        )
    channels_fit = len(array.shape) == 3 or (len(array.shape) == 4 and array.shape[3] in (1, 3))
    if not channels_fit or array.fortran:
        raise ImageError(
            "layout",
            "The images of this NPZ are not (N, H, W) or (N, H, W, 1 or 3).",
            private=str(array.shape),
        )
    if array.shape[0]:
        check_size(array.shape[1], array.shape[2])


def _check_other(array: _Array) -> None:
    """Refuse an array that may hold clean pictures under a name that medveil doesn't know.

    Raises:
        ImageError: ``unknown-array`` or ``too-large``.
    """
    if not array.name.endswith(_LABELS) and len(array.shape) >= 3:
        raise ImageError(
            "unknown-array",
            "This NPZ holds an array that may be pictures but is not called <split>_images; rename it.",
        )
    if array.size_bytes > _MAX_OTHER_BYTES:
        raise ImageError("too-large", "A labels array of this NPZ is larger than medveil reads at once.")


def _load(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(f"{name}.npy") as member:
        return npy.read_array(member, allow_pickle=False)


def _row_labels(labels: Any | None, rows: int) -> list[Label]:
    """Return one stored label value per row; None where the file has none.

    Raises:
        ImageError: ``label-count``, ``multi-label`` or ``label-type``.
    """
    if labels is None:
        return [None] * rows
    if labels.shape[:1] != (rows,):
        raise ImageError("label-count", "This NPZ has not as many labels as images.")
    if labels.size != rows:
        raise ImageError("multi-label", "This NPZ has several labels per image; one is needed.")
    flat = labels.reshape(rows)
    if flat.dtype.kind in "iub":
        return [int(value) for value in flat]
    if flat.dtype.kind == "f":
        return [int(value) if float(value).is_integer() else None for value in flat]
    if flat.dtype.kind == "U":
        return [str(value) for value in flat]
    raise ImageError("label-type", "The labels of this NPZ are neither numbers nor text.")


def _splits(archive: zipfile.ZipFile, arrays: Sequence[_Array]) -> list[_Split]:
    names = {array.name for array in arrays}
    splits, first = [], 0
    for array in arrays:
        if not array.is_images:
            continue
        label_name = array.name.removesuffix(_IMAGES) + _LABELS
        labels = _load(archive, label_name) if label_name in names else None
        splits.append(_Split(array, _row_labels(labels, array.shape[0]), first))
        first += array.shape[0]
    return splits


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of all splits, mapped from unpacked arrays; the frame number runs through them all."""

    item: Item
    splits: Sequence[_Split]
    mapped: Sequence[StoredArray]
    maxima: Sequence[int]

    def __len__(self) -> int:
        return self.item.frames

    def __getitem__(self, frame: int) -> Image:
        for split, pixels, maximum in zip(self.splits, self.mapped, self.maxima, strict=True):
            row = frame - split.first
            if 0 <= row < split.rows:
                stored = np.array(pixels[row])
                flat = stored[:, :, 0] if stored.ndim == 3 and stored.shape[2] == 1 else stored
                return Image(flat, FullRange(maximum), self.item.relative, frame, split.labels[row])
        raise IndexError(frame)


@dataclass(frozen=True, slots=True)
class NpzFormat:
    """MedMNIST-layout NPZ as a stream: memory holds one image, the disk one unpacked copy."""

    name: str = "npz"

    def recognises(self, head: bytes, path: Path) -> bool:
        """Return whether the file is a ZIP whose first member is an array: NPZ has no signature."""
        if not head.startswith(_ZIP_MAGIC) or len(head) < 30:
            return path.suffix.lower() == ".npz"
        name_length = int.from_bytes(head[26:28], "little")
        return head[30 : 30 + name_length].endswith(b".npy") or path.suffix.lower() == ".npz"

    def inspect(self, path: Path, relative: PurePosixPath) -> Item:
        """Describe an NPZ from the headers of its arrays."""
        with _archive(path) as archive:
            arrays = _arrays(archive)
            images = [array for array in arrays if array.is_images]
            if not images:
                raise ImageError("no-images", "This NPZ has no array named <split>_images.")
            for array in arrays:
                (_check_images if array.is_images else _check_other)(array)
            splits = _splits(archive, arrays)
        rows = sum(split.rows for split in splits)
        if rows == 0:
            raise ImageError("no-pixels", "The image arrays of this NPZ have no rows.")
        return Item(
            path=path,
            relative=relative,
            target=relative,
            format=self.name,
            frames=rows,
            size_bytes=path.stat().st_size,
            pixels=sum(math.prod(array.shape) for array in images),
            splittable=True,
        )

    @contextmanager
    def open(self, item: Item, scratch: Path) -> Iterator[Frames]:
        """Unpack the image arrays into ``scratch`` and map them; cleaned up on the way out."""
        unpacked = tempfile.TemporaryDirectory(dir=scratch, prefix="npz-")
        with unpacked as folder:
            with _archive(item.path) as archive:
                splits = _splits(archive, _arrays(archive))
                mapped = [
                    _unpack(archive, split.images, Path(folder) / f"{number}.npy")
                    for number, split in enumerate(splits)
                ]
            # One range for the whole file: its splits come from one scanner and meet again in one training
            # set.
            largest = max((int(row.max()) for pixels in mapped for row in pixels), default=0)
            maxima = [occupied_maximum(largest, split.images.dtype.itemsize * 8) for split in splits]
            yield _Rows(item, splits, mapped, maxima)

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        """Write the archive anew: same members in the same order, released rows only, fixed time stamps."""
        stream = iter(pixels)
        with _archive(item.path) as source:
            arrays = _arrays(source)
            splits = _splits(source, arrays)
            kept = {
                split.images.name.removesuffix(_IMAGES): [
                    frame - split.first for frame in frames if split.first <= frame < split.first + split.rows
                ]
                for split in splits
            }
            with zipfile.ZipFile(target, "w") as archive:
                for array in arrays:
                    with _member(archive, array) as member:
                        self._write_member(source, array, kept, stream, member)

    @staticmethod
    def _write_member(
        source: zipfile.ZipFile,
        array: _Array,
        kept: Mapping[str, Sequence[int]],
        stream: Iterator[StoredArray],
        member: IO[bytes],
    ) -> None:
        split = array.name.removesuffix(_IMAGES).removesuffix(_LABELS)
        if array.is_images:
            _write_rows(member, array, len(kept[split]), stream)
        elif array.name.endswith(_LABELS) and split in kept:
            npy.write_array(member, _load(source, array.name)[kept[split]], allow_pickle=False)
        else:
            with source.open(f"{array.name}.npy") as original:
                shutil.copyfileobj(original, member, _COPY_BYTES)

    @contextmanager
    def read_back(self, target: Path) -> Iterator[Iterable[StoredArray]]:
        """Decode the written rows as a stream, split by split."""
        with _archive(target) as archive:
            yield self._stream(archive)

    @staticmethod
    def _stream(archive: zipfile.ZipFile) -> Iterator[StoredArray]:
        for array in _arrays(archive):
            if array.is_images:
                with archive.open(f"{array.name}.npy") as member:
                    _read_header(member)
                    yield from _read_rows(member, array)

    def patch(self, item: Item) -> bytes:
        """Return the image headers and all labels: what the rows that were left out took with them."""
        with _archive(item.path) as source:
            arrays = _arrays(source)
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for array in arrays:
                    with _member(archive, array) as member:
                        if array.is_images:
                            _write_array_header(member, array, array.shape[0])
                        else:
                            with source.open(f"{array.name}.npy") as original:
                                shutil.copyfileobj(original, member, _COPY_BYTES)
        return buffer.getvalue()

    def restore(self, protected: Path, pixels: Iterable[StoredArray], patch: bytes, target: Path) -> None:
        """Write every original row and every array; all arrays equal those of the source."""
        stream = iter(pixels)
        with _archive_of(patch) as layout, zipfile.ZipFile(target, "w") as archive:
            for array in _arrays(layout, holds_values=False):
                with _member(archive, array) as member:
                    if array.is_images:
                        _write_rows(member, array, array.shape[0], stream)
                    else:
                        with layout.open(f"{array.name}.npy") as original:
                            shutil.copyfileobj(original, member, _COPY_BYTES)


@contextmanager
def _archive_of(data: bytes) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        yield archive


def _member(archive: zipfile.ZipFile, array: _Array) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{array.name}.npy", _ZIP_EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED if array.compressed else zipfile.ZIP_STORED
    info.external_attr = 0o600 << 16
    return archive.open(info, "w", force_zip64=array.size_bytes >= zipfile.ZIP64_LIMIT)


def _write_array_header(member: IO[bytes], array: _Array, rows: int) -> None:
    description = {
        "descr": npy.dtype_to_descr(array.dtype),
        "fortran_order": False,
        "shape": (rows, *array.shape[1:]),
    }
    npy.write_array_header_1_0(member, description)


def _write_rows(member: IO[bytes], array: _Array, rows: int, stream: Iterator[StoredArray]) -> None:
    _write_array_header(member, array, rows)
    for _ in range(rows):
        member.write(np.ascontiguousarray(next(stream), array.dtype).tobytes())


def _read_rows(member: IO[bytes], array: _Array) -> Iterator[StoredArray]:
    shape = array.shape[1:3] if array.shape[3:] == (1,) else array.shape[1:]
    row_bytes = math.prod(shape) * array.dtype.itemsize
    for _ in range(array.shape[0]):
        data = member.read(row_bytes)
        if len(data) < row_bytes:
            raise ImageError("truncated", "An image array of this NPZ ends early; copy it again.")
        yield np.frombuffer(data, array.dtype).reshape(shape)


def _unpack(archive: zipfile.ZipFile, array: _Array, target: Path) -> StoredArray:
    with archive.open(f"{array.name}.npy") as member, target.open("wb") as file:
        shutil.copyfileobj(member, file, _COPY_BYTES)
    if array.shape[0] == 0:
        return np.empty(array.shape, array.dtype)  # a file of no rows cannot be mapped
    try:
        mapped: StoredArray = npy.open_memmap(target, mode="r")
    except ValueError as exc:
        raise ImageError(
            "truncated", "An image array of this NPZ ends early; copy it again.", private=str(exc)
        ) from exc
    return mapped
