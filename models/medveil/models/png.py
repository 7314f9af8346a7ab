"""PNG: its chunks, each checked before libpng sees one, and its pixels.

PNG is decoded by libpng (through imagecodecs) because Pillow cuts 16-bit RGB to 8 bits. Where a cut file has no more
bytes, imagecodecs 2026.3.6 hands over none and says nothing: libpng goes on with what its buffers happen to hold
(seen under valgrind). A file of whole chunks gives it no reason to ask. Source: PNG (Third Edition), 5.3 and 13.2.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import imagecodecs
import numpy as np
import numpy.typing as npt

from medveil.models.errors import ImageError

__all__ = ["PNG_MAGIC", "Chunk", "chunks", "decode_png"]

PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk.

    Attributes:
        kind: its four letters.
        data: what it holds.
    """

    kind: bytes
    data: bytes

    def encoded(self) -> bytes:
        """Return the chunk as it stands in a file: length, kind, data, checksum."""
        checksum = zlib.crc32(self.kind + self.data)
        return struct.pack(">I", len(self.data)) + self.kind + self.data + struct.pack(">I", checksum)


def chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a PNG in order, image data without its bytes.

    Raises:
        ImageError: ``truncated`` or ``damaged``.
    """
    position = len(PNG_MAGIC)
    while True:
        head = data[position : position + 8]
        if len(head) < 8:
            raise ImageError("truncated", "This PNG ends before its image does; copy it again.")
        length, kind = struct.unpack(">I4s", head)
        body = data[position + 8 : position + 8 + length]
        checksum = data[position + 8 + length : position + 12 + length]
        if len(body) < length or len(checksum) < 4:
            raise ImageError("truncated", "This PNG ends before its image does; copy it again.")
        if zlib.crc32(kind + body) != struct.unpack(">I", checksum)[0]:
            raise ImageError("damaged", "This PNG's checksum does not match; copy it again.")
        yield Chunk(kind, b"" if kind == b"IDAT" else body)
        if kind == b"IEND":
            return
        position += 12 + length


def decode_png(data: bytes) -> npt.NDArray[Any]:
    """Return the samples of a PNG, ``(rows, columns)`` or ``(rows, columns, channels)``, uint8 or uint16.

    A palette becomes its colours; fewer than 8 bits are stretched to 8.

    Raises:
        ImageError: ``truncated`` or ``damaged``.
    """
    for _ in chunks(data):
        pass
    try:
        return np.asarray(imagecodecs.png_decode(data))
    except (imagecodecs.PngError, ValueError) as exc:
        # The exception's own words come from memory that libpng has left: not worth keeping.
        raise ImageError("damaged", "This PNG cannot be decoded; copy it again.") from exc
