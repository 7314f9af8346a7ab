"""One image as the agent sees it: stored values, what they mean on a screen, and how far each may move.

Nothing here knows a file format. A format (see ``base``) reads a file into ``Image`` values and writes
changed stored values back; everything in between works on these.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medveil.models.errors import ImageError

__all__ = ["Image", "Label", "ReleaseWindow", "StoredArray", "pixel_digest"]

StoredArray = npt.NDArray[Any]
"""Stored values exactly as in the file: 8 to 16 bit integers, or float32 where the format stores floats."""

Label = str | int | None
"""A class name (folder, CSV), a stored label value (NPZ), or None where the file carries no label."""


class ReleaseWindow(Protocol):
    """What a stored value looks like in the release window, and how far it may move within a budget.

    Implementations are frozen values. Windows that map several stored values to one grey level, run downwards
    (MONOCHROME1) or forbid values (padding) all fit: the questions below are all that the agent asks.
    """

    @property
    def guessed(self) -> bool:
        """Whether the window was taken from the image's own values, because nobody declared one."""
        ...

    def display(self, stored: StoredArray) -> npt.NDArray[np.float32]:
        """Return what a screen shows for each stored value: float32 in [0, 1], same shape."""
        ...

    def bounds(self, stored: StoredArray, epsilon: float) -> tuple[StoredArray, StoredArray]:
        """Return the smallest and the largest value allowed in place of each stored value (both inclusive).

        Args:
            stored: stored values, any shape.
            epsilon: largest change on the screen, in 1/255 of the release window.

        Returns:
            ``low <= stored <= high``, same shape and dtype. Every value in between keeps the change within
            ``epsilon`` in every window that matters; ``low == high`` where the value may not move (padding).
        """
        ...

    def shifted(self, stored: StoredArray, delta: npt.NDArray[np.float32]) -> StoredArray:
        """Return the stored values that come nearest to showing ``display(stored) + delta``, not yet bounded.

        ``delta`` is signed, in units of the [0, 1] display range. Where it is 0 the stored value comes back
        as it was; results are rounded to nearest and saturate at the limits of the dtype.
        """
        ...


def pixel_digest(pixels: StoredArray) -> bytes:
    """Return the SHA-256 of stored values with their dtype and shape; independent of name and label."""
    little = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    head = f"medveil image 1|{little.dtype.str}|{little.shape}|".encode()
    return hashlib.sha256(head + little.tobytes()).digest()


@dataclass(frozen=True, slots=True)
class Image:
    """One image (one frame of a file), read and never changed.

    Attributes:
        pixels: ``(rows, columns)`` grey or ``(rows, columns, 3)`` RGB, stored values, read-only.
        window: what the stored values look like and how far they may move.
        path: the file below the source folder; shown in the site's own ledger only.
        frame: index of the frame within that file; 0 for a file of one image.
        label: what the file itself says; folder and CSV labels are added by the scan of the source.
        digest: SHA-256 of the stored values; the only source of per-image randomness, so noise never
            depends on a name, an index or a label.
    """

    pixels: StoredArray
    window: ReleaseWindow
    path: PurePosixPath
    frame: int = 0
    label: Label = None
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        if self.pixels.ndim not in (2, 3) or (self.pixels.ndim == 3 and self.pixels.shape[2] != 3):
            raise ImageError("layout", "This image is neither grey nor RGB; convert it and try again.")
        if self.pixels.size == 0:
            raise ImageError("no-pixels", "This image has no pixels; remove it from the source.")
        frozen = np.ascontiguousarray(self.pixels)
        if frozen is self.pixels:
            frozen = frozen.view()
        frozen.flags.writeable = False
        object.__setattr__(self, "pixels", frozen)
        object.__setattr__(self, "digest", pixel_digest(frozen))

    @property
    def is_colour(self) -> bool:
        """Whether the image has three channels."""
        return self.pixels.ndim == 3

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return int(self.pixels.shape[0]), int(self.pixels.shape[1])
