"""Masks in PNG and TIFF files: what the file stores, without any of the colours that it is shown in."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from medveil.agent.imageio import Item
from medveil.agent.imageio.raster import read_bytes
from medveil.models.disk import DAMAGE
from medveil.models.errors import ImageError
from medveil.models.png import decode_png
from medveil.models.tiff import open_tiff

__all__ = ["RASTER_FORMATS", "read_raster_mask"]

RASTER_FORMATS: Final = frozenset({"png", "tiff"})
"""Formats that hold a mask exactly; a JPEG changes its values."""

_DEPTH_AT: Final = 24
_COLOUR_TYPE_AT: Final = 25
_PALETTE: Final = 3
"""Where a PNG says how its samples are stored, and the value for "indices of a palette" (PNG, 11.2.2)."""


def read_raster_mask(item: Item, frame: int) -> npt.NDArray[Any]:
    """Return the stored values of a mask, ``(rows, columns)``: for an indexed image the indices, not the colours.

    Args:
        item: a PNG or TIFF.
        frame: page of a TIFF; 0 for a PNG.

    Raises:
        ImageError: ``mask-damaged``, ``mask-colour`` (three channels that differ), or as reading an image does.
    """
    data = read_bytes(item.path)
    try:
        values = _png(data) if item.format == "png" else _tiff(data, frame)
    except (ImageError, PillowImage.DecompressionBombError, *DAMAGE) as exc:
        raise ImageError(
            "mask-damaged", "This image's mask cannot be decoded; export it again.", private=str(exc)
        ) from exc
    return _one_channel(values)


def _png(data: bytes) -> npt.NDArray[Any]:
    if data[_COLOUR_TYPE_AT] == _PALETTE:  # libpng turns the indices into colours
        with PillowImage.open(BytesIO(data)) as image:
            return np.array(image)
    values = decode_png(data)
    depth = data[_DEPTH_AT]
    return values // (255 // (2**depth - 1)) if depth < 8 else values  # libpng stretches 1, 2 and 4 bits to 8


def _tiff(data: bytes, frame: int) -> npt.NDArray[Any]:
    with open_tiff(BytesIO(data)) as file:
        return np.asarray(file.pages[frame].asarray())


def _one_channel(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the one plane of a mask; grey stored as RGB, with or without opaque alpha, is taken apart."""
    if values.ndim == 3:
        colours = values[:, :, :3] if values.shape[2] >= 3 else values[:, :, :1]
        if not (colours == colours[:, :, :1]).all():
            raise ImageError(
                "mask-colour", "This image's mask is a colour picture; export it with one number per class."
            )
        values = colours[:, :, 0]
    if values.ndim != 2:
        raise ImageError("mask-damaged", "This image's mask has no rows and columns; export it again.")
    return values
