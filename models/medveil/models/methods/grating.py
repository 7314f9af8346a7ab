"""Gratings: every class of pixels carries one fixed fine pattern, the same in every image and at every site.

    g_k([slice,] row, column) = +-1, a product of square waves      class k = 1, 2, ...
    delta = eps * g_k  on the pixels of class k, and ``band_radius`` pixels around

Ours. Tissue has next to no strength where these patterns lie, so a few steps of 8 bits name a pixel's class more
reliably than the tissue does, and models learn the pattern in place of the organ (measured,
``bench/segmentation.py``; the step from class-wise noise to a linearly separable pattern is LSP's, arXiv 2111.00898).
Nothing is trained, no image decides about another's noise, and whoever has learned from clean images still reads
the release. What is fine can be filtered: ``grating`` does not outlive a blur; ``grating-coarse``, with waves of
twice the length and longer, outlives blur and JPEG in part and can be seen. ``grating-volume`` changes sign from
slice to slice as well: across a whole volume tissue has half the strength there that it has in its slices.
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

__all__ = ["COARSE", "METHOD", "VOLUME", "grown", "wave_of"]

HalfPeriods = tuple[int, int, int]
"""Slices, rows and columns after which the sign changes; 0: it does not change along this axis."""
Wave = tuple[HalfPeriods, ...]
"""The product of these square waves."""

# Every class carries the finest wave, so that nets need one filter for all; what tells classes apart is where its
# sign jumps: every so many pixels. With waves of their own, a budget of 4/255 left hippocampus slices at a Dice of
# 0.24, with jumps every 4 pixels at 0.04 (every 3: 0.20). Quarter turns, which trainings do, make none another.
_FINEST: HalfPeriods = (0, 1, 1)
_FINE: tuple[Wave, ...] = ((_FINEST,), (_FINEST, (0, 0, 4)), (_FINEST, (0, 6, 6)), (_FINEST, (0, 0, 8)))
# From slice to slice as well: hippocampus volumes have a strength of 0.3/255 there, and of 0.6/255 in their slices.
_FINEST_ACROSS: HalfPeriods = (1, 1, 1)
_ACROSS: tuple[Wave, ...] = (
    (_FINEST_ACROSS,),
    (_FINEST_ACROSS, (4, 0, 0)),
    (_FINEST_ACROSS, (0, 6, 6)),
    (_FINEST_ACROSS, (8, 0, 0)),
)
_COARSE: tuple[Wave, ...] = (((0, 0, 2),), ((0, 2, 2),), ((0, 0, 3),), ((0, 3, 3),))


def wave_of(wave: Wave, shape: tuple[int, int, int], first_slice: int = 0) -> FloatArray:
    """Return a wave of +-1 over ``(slices, rows, columns)``, counted from the volume's first voxel.

    Args:
        wave: whose half-periods.
        shape: of the part that is wanted.
        first_slice: of that part, in the volume.
    """
    places = list(np.indices(shape, sparse=True))
    places[0] = places[0] + first_slice
    turns = sum(place // half for one in wave for place, half in zip(places, one, strict=True) if half)
    return np.broadcast_to(np.asarray(1 - 2 * (turns % 2), np.float32), shape)


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


def _answers(batch: MaskedBatch, settings: SegmentationSettings, waves: tuple[Wave, ...]) -> Answers:
    """Return each class's wave on its pixels; all channels move together."""
    labels = grown(batch.labels, settings.band_radius)
    slices, rows, columns = (1, *labels.shape[1:])[-3:]
    said = np.zeros(labels.shape, np.float32)
    for label in np.unique(labels[labels > 0]).tolist():
        wave = wave_of(waves[(label - 1) % len(waves)], (slices, rows, columns), batch.first_slice)
        said = np.where(labels == label, wave.reshape(labels.shape[1:]), said)
    return {ROI: np.asarray(np.broadcast_to(said[:, None], batch.images.shape))}


def _method(
    name: str, title: str, waves: tuple[Wave, ...], *, across_slices: bool = False
) -> SegmentationMethod:
    return SegmentationMethod(
        info=MethodInfo(name=name, title=title, source="ours, after arXiv 2111.00898", task="segmentation"),
        limits=_limits,
        parts=(ROI,),
        draw=lambda batch, settings: _answers(batch, settings, waves),
        across_slices=across_slices,
    )


METHOD = _method("grating", "Gratings (one fine pattern per class)", _FINE)
COARSE = _method(
    "grating-coarse", "Coarse gratings (one pattern per class, outlives a blur in part)", _COARSE
)
VOLUME = _method(
    "grating-volume",
    "Gratings across slices (one fine pattern per class of voxels)",
    _ACROSS,
    across_slices=True,
)
