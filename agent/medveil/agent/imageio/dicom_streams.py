"""The size that a compressed frame claims for itself, read from its first markers.

A decoder allocates what the codestream asks for, not what the DICOM header says. A few bytes can ask for
65,535 x 65,535 pixels, so the two are compared before any decoder sees the stream.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["codestream_size"]

JPEG_START: Final = b"\xff\xd8"
J2K_START: Final = b"\xff\x4f\xff\x51"  # SOC, SIZ (ISO/IEC 15444-1 A.4.1, A.5.1)
JP2_SIGNATURE: Final = b"\x00\x00\x00\x0cjP  "  # boxed; the codestream follows in a jp2c box

START_OF_FRAME: Final = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
"""SOF0 to SOF15 without the tables between them (ISO/IEC 10918-1 B.1.1.3), and SOF55 of JPEG-LS."""

MARKER: Final = 0xFF
WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD8)})


def codestream_size(stream: bytes) -> tuple[int, int] | None:
    """Return rows and columns of a JPEG, JPEG-LS or JPEG 2000 stream; None where none can be read."""
    if stream.startswith(JP2_SIGNATURE):
        start = stream.find(J2K_START)
        stream = stream[start:] if start >= 0 else b""
    if stream.startswith(J2K_START):
        return _j2k_size(stream)
    return _jpeg_size(stream) if stream.startswith(JPEG_START) else None


def _j2k_size(stream: bytes) -> tuple[int, int] | None:
    """Return the image area of the SIZ segment: extent minus offset (A.5.1: Xsiz, Ysiz, XOsiz, YOsiz)."""
    if len(stream) < 24:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
    return bottom - top, right - left


def _jpeg_size(stream: bytes) -> tuple[int, int] | None:
    """Return height and width of the first frame header (B.2.2)."""
    at = len(JPEG_START)
    while at + 9 <= len(stream):
        if stream[at] != MARKER:
            return None
        code = stream[at + 1]
        if code == MARKER:  # fill byte
            at += 1
        elif code in WITHOUT_LENGTH:
            at += 2
        elif code in START_OF_FRAME:
            rows, columns = struct.unpack_from(">HH", stream, at + 5)
            return rows, columns
        else:
            at += 2 + int(struct.unpack_from(">H", stream, at + 2)[0])
    return None
