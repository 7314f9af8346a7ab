"""VoxShield: noise of one generator inside the foreground of a volume (Liu et al., arXiv 2605.17345).

    delta = clip(eps * tanh(G(x)), -eps, eps) where y > 0

The generator is trained to be inconsistent from slice to slice and to disrupt the surrogate's answers
(`medveil.models.training.segmentation`); at the site it is one forward pass.
"""

from __future__ import annotations

import numpy as np

from medveil.models.methods.base import MethodInfo
from medveil.models.methods.masked import Limits, MaskedBatch, SegmentationMethod, SegmentationSettings
from medveil.models.methods.projection import at_most

__all__ = ["METHOD", "ROI", "foreground"]

ROI = "roi"


def foreground(batch: MaskedBatch, settings: SegmentationSettings) -> Limits:
    """Return epsilon wherever a class is marked, 0 elsewhere: a hard region of interest."""
    return {ROI: np.asarray(at_most(settings.epsilon) * (batch.labels > 0)[:, None], np.float32)}


METHOD = SegmentationMethod(
    info=MethodInfo(
        name="voxshield", title="VoxShield (volumes)", source="arXiv 2605.17345", task="segmentation"
    ),
    limits=foreground,
    parts=(ROI,),
    across_slices=True,
)
