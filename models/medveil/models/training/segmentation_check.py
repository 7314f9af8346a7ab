"""Try the generators' noise: train small victims on protected patches that no generator saw, test on clean ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medveil.models.audit.segmentation_victims import (
    SegmentationRun,
    SegmentationVictimSettings,
    train_segmentation_victim,
)
from medveil.models.bundle.manifest import SegmentationCheck, SegmentationVictim
from medveil.models.datasets.masked import Patches
from medveil.models.methods.base import BoolArray
from medveil.models.methods.oracle import FloatArray

__all__ = ["CHECK_VICTIMS", "check_segmentation", "dice_left", "roi_psnr_db"]

CHECK_VICTIMS = (
    SegmentationVictimSettings(architecture="unet-bn"),
    SegmentationVictimSettings(architecture="unet-in"),
)
"""Batch norm and instance norm: what holds against the first one seldom holds against the second."""

# The word "effective" needs every victim to lose at least this share of what it learns from clean images.
_LEAST_LOSS = 0.5
# A victim that finds less than this in clean images has nothing to lose: that proves no protection.
_LEAST_LEARNED = 0.2


def dice_left(
    data: Patches, images: FloatArray, test: Patches, settings: SegmentationVictimSettings, *, seed: int
) -> SegmentationRun:
    """Return the run of one victim that holds ``images`` in place of ``data``'s own."""
    return train_segmentation_victim(
        images, data.labels, test.images, test.labels, settings, classes=data.classes, seed=seed
    )


def check_segmentation(
    data: Patches,
    images: FloatArray,
    test: Patches,
    victims: Sequence[SegmentationVictimSettings],
    *,
    epsilon_255: float,
    attempts: int,
    seed: int,
) -> SegmentationCheck:
    """Return what victims learn from ``images``, beside what they learn from ``data`` itself.

    Args:
        data: public patches that no generator learned from.
        images: the same, protected.
        test: other such patches, left clean.
        victims: nets outside the ensemble.
        epsilon_255: budget of the noise, 1/255; for the statement.
        attempts: seeds that were tried; for the statement.
        seed: of the victims.
    """
    statements = []
    for settings in victims:
        clean = dice_left(data, data.images, test, settings, seed=seed)
        protected = dice_left(data, images, test, settings, seed=seed)
        statements.append(
            SegmentationVictim(
                architecture=settings.architecture,
                seed=seed,
                clean_dice=clean.last.dice,
                clean_iou=clean.last.iou,
                protected_dice=protected.last.dice,
                protected_iou=protected.last.iou,
                protected_peak_dice=protected.peak_dice,
            )
        )
    return SegmentationCheck(
        images=len(data),
        epsilon_255=epsilon_255,
        psnr_db=_psnr_db(data.images, images, np.ones_like(data.labels, np.bool_)),
        roi_psnr_db=roi_psnr_db(data, images),
        attempts=attempts,
        effective=all(
            v.clean_dice >= _LEAST_LEARNED and v.protected_dice <= (1 - _LEAST_LOSS) * v.clean_dice
            for v in statements
        ),
        victims=tuple(statements),
    )


def roi_psnr_db(data: Patches, images: FloatArray) -> float | None:
    """Return the median PSNR over the foreground of each patch; None where most are unchanged or have none.

    Noise that keeps to the foreground scores high on the whole image for free.
    """
    return _psnr_db(data.images, images, data.labels > 0)


def _psnr_db(before: FloatArray, after: FloatArray, where: BoolArray) -> float | None:
    inside = np.broadcast_to(where[:, None], before.shape)
    error = np.where(inside, np.square(before.astype(np.float64) - after), 0)
    axes = tuple(range(1, before.ndim))
    squares = error.sum(axis=axes) / np.maximum(inside.sum(axis=axes), 1)
    counted = squares[inside.any(axis=axes)]
    if not len(counted) or np.median(counted) == 0:
        return None
    with np.errstate(divide="ignore"):
        return float(np.median(-10 * np.log10(counted)))
