"""What an attacker may do to every image, at training and at test time: ``(N, C, H, W)`` in [0, 1] to the same."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from medveil.models.quality import blurred

__all__ = ["TRANSFORMS"]

Images = npt.NDArray[np.float32]


def _median(images: Images) -> Images:
    return np.asarray(ndimage.median_filter(images, (1, 1, 3, 3)), np.float32)


def _jpeg(quality: int) -> Callable[[Images], Images]:
    def through(image: Images) -> Images:
        planes = np.rint(image * 255).astype(np.uint8)
        picture = Image.fromarray(planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        read = np.asarray(Image.open(buffer), np.float32) / np.float32(255)
        return read[None] if read.ndim == 2 else read.transpose(2, 0, 1)

    return lambda images: np.stack([through(image) for image in images]).astype(np.float32)


def _four_bits(images: Images) -> Images:
    return np.asarray(np.rint(images * 15) / 15, np.float32)


def _gamma(images: Images) -> Images:
    return np.asarray(images**1.5, np.float32)


def _halved(images: Images) -> Images:
    """Return images as they come back from half their size: means of 2 x 2 pixels, enlarged linearly."""
    count, channels, rows, columns = images.shape
    small = images.reshape(count, channels, rows // 2, 2, columns // 2, 2).mean((3, 5))
    again = ndimage.zoom(small, (1, 1, 2, 2), order=1, mode="nearest", grid_mode=True)
    return np.asarray(again, np.float32)


TRANSFORMS: dict[str, Callable[[Images], Images]] = {
    "blur 1 px": blurred,
    "median 3": _median,
    "JPEG 75": _jpeg(75),
    "JPEG 25": _jpeg(25),
    "4 bits": _four_bits,
    "gamma 1.5": _gamma,
    "half size and back": _halved,
}
"""Name to transform, in the order of the tables."""
