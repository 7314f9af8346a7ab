"""Try the generators' noise: train small victims on protected patches that no generator saw, test on clean ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from statistics import median
from time import perf_counter

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

__all__ = ["CHECK_VICTIMS", "check_segmentation", "dice_left", "roi_psnr_db", "seconds_per_victim_step"]

CHECK_VICTIMS = (
    SegmentationVictimSettings(architecture="unet-bn"),
    SegmentationVictimSettings(architecture="unet-in"),
)
"""Batch norm and instance norm: what holds against the first one seldom holds against the second."""

# The word "effective" needs every design of victim to lose at least this share of what it learns from clean images.
_LEAST_LOSS = 0.5
# A victim that finds less than this in clean images has nothing to lose: that proves no protection.
_LEAST_LEARNED = 0.2
_TIMED = 3  # steps


def dice_left(
    data: Patches, images: FloatArray, test: Patches, settings: SegmentationVictimSettings, *, seed: int
) -> SegmentationRun:
    """Return the run of one victim that holds ``images`` in place of ``data``'s own."""
    return train_segmentation_victim(
        images, data.labels, test.images, test.labels, settings, classes=data.classes, seed=seed
    )


def seconds_per_victim_step(data: Patches, settings: SegmentationVictimSettings) -> float:
    """Return what one step of a victim takes here and now: a few of a throw-away one, timed."""
    sample = data.select(np.arange(min(len(data), settings.batch_size)))
    timed = replace(settings, steps=_TIMED, readings=1)
    started = perf_counter()
    dice_left(sample, sample.images, sample.select(np.arange(1)), timed, seed=0)
    return (perf_counter() - started) / _TIMED


def check_segmentation(
    data: Patches,
    images: FloatArray,
    test: Patches,
    victims: Sequence[SegmentationVictimSettings],
    *,
    epsilon_255: float,
    attempts: int,
    seeds: Sequence[int],
    advance: Callable[[float], None] = lambda share: None,
) -> SegmentationCheck:
    """Return what victims learn from ``images``, beside what they learn from ``data`` itself.

    Args:
        data: public patches that no generator learned from.
        images: the same, protected.
        test: other such patches, left clean.
        victims: nets outside the ensemble.
        epsilon_255: budget of the noise, 1/255; for the statement.
        attempts: seeds of the generators that were tried; for the statement.
        seeds: of the victims: one run of every design with each, on clean and on protected images.
        advance: told after every victim which share of all victims it was.
    """
    statements = []
    for settings, seed in product(victims, seeds):
        runs = []
        for held in (data.images, images):
            runs.append(dice_left(data, held, test, settings, seed=seed))
            advance(1 / (2 * len(victims) * len(seeds)))
        clean, protected = runs
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
        effective=_effective(statements),
        victims=tuple(statements),
    )


def _effective(victims: Sequence[SegmentationVictim]) -> bool:
    """Return whether every design lost enough, in the median over its seeds: one lucky seed proves nothing."""
    held = []
    for design in dict.fromkeys(victim.architecture for victim in victims):
        runs = [victim for victim in victims if victim.architecture == design]
        clean, left = median(run.clean_dice for run in runs), median(run.protected_dice for run in runs)
        held.append(clean >= _LEAST_LEARNED and left <= (1 - _LEAST_LOSS) * clean)
    return all(held)


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
