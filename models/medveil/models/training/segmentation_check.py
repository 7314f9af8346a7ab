"""Try the generators' noise: train small victims on protected patches that no generator saw, test on clean ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from time import perf_counter

import numpy as np

from medveil.models.audit.segmentation_victims import (
    SegmentationRun,
    SegmentationVictimSettings,
    train_segmentation_victim,
)
from medveil.models.bundle.manifest import SegmentationCheck, SegmentationVictim, segmentation_holds
from medveil.models.datasets.masked import Patches
from medveil.models.methods.base import BoolArray
from medveil.models.methods.oracle import FloatArray
from medveil.models.quality import blurred
from medveil.models.quality.segmentation import constant_mask_dice

__all__ = [
    "CHECK_VICTIMS",
    "check_segmentation",
    "dice_left",
    "roi_psnr_db",
    "seconds_per_victim_step",
]

CHECK_VICTIMS = (
    SegmentationVictimSettings(architecture="unet-bn"),
    SegmentationVictimSettings(architecture="unet-in"),
)
"""Batch norm and instance norm: what holds against the first one seldom holds against the second."""

_TIMED = 3  # steps


def dice_left(
    data: Patches,
    images: FloatArray,
    test: Patches,
    settings: SegmentationVictimSettings,
    *,
    seed: int,
    protected_test: FloatArray | None = None,
) -> SegmentationRun:
    """Return the run of one victim that holds ``images`` in place of ``data``'s own."""
    return train_segmentation_victim(
        images,
        data.labels,
        test.images,
        test.labels,
        settings,
        classes=data.classes,
        seed=seed,
        protected_test=protected_test,
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
    protected_test: FloatArray,
    victims: Sequence[SegmentationVictimSettings],
    *,
    epsilon_255: float,
    attempts: int,
    seeds: Sequence[int],
    advance: Callable[[float], None] = lambda share: None,
) -> SegmentationCheck:
    """Return what victims learn from ``images``, beside what ``data`` itself and its label maps alone teach.

    Args:
        data: public patches that no generator learned from.
        images: the same, protected.
        test: other such patches, left clean.
        protected_test: the same, protected: do models that learned from clean images still read them?
        victims: nets outside the ensemble; the first of them trains on blurred images, too.
        epsilon_255: budget of the noise, 1/255; for the statement.
        attempts: seeds of the generators that were tried; for the statement.
        seeds: of the victims: one run of every design with each, on clean and on protected images, and two of the
            first design on the same, blurred.
        advance: told after every victim which share of all victims it was.
    """
    share = 1 / ((2 * len(victims) + 2) * len(seeds))

    def trained(
        held: Sequence[FloatArray],
        tested: Patches,
        settings: SegmentationVictimSettings,
        seed: int,
        released: FloatArray | None,
    ) -> SegmentationVictim:
        runs = []
        for images in held:
            runs.append(dice_left(data, images, tested, settings, seed=seed, protected_test=released))
            advance(share)
        return _statement(settings.architecture, seed, *runs)

    statements = [
        trained((data.images, images), test, settings, seed, protected_test)
        for settings, seed in product(victims, seeds)
    ]
    soft, soft_test = (blurred(data.images), blurred(images)), replace(test, images=blurred(test.images))
    filtered = [trained(soft, soft_test, victims[0], seed, None) for seed in seeds]
    constant = float(constant_mask_dice(data.labels, test.labels, data.classes).mean())
    return SegmentationCheck(
        images=len(data),
        epsilon_255=epsilon_255,
        psnr_db=_psnr_db(data.images, images, np.ones_like(data.labels, np.bool_)),
        roi_psnr_db=roi_psnr_db(data, images),
        attempts=attempts,
        effective=segmentation_holds(statements, constant),
        victims=tuple(statements),
        constant_mask_dice=constant,
        blurred_victims=tuple(filtered),
    )


def _statement(
    architecture: str, seed: int, clean: SegmentationRun, protected: SegmentationRun
) -> SegmentationVictim:
    return SegmentationVictim(
        architecture=architecture,
        seed=seed,
        clean_dice=clean.last.dice,
        clean_iou=clean.last.iou,
        protected_dice=protected.last.dice,
        protected_iou=protected.last.iou,
        protected_peak_dice=protected.peak_dice,
        clean_recoverable_dice=clean.last.recoverable_dice,
        recoverable_dice=protected.last.recoverable_dice,
        release_dice=clean.release_dice,
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
