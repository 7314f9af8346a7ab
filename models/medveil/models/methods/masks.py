"""Which pixels may change: score every pixel, keep exactly the k best.

One mask per image, shared by its channels, chosen once and fixed while the noise accumulates: choosing again
at every step leaves noise of one step's size, which protects nothing (measured, ``bench/results``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from medveil.models.errors import ConfigurationError
from medveil.models.methods.base import Batch, BoolArray, MaskScore, Settings
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import Budget
from medveil.models.methods.randomness import generator_for

__all__ = ["Amplitude", "Saliency", "pixel_count", "score", "texture", "top_k", "weights", "window_of"]

Amplitude = Literal["even", "soft"]

Saliency = Callable[[int], FloatArray]
"""Given a number of warm-up steps, each pixel's accumulated absolute gradient, ``(N, 1, H, W)``."""

# Local texture is read in the smallest square that has a centre (our choice).
_TEXTURE_SIDE = 3


def pixel_count(ratio: float, rows: int, columns: int) -> int:
    """Return k = ceil(r*H*W), in 1..H*W.

    The product is rounded to nine decimals first: 0.07 * 100 is 7.000000000000001 in binary, and k must be 7.
    """
    return max(1, math.ceil(round(ratio * rows * columns, 9)))


def top_k(scores: FloatArray, count: int, editable: BoolArray | None = None) -> BoolArray:
    """Return the mask of each image's ``count`` best-scored pixels; equal scores go to the lower index.

    Args:
        scores: ``(N, 1, H, W)``.
        count: k, in 1..H*W.
        editable: ``(N, 1, H, W)``; an image with fewer editable pixels than k gets all of those.

    Returns:
        ``(N, 1, H, W)`` bool with exactly ``min(count, editable pixels)`` True per image.
    """
    flat = scores.reshape(len(scores), -1)
    free = np.ones(flat.shape, bool) if editable is None else editable.reshape(flat.shape)
    # Best first; the stable sort breaks ties by index, and pixels that are not editable come last.
    best = np.argsort(np.where(free, -flat, np.inf), axis=1, kind="stable")[:, :count]
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, best, True, axis=1)
    return np.logical_and(mask, free).reshape(scores.shape)


def window_of(scores: FloatArray, count: int) -> FloatArray:
    """Return ``scores`` inside the squarest window of ``count`` pixels or more with most energy, else -inf.

    Args:
        scores: ``(N, 1, H, W)``, not negative.
        count: k, in 1..H*W.
    """
    rows, columns = scores.shape[2:]
    height = min(rows, math.ceil(math.sqrt(count)))
    width = min(columns, math.ceil(count / height))
    height = math.ceil(count / width)  # a narrow image needs a taller window
    inside = np.full_like(scores, -np.inf)
    for image, kept in zip(scores[:, 0], inside[:, 0], strict=True):
        energy = np.square(image, dtype=np.float64)
        corner = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # sums of all rectangles from (0, 0)
        bands = corner[height:] - corner[:-height]
        sums = bands[:, width:] - bands[:, :-width]
        top, left = np.unravel_index(int(sums.argmax()), sums.shape)
        where = np.s_[top : top + height, left : left + width]
        kept[where] = image[where]
    return inside


def texture(images: FloatArray) -> FloatArray:
    """Return the local variance of each image's channel mean, ``(N, 1, H, W)``."""
    # Loaded here: it costs as much as the rest of the agent, and only this control needs it.
    from scipy import ndimage

    grey = images.mean(axis=1, keepdims=True)
    size = (1, 1, _TEXTURE_SIDE, _TEXTURE_SIDE)
    mean = ndimage.uniform_filter(grey, size=size, mode="nearest")
    variance = ndimage.uniform_filter(grey * grey, size=size, mode="nearest") - mean * mean
    return np.asarray(np.maximum(variance, 0), np.float32)


def score(batch: Batch, settings: Settings, kind: MaskScore, saliency: Saliency | None) -> FloatArray:
    """Return how significant every pixel is, ``(N, 1, H, W)``; outside a window -inf, elsewhere not negative.

    Args:
        batch: the images.
        settings: gives ratio, warm-up steps and seed.
        kind: "accumulated": gradient over the warm-up steps; "gradient": the first one only; "window": the
            squarest window of most accumulated gradient; and as controls "texture": local variance, "lowest":
            least accumulated gradient, "random": drawn from the image's key.
        saliency: computes gradients on demand; None for a method that has no model.

    Raises:
        ConfigurationError: "setting": a gradient score for a method without gradients.
    """
    rows, columns = batch.images.shape[2:]
    if kind == "random":
        draws = [
            generator_for(k, settings.seed, "mask").random((1, rows, columns), np.float32) for k in batch.keys
        ]
        return np.stack(draws)
    if kind == "texture":
        return texture(batch.images)
    if saliency is None:
        raise ConfigurationError("setting", f"The mask score `{kind}` needs a method with gradients.")
    if kind == "gradient":
        return saliency(1)
    scores = saliency(settings.warmup_steps)
    if kind == "window":
        return window_of(scores, pixel_count(settings.mask_ratio, rows, columns))
    if kind == "lowest":
        return np.asarray(scores.max(axis=(1, 2, 3), keepdims=True) - scores, np.float32)
    return scores


def weights(
    batch: Batch,
    settings: Settings,
    saliency: Saliency | None,
    *,
    default: MaskScore = "accumulated",
    amplitude: Amplitude = "even",
) -> FloatArray:
    """Return each pixel's share of epsilon, ``(N, 1, H, W)`` in [0, 1]: the mask, 0 outside it.

    Args:
        batch: the images; what is not editable, and what has no room to move, stays out.
        settings: gives ratio, score, warm-up steps and seed.
        saliency: computes gradients on demand; None for a method that has no model.
        default: the score when the settings leave it to the method.
        amplitude: "even": all of epsilon inside the mask; "soft": in proportion to the score.

    Raises:
        ConfigurationError: "setting": a gradient score for a method without gradients.
    """
    rows, columns = batch.images.shape[2:]
    count = pixel_count(settings.mask_ratio, rows, columns)
    if count == rows * columns and amplitude == "even":
        scores = np.zeros_like(batch.images[:, :1])  # every pixel is in: no gradient need be asked for
    else:
        scores = score(batch, settings, settings.mask_score or default, saliency)
    movable = Budget.of(batch.images, settings, room=batch.room).movable()
    editable = movable if batch.editable is None else movable & batch.editable
    mask = top_k(scores, count, editable)
    if amplitude == "even":
        return mask.astype(np.float32)
    inside = np.where(mask, scores, 0)
    best = inside.max(axis=(1, 2, 3), keepdims=True)
    return np.asarray(inside / np.maximum(best, np.finfo(np.float32).tiny), np.float32)
