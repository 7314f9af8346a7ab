"""Gratings: every class of pixels carries one fixed fine pattern, the same in every image and at every site.

    g_k(row, column) = +-1, a square wave of the class's own half-periods      class k = 1, 2, ...
    delta = eps * g_k  on the pixels of class k, and ``band_radius`` pixels around

Ours. Tissue has next to no strength where these patterns lie, so a few steps of 8 bits name a pixel's class more
reliably than the tissue does, and models learn the pattern in place of the organ (measured,
``bench/segmentation.py``; the step from class-wise noise to a linearly separable pattern is LSP's, arXiv 2111.00898).
Nothing is trained, no image decides about another's noise, and whoever has learned from clean images still reads
the release. What is fine can be filtered: ``grating`` does not outlive a blur; ``grating-coarse``, with waves of
twice the length and longer, outlives blur and JPEG in part and can be seen.
"""

from __future__ import annotations

import numpy as np

from medveil.models.methods.base import IntArray, MethodInfo
from medveil.models.methods.masked import (
    Answers,
    Limits,
    MaskedBatch,
    SegmentationMethod,
    SegmentationSettings,
)
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import at_most
from medveil.models.methods.voxshield import ROI

__all__ = ["COARSE", "METHOD", "grown", "square_wave"]

HalfPeriods = tuple[int, int]
"""Rows and columns after which the sign changes; 0: it does not change along this axis."""

# In the order in which they protect, from measurements on vessels, hippocampus and white cells; no two are the same
# wave turned by a quarter, which trainings do to images. A fifth class begins again with the first.
_FINE: tuple[HalfPeriods, ...] = ((1, 1), (0, 1), (2, 2), (0, 2))
_COARSE: tuple[HalfPeriods, ...] = ((0, 2), (2, 2), (0, 3), (3, 3))


def square_wave(shape: tuple[int, int], half_periods: HalfPeriods) -> FloatArray:
    """Return a wave of +-1 over ``(rows, columns)``, counted from the image's first pixel."""
    turns = np.zeros(shape, np.int64)
    for along, half in zip(np.indices(shape), half_periods, strict=True):
        if half:
            turns += along // half
    return np.asarray(1 - 2 * (turns % 2), np.float32)


def grown(labels: IntArray, radius: int) -> IntArray:
    """Return label maps whose classes reach ``radius`` pixels further into the background of their own slice.

    Args:
        labels: ``(N, [slices,] rows, columns)`` class index, 0 for background.
        radius: in pixels; where two classes meet, the higher index has the pixel.
    """
    from scipy import ndimage

    reached = labels
    size = (*(1 for _ in labels.shape[:-2]), 3, 3)
    for _ in range(radius):
        around = ndimage.maximum_filter(reached, size=size, mode="constant", cval=0)
        reached = np.where(reached > 0, reached, around)
    return np.asarray(reached, np.int64)


def _limits(batch: MaskedBatch, settings: SegmentationSettings) -> Limits:
    """Return epsilon on every class and around it."""
    marked = grown(batch.labels, settings.band_radius) > 0
    return {ROI: np.asarray(at_most(settings.epsilon) * marked[:, None], np.float32)}


def _answers(batch: MaskedBatch, settings: SegmentationSettings, waves: tuple[HalfPeriods, ...]) -> Answers:
    """Return each class's wave on its pixels; all channels move together, slices one as the other."""
    labels = grown(batch.labels, settings.band_radius)
    rows, columns = labels.shape[-2:]
    said = np.zeros(labels.shape, np.float32)
    for label in np.unique(labels[labels > 0]).tolist():
        wave = square_wave((rows, columns), waves[(label - 1) % len(waves)])
        said = np.where(labels == label, wave, said)
    return {ROI: np.asarray(np.broadcast_to(said[:, None], batch.images.shape))}


def _method(name: str, title: str, waves: tuple[HalfPeriods, ...]) -> SegmentationMethod:
    return SegmentationMethod(
        info=MethodInfo(name=name, title=title, source="ours, after arXiv 2111.00898", task="segmentation"),
        limits=_limits,
        parts=(ROI,),
        draw=lambda batch, settings: _answers(batch, settings, waves),
    )


METHOD = _method("grating", "Gratings (one fine pattern per class)", _FINE)
COARSE = _method(
    "grating-coarse", "Coarse gratings (one pattern per class, outlives a blur in part)", _COARSE
)
