"""The simplest filter there is, on images that somebody trains on: does protection outlive it?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

__all__ = ["BLUR_SIGMA", "blurred"]

BLUR_SIGMA = 1.0
"""Pixels; clean victims lose next to nothing by it (bench/segmentation.py)."""


def blurred(images: npt.NDArray[np.float32], sigma: float = BLUR_SIGMA) -> npt.NDArray[np.float32]:
    """Return images ``(N, C, [slices,] rows, columns)`` after a Gaussian blur of ``sigma`` pixels on every axis."""
    widths = (0, 0, *(sigma for _ in images.shape[2:]))
    return np.asarray(ndimage.gaussian_filter(images, widths), np.float32)
