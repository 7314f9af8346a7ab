"""The budget, enforced once, in stored integers, without trust in the method that made the change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medveil.agent.imageio import Image, StoredArray
from medveil.models.errors import ImageError

__all__ = ["Budget", "Change", "channels_first", "enforce", "measure", "room"]

_TOLERANCE = 1e-4
"""Slack of the last check, in 1/255: float32 display values are exact to about 3e-5 of 1/255 at white."""

_FIGURES = 3
"""Decimals of a reported change in 1/255: what float32 display values can tell."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a change may not exceed.

    Attributes:
        epsilon: largest change on the screen, in 1/255 of the release window.
        mask: largest share of an image's pixels that may change, in (0, 1].
    """

    epsilon: float
    mask: float


@dataclass(frozen=True, slots=True)
class Change:
    """What a change to one image amounts to, measured on its release window.

    Attributes:
        psnr_db: peak signal-to-noise ratio, in dB.
        epsilon_max: largest change, in 1/255.
        changed: share of pixels that changed (in any channel).
    """

    psnr_db: float
    epsilon_max: float
    changed: float


def room(image: Image, budget: Budget) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return how far each value can go on the screen, down and up, when all rules are kept.

    A value that a window shows as black or white, wherever it moves within the budget, has no room: a change
    that does not show is no use to spend the budget on.

    Returns:
        Two arrays ``(channels, rows, columns)`` float32 in units of the [0, 1] display range, the first at most
        0, the second at least 0.
    """
    shown = image.window.display(image.pixels)
    ends = [image.window.display(end) - shown for end in image.window.bounds(image.pixels, budget.epsilon)]
    down, up = np.minimum(*ends), np.maximum(*ends)
    return channels_first(down), channels_first(up)


def channels_first(shown: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return display values as methods take them: ``(channels, rows, columns)``."""
    return np.ascontiguousarray(shown.transpose(2, 0, 1) if shown.ndim == 3 else shown[None])


def enforce(
    image: Image, delta: npt.NDArray[np.float32], budget: Budget, *, together: bool = True
) -> StoredArray:
    """Return the stored values that come nearest to the wanted change and keep to the budget.

    Args:
        image: the clean image.
        delta: wanted change, ``(channels, rows, columns)`` float32, signed, in units of the [0, 1]
            display range.
        budget: its limits.
        together: in colour, move R, G and B of a pixel by the same number of stored units (the smallest
            that any of them asks for and all of them may make), so that no hue appears and grey copies
            keep the change.

    Returns:
        Stored values, shape and dtype of ``image.pixels``. Equal to them where nothing fits.

    Raises:
        ImageError: ``not-finite``: the method gave something that is not a number, or of another shape.
    """
    wanted_shape = (3, *image.size) if image.is_colour else (1, *image.size)
    if delta.shape != wanted_shape or not np.isfinite(delta).all():
        raise ImageError("not-finite", "The method gave no usable change for this image; report it.")
    change = delta.transpose(1, 2, 0) if image.is_colour else delta[0]
    change = np.where(_largest(change, budget.mask), change, np.float32(0))
    low, high = image.window.bounds(image.pixels, budget.epsilon)
    wanted = np.clip(image.window.shifted(image.pixels, change), low, high)
    return _moved_together(image.pixels, wanted) if image.is_colour and together else wanted


def _largest(change: npt.NDArray[np.float32], share: float) -> npt.NDArray[np.bool_]:
    """Return a mask of the ``ceil(share * pixels)`` largest changes; ties go to the lower index."""
    size = np.abs(change).max(axis=2) if change.ndim == 3 else np.abs(change)
    count = math.ceil(share * size.size)
    mask = np.ones(size.size, np.bool_)
    if np.count_nonzero(size) > count:
        mask[np.argsort(-size, axis=None, kind="stable")[count:]] = False
    mask = mask.reshape(size.shape)
    return mask[:, :, None] if change.ndim == 3 else mask


def _moved_together(stored: StoredArray, wanted: StoredArray) -> StoredArray:
    """Return ``stored`` with every channel of a pixel moved by the least of the steps that its channels take.

    The least step towards one side lies within every channel's interval, because each interval holds
    zero. Where the channels want to go to different sides, none moves.
    """
    step = wanted.astype(np.int64) - stored.astype(np.int64)
    up = np.maximum(step.min(axis=2, keepdims=True), 0)
    down = np.minimum(step.max(axis=2, keepdims=True), 0)
    moved: StoredArray = stored.astype(np.int64) + up + down
    return moved.astype(stored.dtype)


def measure(image: Image, written: StoredArray, budget: Budget) -> Change:
    """Measure what was written, and check it once more against the budget.

    Raises:
        ImageError: ``budget-exceeded``: a value left its interval, or more pixels changed than allowed.
    """
    low, high = image.window.bounds(image.pixels, budget.epsilon)
    difference = image.window.display(written).astype(np.float64) - image.window.display(image.pixels)
    differs = written != image.pixels
    changed = int(np.count_nonzero(differs.any(axis=2) if image.is_colour else differs))
    largest = float(np.abs(difference).max()) * 255
    pixels = image.size[0] * image.size[1]
    within = bool(((written >= low) & (written <= high)).all())
    if not within or largest > budget.epsilon + _TOLERANCE or changed > math.ceil(budget.mask * pixels):
        raise ImageError("budget-exceeded", "The change of this image would exceed the budget; report it.")
    mse = float(np.mean(difference**2))
    psnr = -10 * math.log10(mse) if mse > 0 else math.inf
    return Change(psnr_db=psnr, epsilon_max=round(largest, _FIGURES), changed=changed / pixels)
