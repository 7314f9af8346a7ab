"""NIfTI volumes (``.nii``, ``.nii.gz``): only voxel bytes change, every other byte of the file stays.

nibabel reads the header and judges it, but the file is not written through it: handed floats, it invents a
new slope and intercept. Instead the voxel block is replaced inside the original bytes, so header, affine,
qform, sform, extensions and trailing bytes are the same by construction.

Values stay as stored, unscaled. Slope and intercept only matter for a window that the policy gives in scaled
units. A volume is cut into frames along its third axis, each ``(rows, columns)`` = ``(y, x)``.

The budget is counted in one window for the whole volume: the policy's, or the 0.5th to 99.5th percentile of
its values. Many float volumes were integers once: where all values lie on a regular grid, changes are whole
steps of it. Off-grid values would give the change away and vanish when rounded back.

Label maps lie in a folder or carry a name that says so, *and* hold few whole numbers. They are companions and
copied byte for byte. A volume for which only one of the two holds is not guessed at; it is refused by name.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medveil.agent.imageio.base import Frames, Item
from medveil.agent.imageio.image import Image, StoredArray
from medveil.agent.imageio.limits import check_size, read_bytes
from medveil.agent.imageio.naming import is_named_as_mask
from medveil.agent.imageio.nifti_window import SpanWindow, volume_window
from medveil.agent.imageio.window import DEFAULT_PERCENTILES
from medveil.models.errors import ImageError

__all__ = ["NiftiFormat", "NiftiFrames"]

NO_FRAMES: Final[tuple[Image, ...]] = ()

# nibabel writes what it mends in a damaged header to stderr, past every handler; what matters is raised.
nib.imageglobals.logger.setLevel(logging.CRITICAL)

GZIP_MAGIC: Final = b"\x1f\x8b"
NIFTI1_MAGIC: Final = b"n+1\x00"  # header and voxels in one file; at byte 344 (NIfTI-1.1, nifti1.h)
NIFTI1_PAIR: Final = b"ni1\x00"
NIFTI2_MAGIC: Final = b"n+2\x00\r\n\x1a\n"  # at byte 4
NIFTI1_MAGIC_AT: Final = 344
NIFTI2_MAGIC_AT: Final = 4
HEADER_BYTES: Final = 352
"""Enough of the file to see either magic."""

MAX_UNPACKED_BYTES: Final = 2**31
"""Largest volume held in memory; a gzip file of a few megabytes can claim more (our choice)."""

READ_STEP: Final = 1 << 24

MAX_LABELS: Final = 64
"""A label map of organs rarely has more values (our choice)."""


@dataclass(frozen=True, slots=True)
class _Volume:
    """One file taken apart: ``before + voxels + after`` are its (unpacked) bytes.

    Attributes:
        header: nibabel's view of the header.
        before: everything up to the voxels.
        voxels: ``(slices, rows, columns)`` stored values in the file's byte order, a view of its bytes.
        after: what follows them.
    """

    header: Any
    before: bytes
    voxels: npt.NDArray[Any]
    after: bytes


@dataclass(frozen=True, slots=True)
class NiftiFrames:
    """The slices of one volume."""

    volume: _Volume
    window: SpanWindow
    path: PurePosixPath

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.volume.voxels)

    def __getitem__(self, frame: int) -> Image:
        """Return one slice, stored values in the machine's byte order."""
        pixels = self.volume.voxels[frame]
        return Image(pixels.astype(pixels.dtype.newbyteorder("=")), self.window, self.path, frame)


@dataclass(frozen=True, slots=True)
class NiftiFormat:
    """Reads and writes NIfTI; see ``base.ImageFormat``.

    Attributes:
        window: lower and upper end of the release window in scaled units; None takes percentiles.
        percentiles: the window of last resort, in [0, 100]; None refuses volumes without a window.
    """

    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = DEFAULT_PERCENTILES

    @property
    def name(self) -> str:
        """``"nifti"``."""
        return "nifti"

    def recognises(self, head: bytes, path: Path) -> bool:
        """Return whether the bytes are NIfTI, packed or not, single file or the header of a pair."""
        if head.startswith(GZIP_MAGIC):
            try:
                head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEADER_BYTES)
            except zlib.error:
                return False
            # 512 packed bytes always unpack to a header, for most of it is zero.
        return _is_nifti(head)

    def inspect(self, path: Path, relative: PurePosixPath) -> Item:
        """Describe a volume from its header; a label map's voxels are looked at as well.

        Raises:
            ImageError: ``truncated``, ``too-large``, ``corrupt-header``, ``4d``, ``rgb``, ``nifti-pair``,
                ``not-finite``, ``label-or-image``, ...
        """
        volume = _read(path)
        size = path.stat().st_size
        named = is_named_as_mask(relative)
        if named != _holds_labels(volume.voxels):
            raise ImageError(
                "label-or-image",
                "It is unclear whether this volume is a label map: put label maps, and nothing else, into a "
                "folder called labels.",
            )
        if named:
            return Item(path, relative, relative, self.name, 0, size, 0)
        return Item(path, relative, relative, self.name, len(volume.voxels), size, volume.voxels.size)

    @contextmanager
    def open(self, item: Item, scratch: Path) -> Iterator[Frames]:
        """Open a volume slice by slice; it is unpacked in memory, not to ``scratch``. A label map has none."""
        if not item.frames:
            yield NO_FRAMES
            return
        volume = _read(item.path)
        slope, intercept = _scaling(volume.header)
        window = volume_window(volume.voxels, self.window, slope, intercept, self.percentiles)
        yield NiftiFrames(volume, window, item.relative)

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        """Write the source's bytes with other voxels; a label map byte for byte."""
        if not item.frames:
            target.write_bytes(item.path.read_bytes())
            return
        _write(_read(item.path), pixels, target, packed=_is_packed(item.path))

    @contextmanager
    def read_back(self, target: Path) -> Iterator[Iterable[StoredArray]]:
        """Read a protected copy as nibabel gives it, unscaled: another reader than the one that wrote it.

        A label map yields nothing, for it has no frames. Its content tells: an image with as few values is
        refused by ``inspect``.
        """
        if _holds_labels(_read(target).voxels):
            yield ()
            return
        data = _unpacked(target)
        image: Any = (nib.Nifti2Image if _is_nifti2(data) else nib.Nifti1Image).from_bytes(data)
        values = np.asarray(image.dataobj.get_unscaled())
        slices = values.reshape(values.shape[0], values.shape[1], -1)
        yield (slices[:, :, number].T for number in range(slices.shape[2]))

    def patch(self, item: Item) -> bytes:
        """Return nothing: everything beside the voxels is in the protected copy."""
        return b""

    def restore(self, protected: Path, pixels: Iterable[StoredArray], patch: bytes, target: Path) -> None:
        """Write the original: its unpacked bytes are equal to those of the source."""
        volume = _read(protected)
        if _holds_labels(volume.voxels):
            target.write_bytes(protected.read_bytes())
            return
        _write(volume, pixels, target, packed=_is_packed(protected))


def _read(path: Path) -> _Volume:
    """Read a volume and take it apart.

    Raises:
        ImageError: see ``NiftiFormat.inspect``.
    """
    data = _unpacked(path)
    if data[NIFTI1_MAGIC_AT : NIFTI1_MAGIC_AT + 4] == NIFTI1_PAIR:
        raise ImageError(
            "nifti-pair", "A NIfTI pair (.hdr and .img) is not handled; convert it to one .nii file."
        )
    if not _is_nifti(data):
        raise ImageError("not-nifti", "This file is not a NIfTI volume.")
    try:
        kind: Any = nib.Nifti2Header if _is_nifti2(data) else nib.Nifti1Header
        header = kind.from_fileobj(BytesIO(data))
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header.get_data_offset())
    except Exception as exc:  # nibabel raises whatever a damaged header leads it to
        raise ImageError(
            "corrupt-header", "The header of this volume is damaged; export it again.", private=repr(exc)
        ) from exc
    slices, rows, columns = _checked_shape(tuple(int(side) for side in shape))
    _check_type(dtype)
    end = offset + slices * rows * columns * dtype.itemsize
    if offset < HEADER_BYTES - 4 or end > len(data):
        raise ImageError("truncated", "The voxels of this volume are cut short; export it again.")
    voxels = np.frombuffer(data, dtype, count=slices * rows * columns, offset=offset)
    if dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ImageError(
            "not-finite", "This volume holds values that are not numbers (NaN); replace them first."
        )
    return _Volume(header, data[:offset], voxels.reshape(slices, rows, columns), data[end:])


def _unpacked(path: Path) -> bytes:
    """Return a file's bytes, unpacked; reading stops where a packed file grows too large."""
    data = read_bytes(path)
    if not data.startswith(GZIP_MAGIC):
        return data
    parts, size = [], 0
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as stream:
            while part := stream.read(READ_STEP):
                parts.append(part)
                size += len(part)
                if size > MAX_UNPACKED_BYTES:
                    raise ImageError("too-large", "This volume unpacks to more than medveil works on.")
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise ImageError(
            "truncated", "This packed volume is damaged or cut short; export it again.", private=repr(exc)
        ) from exc
    return b"".join(parts)


def _write(volume: _Volume, pixels: Iterable[StoredArray], target: Path, *, packed: bool) -> None:
    """Write ``volume`` with other voxels, in its own byte order; packed without name and time."""
    dtype = volume.voxels.dtype
    with target.open("wb") as raw:
        if not packed:
            _write_parts(raw, volume, pixels, dtype)
            return
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
            _write_parts(stream, volume, pixels, dtype)


def _write_parts(stream: Any, volume: _Volume, pixels: Iterable[StoredArray], dtype: np.dtype[Any]) -> None:
    stream.write(volume.before)
    for frame in pixels:
        stream.write(np.ascontiguousarray(frame, dtype=dtype).tobytes())
    stream.write(volume.after)


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return slices, rows, columns of a 2-D or 3-D volume; axes of length 1 beyond the third are dropped."""
    if len(shape) < 2 or any(side < 1 for side in shape):
        raise ImageError("no-pixels", "This volume has no voxels; remove it from the source.")
    if prod(shape[3:]) != 1:
        raise ImageError("4d", "A volume with time or channels is not handled; split it into 3-D volumes.")
    columns, rows = shape[:2]
    check_size(rows, columns)
    return prod(shape[2:]), rows, columns


def _check_type(dtype: np.dtype[Any]) -> None:
    if dtype.fields is not None:
        raise ImageError("rgb", "A colour volume is not handled; convert it to grey values first.")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ImageError(
            "unsupported-layout",
            "The voxel type of this volume is not handled; convert it to whole or floating point numbers.",
            private=str(dtype),
        )


def _scaling(header: Any) -> tuple[float, float]:
    """Return slope and intercept from stored to scaled values; NaN and 0 mean that there is none."""
    slope, intercept = header.get_slope_inter()
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def _holds_labels(voxels: npt.NDArray[Any]) -> bool:
    """Return whether the voxels are few different whole numbers, none negative."""
    sample = voxels.reshape(-1)
    if sample.min() < 0 or (sample.dtype.kind == "f" and not np.array_equal(sample, np.rint(sample))):
        return False
    return np.unique(sample).size <= MAX_LABELS


def _is_packed(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == GZIP_MAGIC


def _is_nifti(data: bytes) -> bool:
    first = data[NIFTI1_MAGIC_AT : NIFTI1_MAGIC_AT + 4]
    return first in (NIFTI1_MAGIC, NIFTI1_PAIR) or _is_nifti2(data)


def _is_nifti2(data: bytes) -> bool:
    return data[NIFTI2_MAGIC_AT : NIFTI2_MAGIC_AT + 8] == NIFTI2_MAGIC
