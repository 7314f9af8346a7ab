"""DICOM files as the agent reads and writes them: ``base.ImageFormat`` for everything a PACS sends.

The story of one object: read the header and refuse by name what is no picture (``dicom_header``); decode
frame by frame (``dicom_pixels``); find the windows in which the budget counts (``dicom_window``); write the
changed frames into a derived object (``derived``) whose references follow the release (``references``); and
keep aside what restores every attribute (``dicom_patch``).

Objects without pictures of their own (SEG, RTSTRUCT, SR, PR, KO) are companions: no frames, and ``write``
only renames what they refer to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

import pydicom
from pydicom import uid as uidlib
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset

from medveil.agent.imageio.base import Frames, Item
from medveil.agent.imageio.derived import (
    PIXEL_DATA,
    Derivation,
    derive_companion,
    derive_image,
    refuse_protected,
)
from medveil.agent.imageio.dicom_header import (
    PALETTE,
    Layout,
    check_elements,
    check_identity,
    damage_named,
    is_companion,
    looks_like_dicom,
    quiet,
    read_dataset,
    read_layout,
    refuse_unknown_syntax,
)
from medveil.agent.imageio.dicom_patch import apply_patch, attribute_patch
from medveil.agent.imageio.dicom_pixels import (
    Encoding,
    decode_frame,
    encode_frames,
    output_encoding,
    rebuilds_exactly,
)
from medveil.agent.imageio.dicom_window import WindowPolicy, frame_window
from medveil.agent.imageio.full_range import FullRange
from medveil.agent.imageio.image import Image, ReleaseWindow, StoredArray

__all__ = ["DicomFormat", "DicomFrames"]

NO_FRAMES: Final[tuple[Image, ...]] = ()

OVERLAY_GROUPS: Final = range(0x6000, 0x6020, 2)
OVERLAY_BIT_POSITION: Final = 0x0102
OVERLAY_DATA: Final = 0x3000


@dataclass(frozen=True, slots=True)
class DicomFrames:
    """The frames of one object: its pixel data lie in memory as stored, one frame is decoded at a time."""

    dataset: FileDataset
    layout: Layout
    path: PurePosixPath
    windows: WindowPolicy

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.layout.frames

    def __getitem__(self, frame: int) -> Image:
        """Read one frame.

        Raises:
            ImageError: the frame cannot be decoded, or the budget cannot be counted in any window of its.
        """
        if not 0 <= frame < self.layout.frames:
            raise IndexError(frame)
        pixels = decode_frame(self.dataset, self.layout, frame)
        with damage_named("bad-window", "The display windows of this file are damaged; export it again."):
            return Image(pixels, self._window(pixels, frame), self.path, frame)

    def _window(self, pixels: StoredArray, frame: int) -> ReleaseWindow:
        """Return where the budget counts: colour is shown as it is stored, grey through windows."""
        if not self.layout.is_grey:
            return FullRange(255 if self.layout.photometric == PALETTE else self.layout.stored.high)
        window = frame_window(self.dataset, frame, pixels, self.layout.stored, self.windows)
        window.bounds(pixels[:1, :1], 0)  # a table that runs up and down is refused here, before any work
        return window


@dataclass(frozen=True, slots=True)
class DicomFormat:
    """Reads and writes DICOM; see ``base.ImageFormat``.

    Attributes:
        derivation: identity and provenance of the release.
        windows: which release windows count.
    """

    derivation: Derivation
    windows: WindowPolicy = field(default_factory=WindowPolicy)

    @property
    def name(self) -> str:
        """``"dicom"``."""
        return "dicom"

    def recognises(self, head: bytes, path: Path) -> bool:
        """Return whether the file is DICOM, with or without preamble; its name does not matter."""
        return looks_like_dicom(head)

    def inspect(self, path: Path, relative: PurePosixPath) -> Item:
        """Describe an object from its header.

        Raises:
            ImageError: refused by name; see ``dicom_header.read_layout``.
        """
        dataset = read_dataset(path)
        size = path.stat().st_size
        check_elements(dataset)
        with damage_named():
            return self._described(path, relative, dataset, size)

    def _described(self, path: Path, relative: PurePosixPath, dataset: FileDataset, size: int) -> Item:
        refuse_protected(dataset)
        identity = str(dataset.get("SOPInstanceUID") or "")
        if is_companion(dataset):
            check_identity(dataset)
            refuse_unknown_syntax(dataset)
            seals, frames, samples = _is_big_endian(dataset), 0, 0
        else:
            layout = read_layout(dataset)
            seals, frames = not rebuilds_exactly(layout, dataset), layout.frames
            samples = layout.rows * layout.columns * (1 if layout.is_grey else 3) * frames
        return Item(
            path,
            relative,
            relative,
            self.name,
            frames,
            size,
            samples,
            seals_original=seals or _has_group_lengths(dataset),
            identity=identity,
        )

    @contextmanager
    def open(self, item: Item, scratch: Path) -> Iterator[Frames]:
        """Open an object frame by frame; nothing needs unpacking to ``scratch``. A companion has no frames."""
        if not item.frames:
            yield NO_FRAMES
            return
        dataset = read_dataset(item.path)
        with quiet():
            layout = read_layout(dataset)
        yield DicomFrames(dataset, layout, item.relative, self.windows)

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        """Write the derived object; the bytes depend on the source, the pixels and the settings only."""
        source = read_dataset(item.path)
        with quiet():
            if not item.frames:
                with damage_named():
                    companion = derive_companion(source, self.derivation)
                _save(companion, target)
                return
            layout = read_layout(source)
            encoding = _encoding(source, layout)
            with damage_named():
                derived = derive_image(source, layout, encoding, self.derivation)
            value = encode_frames(pixels, source, layout, encoding)
            derived[PIXEL_DATA] = _pixel_element(value, source, encoding)
            _save(derived, target)

    @contextmanager
    def read_back(self, target: Path) -> Iterator[Iterable[StoredArray]]:
        """Decode a protected copy frame by frame, from its own header; nothing is known from the source."""
        dataset = read_dataset(target)
        with quiet():
            layout = None if is_companion(dataset) else read_layout(dataset)
        if layout is None:
            yield ()
            return
        yield (decode_frame(dataset, layout, frame) for frame in range(layout.frames))

    def patch(self, item: Item) -> bytes:
        """Return the changed attributes; the whole original file where the pixels alone do not suffice."""
        if item.seals_original:
            return item.path.read_bytes()
        source = read_dataset(item.path)
        with damage_named():
            if not item.frames:
                return attribute_patch(source, derive_companion(source, self.derivation))
            layout = read_layout(source)
            derived = derive_image(source, layout, _encoding(source, layout), self.derivation)
            return attribute_patch(source, derived)

    def restore(self, protected: Path, pixels: Iterable[StoredArray], patch: bytes, target: Path) -> None:
        """Write the original: every element equal, in its own transfer syntax.

        A compressed one comes back as the file that it was, byte for byte (see ``rebuilds_exactly``). Group
        lengths (gggg,0000) inside sequences, long retired and dropped by every modern writer, are the exception.
        """
        if looks_like_dicom(patch[:132]):
            target.write_bytes(patch)
            return
        derived = read_dataset(protected)
        with quiet():
            restored = apply_patch(derived, patch)
            if not is_companion(derived):
                _put_pixels(restored, derived, pixels)
            elif PIXEL_DATA in derived:
                restored[PIXEL_DATA] = derived[PIXEL_DATA]
            _save(restored, target)


def _put_pixels(restored: Dataset, derived: FileDataset, pixels: Iterable[StoredArray]) -> None:
    """Give a restored object its original stored values."""
    layout = read_layout(derived)
    encoding = _as_stored(restored, layout)
    restored.file_meta.TransferSyntaxUID = encoding.syntax
    value = encode_frames(pixels, derived, layout, encoding)
    restored[PIXEL_DATA] = _pixel_element(value, derived, encoding)


def _encoding(source: Dataset, layout: Layout) -> Encoding:
    return output_encoding(layout, keep_uncompressed=_has_overlay_bits(source))


def _as_stored(restored: Dataset, layout: Layout) -> Encoding:
    """Return the encoding of a restored object; only what was never compressed is put together again."""
    syntax = restored.file_meta.TransferSyntaxUID
    planar = None if layout.is_grey else layout.planar
    return Encoding(syntax, layout.photometric, planar, layout.bits_allocated, layout.bits_stored)


def _has_overlay_bits(dataset: Dataset) -> bool:
    """Return whether an overlay lies in the unused bits of the pixels (retired, still found in old MR)."""
    return any(
        dataset.get((group, OVERLAY_BIT_POSITION)) not in (None, 0) for group in OVERLAY_GROUPS
    ) and any(
        (group, OVERLAY_BIT_POSITION) in dataset and (group, OVERLAY_DATA) not in dataset
        for group in OVERLAY_GROUPS
    )


def _has_group_lengths(dataset: Dataset) -> bool:
    """Return whether the file holds retired group lengths, which no writer puts back."""
    return any(tag.element == 0 for tag in list(dataset.keys()))


def _is_big_endian(dataset: FileDataset) -> bool:
    return bool(dataset.file_meta.TransferSyntaxUID == uidlib.ExplicitVRBigEndian)


def _pixel_element(value: bytes, source: Dataset, encoding: Encoding) -> DataElement:
    """Return Pixel Data with the VR that fits: OB when compressed, else as the source had it where it may."""
    if encoding.syntax.is_encapsulated:
        element = DataElement(PIXEL_DATA, "OB", value)
        element.is_undefined_length = True
        return element
    kept = source[PIXEL_DATA].VR if not source.file_meta.TransferSyntaxUID.is_encapsulated else "OW"
    return DataElement(PIXEL_DATA, kept if encoding.bits_allocated == 8 else "OW", value)


def _save(dataset: Dataset, target: Path) -> None:
    """Write a DICOM file.

    Raises:
        ImageError: ``unwritable`` where the source holds a value that no valid file can hold.
    """
    with damage_named("unwritable", "An attribute of this file is damaged; export it again."):
        pydicom.dcmwrite(target, dataset, enforce_file_format=True)
