"""How well a segmentation matches its reference: overlap (DSC, IoU) and surface distance (HD95).

How well a mask does that is the same for every image: what positions alone teach. And how well a model's
probabilities do under the best thresholds: what somebody with a few clean label maps gets out of it.

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

__all__ = [
    "LEAST_GAIN",
    "LEAST_LEARNED",
    "LEAST_LOSS",
    "SegmentationScores",
    "constant_mask_dice",
    "dice",
    "hd95",
    "iou",
    "recoverable_dice",
    "score_classes",
    "share_lost",
]

Doubles = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.integer]

_PERCENTILE = 95
LEAST_LEARNED = 0.2
"""Dice below which a victim found too little in clean images to have anything to lose."""
LEAST_LOSS = 0.5
"""Share of what clean images teach that must be lost before a protection is said to hold."""
LEAST_GAIN = 0.05
"""Recoverable Dice above a constant mask's below which a victim learned nothing from the pixels of clean images: our
choice, what is less than this apart is noise."""

# Thresholds that `recoverable_dice` tries, from each side: masks of a thousandth of all pixels up to all of them.
_CUTS, _SMALLEST_CUT = 48, 1e-3


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
    return _dice_from_counts(both, both + either)


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


def constant_mask_dice(learned: Labels, test: Labels, classes: int) -> Doubles:
    """Return the DSC of one constant mask per class, the same for every test image: ``(N, K-1)``.

    Label maps alone teach at least this much, whatever the images show, so no change of pixels can take it away. The
    mask of a class is where at least a certain share of the learned maps has it: the share that scores best on those
    maps themselves, on average; everything and nothing are choices too. Each class is asked alone: their masks may
    overlap.

    Args:
        learned: ``(M, ...)`` integer class of every pixel, 0..K-1: the label maps that a model is trained with.
        test: ``(N, ...)`` the same, of other images.
        classes: K; class 0 is background.

    Raises:
        InputError: "shape": there are no maps to learn from, or theirs is not the shape of the test maps.
    """
    if not len(learned) or learned.shape[1:] != test.shape[1:]:
        raise InputError(
            "shape", "A constant mask is learned from label maps of the same shape as the test maps."
        )
    masks = [_usual_place(learned == label) for label in range(1, classes)]
    return np.stack(
        [dice(np.broadcast_to(m, test.shape), test == label) for label, m in enumerate(masks, 1)], axis=1
    )


def recoverable_dice(probabilities: npt.NDArray[np.floating], test: Labels) -> Doubles:
    """Return the DSC of every image under the thresholds that serve best: ``(N, K-1)``.

    Who holds a few clean images with label maps sees that a model answers too seldom, or the wrong way round, and
    moves its threshold. So each class is asked alone, and is where its probability is above, or below, whichever
    threshold gives the best mean DSC on these very images: an upper bound of what such an attacker gets. The model's
    own answers are one more choice: structures smaller than the finest threshold are found by them alone.

    Args:
        probabilities: ``(N, K, ...)`` of each class at each pixel; class 0 is background.
        test: ``(N, ...)`` integer class of every pixel, as it should be.

    Raises:
        InputError: "shape": there are no images, or the two do not fit together.
    """
    if not len(test) or probabilities.shape[:1] + probabilities.shape[2:] != test.shape:
        raise InputError(
            "shape", "Probabilities must be (N, classes, ...) over the pixels of the label maps."
        )
    answers, classes = probabilities.argmax(axis=1), range(1, probabilities.shape[1])
    return np.stack(
        [_under_best_threshold(probabilities[:, c], answers == c, test == c) for c in classes], axis=1
    )


def share_lost(clean: float, recoverable: float, left: float, constant: float) -> float | None:
    """Return which share of what clean images teach is lost to a victim of protected ones.

    What a constant mask finds takes no image, and is neither learned nor lost.

    Args:
        clean: Dice of a victim that trained on clean images.
        recoverable: the same under the best thresholds.
        left: of a victim that trained on protected images, under the best thresholds.
        constant: of the constant mask.

    Returns:
        1 at most, 0 or less where nothing is lost; None where the clean victim learned too little to tell.
    """
    gained = recoverable - constant
    if clean < LEAST_LEARNED or gained < LEAST_GAIN:
        return None
    return 1 - max(left - constant, 0) / gained


def _under_best_threshold(probability: npt.NDArray[np.floating], answers: Mask, masks: Mask) -> Doubles:
    shares = np.geomspace(_SMALLEST_CUT, 1, _CUTS)
    cuts = np.unique(np.quantile(probability, np.concatenate([shares, 1 - shares])))
    tried = []
    for one, mask in zip(probability, masks, strict=True):
        reached = np.searchsorted(cuts, one, side="right")
        above, both = _at_least(reached, len(cuts)), _at_least(reached[mask], len(cuts))
        below, rest = above[0] - above, both[0] - both
        tried.append(
            np.concatenate(
                [_dice_from_counts(both, above + both[0]), _dice_from_counts(rest, below + both[0])]
            )
        )
    scores = np.column_stack([np.stack(tried), dice(answers, masks)])
    return np.asarray(scores[:, scores.mean(axis=0).argmax()], np.float64)


def _surface_distance(p: Mask, r: Mask, sampling: tuple[float, ...], diagonal: float) -> float:
    if not p.any() or not r.any():
        return 0.0 if p.any() == r.any() else diagonal
    surface_p, surface_r = _surface(p), _surface(r)
    to_r = ndimage.distance_transform_edt(~surface_r, sampling=sampling)[surface_p]
    to_p = ndimage.distance_transform_edt(~surface_p, sampling=sampling)[surface_r]
    return float(max(np.percentile(to_r, _PERCENTILE), np.percentile(to_p, _PERCENTILE)))


def _surface(mask: Mask) -> Mask:
    return np.asarray(mask & ~ndimage.binary_erosion(mask), np.bool_)


def _usual_place(masks: Mask) -> Mask:
    """Return the pixels that lie in at least so many of the masks as gives the best mean DSC on them, ``(...)``."""
    shared = masks.sum(axis=0)
    # One threshold more than there are masks: no pixel lies in so many, and the answer is the empty mask.
    pixels = _at_least(shared, len(masks) + 1)
    scores = np.zeros(len(pixels))
    for mask in masks:
        scores += _dice_from_counts(_at_least(shared[mask], len(masks) + 1), pixels + mask.sum())
    return np.asarray(shared >= scores.argmax(), np.bool_)


def _at_least(numbers: npt.NDArray[np.integer], most: int) -> Doubles:
    """Return how many numbers are at least 0, 1, ..., ``most``, ``(most + 1,)``."""
    return np.bincount(numbers.ravel(), minlength=most + 1)[::-1].cumsum()[::-1].astype(np.float64)


def _dice_from_counts(both: Doubles, pixels: Doubles) -> Doubles:
    """Return the DSC from the pixels that two masks share and the sum of their sizes."""
    return np.where(pixels > 0, 2 * both / np.maximum(pixels, 1), 1.0)


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
