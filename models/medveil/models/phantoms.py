"""Labelled images that the program draws itself: for the demonstration and the tests, where no patient may appear.

A phantom is a stylised chest radiograph: body, two lungs with ribs, a heart shadow, and detector noise. Class 1 has
faint round opacities in the lungs, class 0 has none. Everything else varies alike in both classes, so that the
opacities are all there is to learn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import expit

__all__ = ["CLASS_NAMES", "draw"]

CLASS_NAMES = ("clear", "nodules")

_NODULES = (2, 5)  # least and most opacities of a class 1 phantom
_NODULE_RADIUS = (0.05, 0.09)  # fractions of the image's side
_NODULE_CONTRAST = (0.14, 0.24)  # brightness over the lung, in [0, 1]
_EDGE = 20.0  # steepness of an outline: about a pixel wide at 32 pixels
_NOISE = 0.03  # standard deviation of the detector noise, in [0, 1]


def draw(
    count: int, rng: np.random.Generator, *, size: int = 32
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return ``count`` phantoms, half of each class in random order.

    Args:
        count: how many.
        rng: the only source of randomness.
        size: rows and columns.

    Returns:
        images ``(count, size, size)`` uint8, labels ``(count,)`` int64, 0 "clear" or 1 "nodules".
    """
    labels = rng.permutation(np.arange(count) % len(CLASS_NAMES)).astype(np.int64)
    images = (
        np.stack([_phantom(bool(label), rng, size) for label in labels])
        if count
        else np.empty((0, size, size))
    )
    return np.rint(255 * images).astype(np.uint8), labels


def _phantom(nodules: bool, rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    y, x = y - rng.uniform(-0.03, 0.03), x - rng.uniform(-0.03, 0.03)
    body = _ellipse(x, y, 0.0, 0.02, rng.uniform(0.42, 0.48), rng.uniform(0.46, 0.52))
    width, height = rng.uniform(0.13, 0.17), rng.uniform(0.27, 0.33)
    centres = (-rng.uniform(0.18, 0.22), rng.uniform(0.18, 0.22))
    lungs = np.maximum(*(_ellipse(x, y, centre, -0.02, width, height) for centre in centres))
    heart = _ellipse(x, y, 0.06, 0.16, rng.uniform(0.13, 0.19), rng.uniform(0.10, 0.15))
    ribs = 0.5 + 0.5 * np.cos(2 * np.pi * (y * rng.uniform(7, 9) + 2 * x**2 + rng.uniform()))
    image = 0.05 + 0.60 * body - lungs * (0.38 - 0.10 * ribs) + 0.15 * heart * (1 - lungs)
    image = image * rng.uniform(0.85, 1.1)
    for _ in range(rng.integers(_NODULES[0], _NODULES[1] + 1) if nodules else 0):
        centre = centres[rng.integers(2)] + rng.uniform(-0.6, 0.6) * width
        radius = rng.uniform(*_NODULE_RADIUS)
        away = (x - centre) ** 2 + (y + 0.02 - rng.uniform(-0.6, 0.6) * height) ** 2
        image = image + rng.uniform(*_NODULE_CONTRAST) * np.exp(-away / (2 * (radius / 1.5) ** 2))
    return np.asarray(np.clip(image + _NOISE * rng.normal(size=image.shape), 0, 1), np.float64)


def _ellipse(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], cx: float, cy: float, rx: float, ry: float
) -> npt.NDArray[np.float64]:
    """Return 1 inside the ellipse and 0 outside, with an edge of about a pixel."""
    distance = np.hypot((x - cx) / rx, (y - cy) / ry)
    return np.asarray(expit((1 - distance) * _EDGE), np.float64)
