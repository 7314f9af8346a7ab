"""How far a protected image is from its original: per image, in the units of the release window.

Arrays are ``(N, C, H, W)`` (or ``(N, C, slices, H, W)``) of any real dtype; stored integers are compared as
they are. ``peak`` is the width of the release window in the same units: 1 for floats in [0, 1], 255 for 8
bits. A region of interest is a bool array that broadcasts to the images, ``(N, 1, H, W)`` say; only its
values count.

Where there is nothing to measure (an empty region) the answer is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medveil.models.errors import InputError

__all__ = [
    "Fidelity",
    "changed_share",
    "max_change",
    "mean_shift",
    "measure",
    "median_or_none",
    "psnr_db",
    "ssim",
]

Doubles = npt.NDArray[np.float64]
Images = npt.NDArray[np.generic]
Region = npt.NDArray[np.bool_]
_Value = TypeVar("_Value", bound=np.generic)

# Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004, section III.C: window and stabilisers.
_WINDOW_SIDE = 11
_WINDOW_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Every measure of ``measure``, one value per image ``(N,)`` float64.

    Attributes:
        psnr_db: peak signal-to-noise ratio; infinite for an image that did not change.
        ssim: mean structural similarity, 1 for an image that did not change.
        changed_share: share of pixels with a change in any channel, in [0, 1].
        max_change: largest absolute change, in the images' units.
        mean_shift: mean signed change, in the images' units.
    """

    psnr_db: Doubles
    ssim: Doubles
    changed_share: Doubles
    max_change: Doubles
    mean_shift: Doubles


def measure(original: Images, protected: Images, *, peak: float = 1.0, roi: Region | None = None) -> Fidelity:
    """Return every measure of every image.

    Raises:
        InputError: "shape": the arrays differ in shape, or the region does not fit.
    """
    return Fidelity(
        psnr_db=psnr_db(original, protected, peak=peak, roi=roi),
        ssim=ssim(original, protected, peak=peak, roi=roi),
        changed_share=changed_share(original, protected, roi=roi),
        max_change=max_change(original, protected, roi=roi),
        mean_shift=mean_shift(original, protected, roi=roi),
    )


def psnr_db(original: Images, protected: Images, *, peak: float = 1.0, roi: Region | None = None) -> Doubles:
    """Return ``10 log10(peak^2 / mean squared change)`` in dB, ``(N,)``; ``inf`` where nothing changed.

    Raises:
        InputError: "shape".
    """
    error = _mean(np.square(_change(original, protected)), roi)
    with np.errstate(divide="ignore"):  # no error: infinitely many dB
        return np.asarray(10 * np.log10(peak**2 / error), np.float64)


def ssim(original: Images, protected: Images, *, peak: float = 1.0, roi: Region | None = None) -> Doubles:
    """Return the mean structural similarity ``(N,)`` of Wang et al., 2004: 11x11 Gaussian window, sigma 1.5.

    Windows that leave the image do not count. Channels (and slices) are averaged. In a region, the windows
    count whose centre lies in it. NaN for images smaller than a window.

    Raises:
        InputError: "shape".
    """
    _check_shapes(original, protected)
    if min(original.shape[-2:]) < _WINDOW_SIDE:
        return np.full(len(original), np.nan)
    x, y = original.astype(np.float64), protected.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return _mean(similarity, None if roi is None else _inner(_fitted(roi, original)))


def changed_share(original: Images, protected: Images, *, roi: Region | None = None) -> Doubles:
    """Return the share of pixels that changed in any channel, ``(N,)`` in [0, 1].

    Raises:
        InputError: "shape".
    """
    changed = (_change(original, protected) != 0).any(axis=1, keepdims=True)
    region = None if roi is None else np.asarray(_fitted(roi, original).any(axis=1, keepdims=True))
    return _mean(changed.astype(np.float64), region)


def max_change(original: Images, protected: Images, *, roi: Region | None = None) -> Doubles:
    """Return the largest absolute change, ``(N,)``, in the images' units; NaN in an empty region.

    Raises:
        InputError: "shape".
    """
    size = np.abs(_change(original, protected))
    if roi is None:
        return np.asarray(_rows(size).max(axis=1))
    inside = _rows(_fitted(roi, original))
    largest = np.where(inside, _rows(size), 0).max(axis=1)
    return np.where(inside.any(axis=1), largest, np.nan)


def mean_shift(original: Images, protected: Images, *, roi: Region | None = None) -> Doubles:
    """Return the mean signed change, ``(N,)``, in the images' units: did the image get brighter?

    Raises:
        InputError: "shape".
    """
    return _mean(_change(original, protected), roi)


def median_or_none(values: Doubles) -> float | None:
    """Return the median of the values that are numbers; None without any, or if it is infinite.

    JSON knows no infinity: None is "no change to speak of" or "nothing measured", and the counts beside it
    tell which.
    """
    known = values[~np.isnan(values)]
    median = float(np.median(known)) if len(known) else np.inf
    return median if np.isfinite(median) else None


def _change(original: Images, protected: Images) -> Doubles:
    """Return the signed change; in float64, because unsigned integers would wrap around."""
    _check_shapes(original, protected)
    return protected.astype(np.float64) - original.astype(np.float64)


def _check_shapes(original: Images, protected: Images) -> None:
    if original.shape != protected.shape or original.ndim < 4 or 0 in original.shape[1:]:
        raise InputError("shape", "Original and protected must have one shape (N, channels, rows, columns).")


def _fitted(roi: Region, images: Images) -> Region:
    """Return the region for every value of ``images``."""
    try:
        return np.broadcast_to(roi.astype(bool), images.shape)
    except ValueError as exc:
        raise InputError("shape", "The region of interest does not fit the images.") from exc


def _mean(values: Doubles, roi: Region | None) -> Doubles:
    """Return the mean of each image's values, or of those inside ``roi``; NaN where there are none."""
    if roi is None:
        return np.asarray(_rows(values).mean(axis=1))
    inside = _rows(_fitted(roi, values))
    count = inside.sum(axis=1)
    total = np.where(inside, _rows(values), 0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _rows(values: npt.NDArray[_Value]) -> npt.NDArray[_Value]:
    """Return each image's values as one row."""
    return values.reshape(len(values), int(np.prod(values.shape[1:])))


def _windowed(images: Doubles) -> Doubles:
    """Return the Gaussian-weighted mean of every window that lies inside the image."""
    offsets = np.arange(_WINDOW_SIDE) - _WINDOW_SIDE // 2
    weights = np.exp(-0.5 * np.square(offsets / _WINDOW_SIGMA))
    weights /= weights.sum()
    filtered = ndimage.correlate1d(ndimage.correlate1d(images, weights, axis=-1), weights, axis=-2)
    return np.asarray(_inner(filtered))


def _inner(images: npt.NDArray[_Value]) -> npt.NDArray[_Value]:
    """Return the centres of the windows that lie inside the image."""
    reach = _WINDOW_SIDE // 2
    return images[..., reach:-reach, reach:-reach]
