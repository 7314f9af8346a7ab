"""Golden vectors: what a net answers to a few images, computed in float64 by its trainer."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from medveil.models.autodiff.selfcheck import GoldenVector
from medveil.models.methods.oracle import FloatArray
from medveil.models.training.oracle import TorchOracle

__all__ = ["golden_vector"]

# float32 sessions were measured within 1e-6 of float64; where an activation lies on a ReLU's kink one pixel's
# gradient jumps, and 1e-3 is what that takes from a whole image.
_RTOL = 1e-3
# Towards all classes at once, so that no image is answered with certainty and none has a vanishing gradient.
_CONFIDENCE = 0.6


def golden_vector(
    net: nn.Module, images: FloatArray, classes: int, *, rng: np.random.Generator
) -> GoldenVector:
    """Return the golden vector of a net over `images`.

    Args:
        net: ``(N, C, H, W)`` to logits ``(N, K)``; it is left as it is.
        images: ``(N, C, H, W)`` float32 in [0, 1]; public, for they travel with the bundle.
        classes: K.
        rng: which class each image is asked about.
    """
    drawn = rng.integers(classes, size=len(images))
    targets = np.full((len(images), classes), (1 - _CONFIDENCE) / classes, np.float32)
    targets[np.arange(len(images)), drawn] += np.float32(_CONFIDENCE)
    reference = TorchOracle(copy.deepcopy(net), images.shape[1:], classes, dtype=torch.float64)
    losses, gradients = reference.loss_and_gradient(images, targets)
    return GoldenVector(images=images, targets=targets, losses=losses, gradients=gradients, rtol=_RTOL)
