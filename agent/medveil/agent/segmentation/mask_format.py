"""Raster masks in a release: carried over byte for byte. A mask is the label, and a label is never perturbed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medveil.agent.imageio import Frames, Item, StoredArray
from medveil.agent.imageio.raster import read_bytes
from medveil.agent.segmentation.pairing import MASK_FORMAT

__all__ = ["MaskFormat"]


@dataclass(frozen=True, slots=True)
class MaskFormat:
    """Copies masks; see ``imageio.base.ImageFormat``. Files become its own by pairing, never by their bytes."""

    name: str = MASK_FORMAT

    def recognises(self, head: bytes, path: Path) -> bool:
        """Return False: what a file's bytes say is an image; only its pairing says mask."""
        return False

    def inspect(self, path: Path, relative: PurePosixPath) -> Item:
        """Describe a mask as a companion."""
        return Item(path, relative, relative, self.name, 0, path.stat().st_size, 0)

    @contextmanager
    def open(self, item: Item, scratch: Path) -> Iterator[Frames]:
        """Open a mask as what it is here: a file without images of its own."""
        yield ()

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        """Copy the file."""
        target.write_bytes(read_bytes(item.path))

    @contextmanager
    def read_back(self, target: Path) -> Iterator[Iterable[StoredArray]]:
        """Give no images."""
        yield ()

    def patch(self, item: Item) -> bytes:
        """Return nothing: the copy is the original."""
        return b""

    def restore(self, protected: Path, pixels: Iterable[StoredArray], patch: bytes, target: Path) -> None:
        """Copy the file back."""
        target.write_bytes(read_bytes(protected))
