"""Golden answers of a generator: what it says about a tile of public pixels, computed in float64 by its trainer."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from medveil.models.bundle import GoldenAnswers
from medveil.models.methods.oracle import FloatArray

__all__ = ["golden_answers"]

# Sessions were measured within 1e-6 of float64 on generators of two and three dimensions; where an activation lies on
# a ReLU's kink a pixel's answer is off by more, and 1e-3 is what a whole tile may be off for that.
_RTOL = 1e-3


@torch.no_grad()
def golden_answers(net: nn.Module, patch: FloatArray, tile: tuple[int, ...]) -> GoldenAnswers:
    """Return what a generator says about one tile full of public pixels.

    Args:
        net: ``(N, *tile)`` to answers of that shape; it is left as it is.
        patch: ``(C, [slices,] rows, columns)`` float32 in [0, 1]; it is repeated, or cut, to the size of a tile.
        tile: shape of one tile, channels first.

    Raises:
        SelfTestError: "golden-vector": the generator says nothing.
    """
    missing = [(0, max(0, wanted - length)) for wanted, length in zip(tile, patch.shape, strict=True)]
    image = np.pad(patch, missing, mode="wrap")[tuple(slice(length) for length in tile)][None]
    reference = copy.deepcopy(net).eval().double()
    said = reference(torch.from_numpy(image).double()).numpy()
    return GoldenAnswers(images=np.ascontiguousarray(image), answers=said.astype(np.float32), rtol=_RTOL)
