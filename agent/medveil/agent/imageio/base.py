"""The seam every file format plugs into: look, read, write, read back, undo.

One ``Item`` is one file of the source. A PNG holds one frame, a multi-page TIFF or a DICOM cine
several, an NPZ thousands. The agent perturbs frame by frame and writes a file once all are done.

    inspect(path)          header only: what is this, how many frames?   raises ImageError -> quarantine
    open(item)             frames one at a time, memory bounded by one frame
    write(item, ...)       the protected copy, to a temporary name that the caller syncs and renames
    read_back(target)      what a reader of the release will see
    patch(item, ...)       what else, beside the pixels, the owner needs to get the original back
    restore(...)           protected copy + original stored values + patch -> original
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from medveil.agent.imageio.image import Image, StoredArray

__all__ = ["Frames", "ImageFormat", "Item", "Quarantined"]


@dataclass(frozen=True, slots=True)
class Item:
    """One file of the source, as its header describes it.

    Attributes:
        path: where the file lies; opened read-only, never changed.
        relative: its path below the source folder.
        target: path of its protected copy below the release folder (a JPEG becomes a PNG).
        format: name of the ``ImageFormat`` that reads and writes it.
        frames: number of images inside. 0 marks a companion that holds no image of its own (a DICOM SEG,
            a NIfTI label map): it is handed to ``write`` without pixels once all images are done.
        size_bytes: size of the source file.
        pixels: stored values over all frames, for memory, time and disk estimates.
        splittable: whether single frames may be left out of the protected copy (rows of an NPZ).
            Otherwise the file stands or falls as a whole.
        seals_original: whether ``patch`` carries the whole original file because its pixels alone do not make
            it again (lossy compression, a palette, a rotation by EXIF).
        identity: what the file calls itself, where its format has such a name (DICOM: SOP Instance UID); empty
            where it has none. Two files of a source with one identity claim to be the same object.
    """

    path: Path
    relative: PurePosixPath
    target: PurePosixPath
    format: str
    frames: int
    size_bytes: int
    pixels: int
    splittable: bool = False
    seals_original: bool = False
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file that could not even be looked at: the reason's stable code and a sentence for the steward."""

    relative: PurePosixPath
    code: str
    public: str


class Frames(Protocol):
    """The images of one open file; reading one frame doesn't load the others."""

    def __len__(self) -> int:
        """Return the number of frames."""
        ...

    def __getitem__(self, frame: int) -> Image:
        """Read one frame.

        Raises:
            ImageError: the frame cannot be decoded; its code becomes the quarantine reason.
        """
        ...


class ImageFormat(Protocol):
    """One file format. Implementations hold settings only, no open files and no state between calls."""

    @property
    def name(self) -> str:
        """Stable short name (``"png"``); recorded in the ledger and used by the policy's list of formats."""
        ...

    def recognises(self, head: bytes, path: Path) -> bool:
        """Return whether a file that starts with ``head`` (512 bytes) is of this format; content decides."""
        ...

    def inspect(self, path: Path, relative: PurePosixPath) -> Item:
        """Describe a file from its header, before anything large is decoded.

        Raises:
            ImageError: the file is refused by name (truncated, too large when decoded, unsupported layout).
        """
        ...

    def open(self, item: Item, scratch: Path) -> AbstractContextManager[Frames]:
        """Open a file frame by frame; ``scratch`` is a private folder for what must be unpacked first."""
        ...

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        """Write the protected copy to ``target`` (a temporary name; the caller syncs and renames it).

        The bytes depend on the arguments only: no clock, no random number.

        Args:
            item: the source file; everything but pixels (geometry, metadata, labels) is taken from it.
            frames: which frames ``pixels`` yields, ascending; all of them unless ``item.splittable``.
            pixels: protected stored values, one array per frame, shape and dtype as read.
            target: file to create.
        """
        ...

    def read_back(self, target: Path) -> AbstractContextManager[Iterable[StoredArray]]:
        """Decode a protected copy as any reader would: stored values, one array per frame, in order."""
        ...

    def patch(self, item: Item) -> bytes:
        """Return what restoring needs beside the stored values (metadata that ``write`` changed or dropped).

        Empty where the protected copy differs in its pixels only; the whole original file where
        ``item.seals_original`` is set. Sealed by the caller, never released.
        """
        ...

    def restore(self, protected: Path, pixels: Iterable[StoredArray], patch: bytes, target: Path) -> None:
        """Write the original to ``target``: ``protected`` with other stored values and ``patch`` applied."""
        ...
