"""One image file to one array, by content and not by extension: PNG, JPEG, TIFF; 8 and 16 bits, grey and RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from medveil.models.errors import InputError
from medveil.models.png import PNG_MAGIC, decode_png
from medveil.models.tiff import TIFF_MAGICS, open_tiff

__all__ = ["decode", "is_image"]

Pixels = npt.NDArray[np.unsignedinteger]

_JPEG = b"\xff\xd8\xff"
_LONGEST_SIGNATURE = 8
# Larger than any radiograph; smaller than what a crafted header would make us allocate (our choice).
_MAX_PIXELS = 1 << 27


def is_image(path: Path) -> bool:
    """Tell whether a file starts as one of the formats that `decode` reads."""
    with path.open("rb") as file:
        return file.read(_LONGEST_SIGNATURE).startswith((PNG_MAGIC, _JPEG, *TIFF_MAGICS))


def decode(path: Path) -> Pixels:
    """Return one image as stored, ``(rows, columns)`` grey or ``(rows, columns, 3)`` RGB, uint8 or uint16.

    An alpha channel is dropped; a JPEG's EXIF orientation is applied.

    Raises:
        InputError: "unreadable-image": damaged, or of a kind that is not read (several pages, float, CMYK).
    """
    try:
        data = path.read_bytes()
        if data.startswith(TIFF_MAGICS):
            pixels = _tiff(data)
        elif data.startswith(PNG_MAGIC):
            pixels = _png(data)
        else:
            pixels = _pillow(data)
    except Exception as exc:  # three decoders, each with its own exceptions for damaged bytes
        raise _unreadable(path) from exc
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    grey_or_rgb = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if not grey_or_rgb or pixels.dtype not in (np.uint8, np.uint16) or 0 in pixels.shape:
        raise _unreadable(path)
    return pixels


def _unreadable(path: Path) -> InputError:
    return InputError(
        "unreadable-image", "An image is damaged or of a kind that is not read; remove it.", private=str(path)
    )


def _tiff(data: bytes) -> Pixels:
    with open_tiff(io.BytesIO(data)) as file:
        if len(file.pages) != 1 or file.pages[0].size > 4 * _MAX_PIXELS:
            raise ValueError("several pages, or too large")
        return np.asarray(file.pages[0].asarray())


def _png(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError("too large")
        if image.mode == "P":
            return np.asarray(image.convert("RGB"))
    return decode_png(data)


def _pillow(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        if image.width * image.height > _MAX_PIXELS or image.mode not in ("L", "RGB"):
            raise ValueError("too large, or neither grey nor RGB")
        return np.asarray(ImageOps.exif_transpose(image))
