"""Opening TIFFs: the one way that medveil does it, with the decoders that it lets a file choose from.

tifffile knows some forty ways to store pixels and a file names the one it wants, so a single byte may lead to any
of them. Here are those that images and masks of hospitals come in; each took damaged files under a memory checker
(valgrind), except one. LZW of imagecodecs (2026.3.6 and before) follows a pointer that nobody set when the code
after a clear code stands for no single byte: the process dies, or other memory becomes pixels. libtiff checks
every code, so LZW goes through libtiff.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import imagecodecs
import tifffile
from tifffile import COMPRESSION

__all__ = ["TIFF_MAGICS", "decodes", "open_tiff"]

TIFF_MAGICS: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF and a BigTIFF begin, in either byte order."""

_IFD_AT: Final = 8
_LONG: Final = 4
"""Offset of the only directory, and the field type of 32 bits (TIFF 6.0, section 2)."""


def _lzw(data: bytes, /, *, out: int) -> bytes:
    """Return ``out`` bytes of one LZW segment, decoded by libtiff as the one strip of a TIFF of one row.

    Raises:
        imagecodecs.TiffError: the segment is damaged, or too short.
    """
    if out == 0:
        return b""
    fields = {
        256: out,  # ImageWidth
        257: 1,  # ImageLength
        258: 8,  # BitsPerSample
        259: int(COMPRESSION.LZW),
        262: 1,  # PhotometricInterpretation
        273: 0,  # StripOffsets: right behind the directory
        277: 1,  # SamplesPerPixel
        278: 1,  # RowsPerStrip
        279: len(data),  # StripByteCounts
    }
    fields[273] = _IFD_AT + 2 + 12 * len(fields) + 4
    directory = b"".join(struct.pack("<HHII", tag, _LONG, 1, value) for tag, value in fields.items())
    head = b"II*\0" + struct.pack("<IH", _IFD_AT, len(fields)) + directory + bytes(4)
    row: bytes = imagecodecs.tiff_decode(head + data).tobytes()
    return row


_DECODERS: Final[dict[int, Callable[..., Any]]] = {
    int(COMPRESSION[name]): tifffile.TIFF.DECOMPRESSORS[COMPRESSION[name]]
    for name in (
        *("CCITTRLE", "CCITTFAX3", "CCITTFAX4", "PACKBITS", "DEFLATE", "ADOBE_DEFLATE", "LZMA", "ZSTD"),
        *("ZSTD_DEPRECATED", "OJPEG", "JPEG", "ALT_JPEG", "WEBP", "WEBP_DEPRECATED", "JPEG2000"),
        *("JPEG_2000_LOSSY", "APERIO_JP2000_RGB", "APERIO_JP2000_YCBC"),
    )
} | {int(COMPRESSION.LZW): _lzw}

tifffile.TIFF.DECOMPRESSORS = _DECODERS


def decodes(compression: int) -> bool:
    """Tell whether pixels that are stored like this are decoded (Compression, tag 259)."""
    return compression == COMPRESSION.NONE or compression in _DECODERS


def open_tiff(file: Path | BinaryIO) -> tifffile.TiffFile:
    """Open a TIFF; what it stores in another way than ``decodes`` tells raises ValueError when it is read."""
    return tifffile.TiffFile(file)
