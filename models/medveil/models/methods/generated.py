"""Noise from a generator, under the contract of every method: exactly k pixels, epsilon, [0, 1], zero outside.

A generator is foreign to the site: what it says is a wish. Where the budget is spent and how far a pixel moves is
decided here, in NumPy, by the code that binds the optimised methods too.
"""

from __future__ import annotations

import numpy as np

from medveil.models.errors import InputError
from medveil.models.methods import masks
from medveil.models.methods.base import Batch, Settings
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import Budget, at_most

__all__ = ["bounded", "from_perturbation"]


def bounded(batch: Batch, pattern: FloatArray, score: FloatArray, settings: Settings) -> FloatArray:
    """Return the noise that a pattern becomes inside the mask of its best-scored pixels.

    Args:
        batch: the images; what is not editable stays as it is.
        pattern: ``(N, C, H, W)`` in [-1, 1], the change as a share of epsilon. In "luma" its mean over the channels
            counts.
        score: ``(N, 1, H, W)``, 0 or more. The ``ceil(r*H*W)`` best pixels may change, equal ones by index.
        settings: gives epsilon, mask_ratio and colour; nothing is drawn.

    Returns:
        ``delta``, ``(N, C, H, W)`` float32.

    Raises:
        InputError: "batch-shape" (the generator's outputs do not fit the images), "not-finite" (they hold NaN or
            infinity), "generator-range" (they leave their ranges).
    """
    images = batch.images
    if pattern.shape != images.shape or score.shape != (len(images), 1, *images.shape[2:]):
        raise InputError("batch-shape", "The noise generator's outputs do not have the images' shape.")
    if not (np.isfinite(pattern).all() and np.isfinite(score).all()):
        raise InputError("not-finite", "The noise generator gave values that are not numbers: do not use it.")
    if (np.abs(pattern) > 1).any() or (score < 0).any():
        raise InputError(
            "generator-range", "A noise generator's pattern must lie in [-1, 1] and its score be 0 or more."
        )
    rows, columns = images.shape[2:]
    mask = masks.top_k(score, masks.pixel_count(settings.mask_ratio, rows, columns), batch.editable)
    budget = Budget.of(images, settings, mask.astype(np.float32))
    share = pattern.mean(axis=1, keepdims=True) if settings.colour == "luma" else pattern
    delta = budget.project(at_most(settings.epsilon) * share.astype(np.float32))
    return np.broadcast_to(delta, images.shape).astype(np.float32)


def from_perturbation(batch: Batch, wanted: FloatArray, settings: Settings) -> FloatArray:
    """Return the noise that one image-shaped output becomes: its size is the score, its sign the pattern.

    Projected gradient steps end at the borders of the budget nearly everywhere, so within the mask all of epsilon
    is used, and one output says all there is to say.

    Args:
        batch: the images.
        wanted: ``(N, C, H, W)``, any scale: what the generator would add.
        settings: as for `bounded`.

    Raises:
        InputError: as `bounded`.
    """
    if wanted.shape != batch.images.shape:
        raise InputError("batch-shape", "The noise generator's output does not have the images' shape.")
    moved = wanted.mean(axis=1, keepdims=True) if settings.colour == "luma" else wanted
    score = np.abs(moved).sum(axis=1, keepdims=True)
    return bounded(batch, np.broadcast_to(np.sign(moved), wanted.shape), score, settings)
