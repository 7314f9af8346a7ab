"""What an image may ask for before anything of it is decoded."""

from __future__ import annotations

from pathlib import Path

from medveil.models.errors import ImageError

__all__ = ["MAX_FILE_BYTES", "MAX_PIXELS", "check_size", "occupied_maximum", "read_bytes"]

MAX_PIXELS = 2**26
"""Largest number of pixels of one frame. Our choice: three times the largest mammograms (about 20 million),
and small enough that the float32 working copies of one frame stay within two gigabytes."""

MAX_FILE_BYTES = 2**31
"""Largest single file that is read whole into memory. Our choice."""


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        ImageError: ``empty-file``, ``too-large`` or ``unreadable``.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise ImageError("empty-file", "This file is empty (0 bytes); copy it again from where it came.")
        if size > MAX_FILE_BYTES:
            raise ImageError("too-large", "This file is larger than medveil reads at once; split it.")
        return path.read_bytes()
    except OSError as exc:
        raise ImageError(
            "unreadable", "This file cannot be read; check its permissions and the disk.", private=str(exc)
        ) from exc


def check_size(rows: int, columns: int) -> None:
    """Refuse a frame by the size its header claims, before memory is taken for it.

    Raises:
        ImageError: ``no-pixels`` or ``too-large``.
    """
    if rows <= 0 or columns <= 0:
        raise ImageError("no-pixels", "This image has no pixels; remove it from the source.")
    if rows * columns > MAX_PIXELS:
        raise ImageError(
            "too-large",
            f"This image claims more than {MAX_PIXELS // 2**20} million pixels; cut it into tiles, or export it again"
            " if it is smaller than that.",
            private=f"{rows} rows, {columns} columns",
        )


def occupied_maximum(largest: int, bits_allocated: int) -> int:
    """Return the top of the stored range that 8 or 16 bit data really uses: 255, 511, ... 4095, ... 65535.

    Scanners keep 10 to 14 bits in 16-bit words. Counting the budget in all 16 bits would allow a change of
    half the visible range of a 12-bit image, so the range is the smallest power of two that holds the
    largest value.
    """
    return int(2 ** max(8, min(bits_allocated, int(largest).bit_length())) - 1)
