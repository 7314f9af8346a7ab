"""How much a protected image differs from its original, and how well a segmentation matches a reference."""

from __future__ import annotations

from medveil.models.quality.fidelity import (
    Fidelity,
    changed_share,
    max_change,
    mean_shift,
    measure,
    median_or_none,
    psnr_db,
    ssim,
)
from medveil.models.quality.filters import blurred
from medveil.models.quality.segmentation import (
    SegmentationScores,
    constant_mask_dice,
    dice,
    hd95,
    iou,
    recoverable_dice,
    score_classes,
)

__all__ = [
    "Fidelity",
    "SegmentationScores",
    "blurred",
    "changed_share",
    "constant_mask_dice",
    "dice",
    "hd95",
    "iou",
    "max_change",
    "mean_shift",
    "measure",
    "median_or_none",
    "psnr_db",
    "recoverable_dice",
    "score_classes",
    "ssim",
]
