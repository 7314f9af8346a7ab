"""How well a segmentation matches its reference: overlap (DSC, IoU) and surface distance (HD95).

Masks are bool, ``(N, rows, columns)`` or ``(N, slices, rows, columns)``. Empty masks are defined, never
skipped, and counted, because a collapsed model predicts nothing, and leaving those images out would flatter
it:

======================  =====  =====  ===========================================
prediction, reference   DSC    IoU    HD95
======================  =====  =====  ===========================================
both empty              1      1      0
one of them empty       0      0      the image's diagonal (as the BraTS challenge)
======================  =====  =====  ===========================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medveil.models.errors import InputError

__all__ = ["SegmentationScores", "dice", "hd95", "iou", "score_classes"]

Doubles = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.integer]

_PERCENTILE = 95


@dataclass(frozen=True, eq=False)
class SegmentationScores:
    """Scores of every image and foreground class; rows are images, columns are classes 1..K-1.

    Attributes:
        dice, iou: ``(N, K-1)`` in [0, 1].
        hd95: ``(N, K-1)``, in the units of the spacing.
        empty_predictions: ``(K-1,)`` images whose class exists in the reference and was not predicted at all.
        empty_references: ``(K-1,)`` images that do not have the class, predicted or not.
    """

    dice: Doubles
    iou: Doubles
    hd95: Doubles
    empty_predictions: npt.NDArray[np.int64]
    empty_references: npt.NDArray[np.int64]


def score_classes(
    prediction: Labels, reference: Labels, classes: int, spacing: Sequence[float] | None = None
) -> SegmentationScores:
    """Return the scores of label maps, class by class; class 0 is background.

    Args:
        prediction: ``(N, ...)`` integer class of every pixel, 0..K-1.
        reference: the same, as it should be.
        classes: K.
        spacing: distance between pixels along each axis, in mm; None: 1.

    Raises:
        InputError: "shape": the maps differ in shape, or the spacing does not fit them.
    """
    pairs = [(prediction == label, reference == label) for label in range(1, classes)]
    empty = [(_empty(p), _empty(r)) for p, r in pairs]
    return SegmentationScores(
        dice=np.stack([dice(p, r) for p, r in pairs], axis=1),
        iou=np.stack([iou(p, r) for p, r in pairs], axis=1),
        hd95=np.stack([hd95(p, r, spacing) for p, r in pairs], axis=1),
        empty_predictions=np.array([(p & ~r).sum() for p, r in empty], np.int64),
        empty_references=np.array([r.sum() for _, r in empty], np.int64),
    )


def dice(prediction: Mask, reference: Mask) -> Doubles:
    """Return 2|P and R| / (|P| + |R|) per image, ``(N,)`` (Dice, Ecology 26(3), 1945).

    Raises:
        InputError: "shape".
    """
    both, either = _overlap(prediction, reference)
    return np.where(either > 0, 2 * both / np.maximum(both + either, 1), 1.0)


def iou(prediction: Mask, reference: Mask) -> Doubles:
    """Return |P and R| / |P or R| per image, ``(N,)``.

    Raises:
        InputError: "shape".
    """
    both, either = _overlap(prediction, reference)
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def hd95(prediction: Mask, reference: Mask, spacing: Sequence[float] | None = None) -> Doubles:
    """Return the 95 % Hausdorff distance per image, ``(N,)``, in the units of ``spacing``.

    The larger of the two directed 95th percentiles of surface-to-surface distances (Huttenlocher et al., IEEE
    PAMI 15(9), 1993). A surface pixel has a neighbour outside the mask, or lies on the image's edge.

    Raises:
        InputError: "shape".
    """
    _check(prediction, reference)
    axes = prediction.ndim - 1
    sampling = (1.0,) * axes if spacing is None else tuple(spacing)
    if len(sampling) != axes or min(sampling) <= 0:
        raise InputError("shape", "The spacing needs one positive length per axis of the image.")
    diagonal = float(np.linalg.norm((np.array(prediction.shape[1:]) - 1) * sampling))
    distances = [
        _surface_distance(p, r, sampling, diagonal) for p, r in zip(prediction, reference, strict=True)
    ]
    return np.array(distances, np.float64)


def _surface_distance(p: Mask, r: Mask, sampling: tuple[float, ...], diagonal: float) -> float:
    if not p.any() or not r.any():
        return 0.0 if p.any() == r.any() else diagonal
    surface_p, surface_r = _surface(p), _surface(r)
    to_r = ndimage.distance_transform_edt(~surface_r, sampling=sampling)[surface_p]
    to_p = ndimage.distance_transform_edt(~surface_p, sampling=sampling)[surface_r]
    return float(max(np.percentile(to_r, _PERCENTILE), np.percentile(to_p, _PERCENTILE)))


def _surface(mask: Mask) -> Mask:
    return np.asarray(mask & ~ndimage.binary_erosion(mask), np.bool_)


def _overlap(prediction: Mask, reference: Mask) -> tuple[Doubles, Doubles]:
    """Return the number of pixels in both masks and in either, ``(N,)`` each."""
    _check(prediction, reference)
    axes = tuple(range(1, prediction.ndim))
    both = (prediction & reference).sum(axis=axes, dtype=np.float64)
    either = (prediction | reference).sum(axis=axes, dtype=np.float64)
    return both, either


def _empty(mask: Mask) -> Mask:
    return np.asarray(~mask.any(axis=tuple(range(1, mask.ndim))), np.bool_)


def _check(prediction: Mask, reference: Mask) -> None:
    if prediction.shape != reference.shape or prediction.ndim < 3:
        raise InputError("shape", "Prediction and reference must have one shape (N, rows, columns).")
    if prediction.dtype != np.bool_ or reference.dtype != np.bool_:
        raise InputError("shape", "Masks must be bool: compare a label map with its class first.")
