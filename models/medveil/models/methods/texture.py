"""Local texture as a share: how many neighbours of a pixel are not brighter than it (local binary patterns).

The pattern (Ojala et al., IEEE PAMI 24(7), 2002) compares a pixel with each of its neighbours; UMed bounds
its texture noise by it (arXiv 2403.14250). The exact two-dimensional form of UMed isn't published; this is
the form of its three-dimensional re-implementation: the share of ones in the pattern.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from medveil.models.methods.oracle import FloatArray

__all__ = ["local_binary_share"]


def local_binary_share(images: FloatArray) -> FloatArray:
    """Return the share of neighbours that are not brighter than the pixel, ``(N, 1, ...)`` in [0, 1].

    Eight neighbours in an image, the six that share a face in a volume; the edge is repeated outwards.

    Args:
        images: ``(N, C, rows, columns)`` or ``(N, C, slices, rows, columns)``; channels are averaged to grey.
    """
    grey = images.mean(axis=1, dtype=np.float32)
    space = grey.shape[1:]
    padded = np.pad(grey, ((0, 0), *((1, 1) for _ in space)), mode="edge")
    ones = np.zeros(grey.shape, np.uint8)
    offsets = _offsets(len(space))
    for offset in offsets:
        window = tuple(slice(1 + o, 1 + o + length) for o, length in zip(offset, space, strict=True))
        ones += padded[(slice(None), *window)] <= grey
    return np.asarray(ones[:, None] / np.float32(len(offsets)), np.float32)


def _offsets(axes: int) -> list[tuple[int, ...]]:
    steps = [step for step in product((-1, 0, 1), repeat=axes) if any(step)]
    return steps if axes == 2 else [step for step in steps if sum(map(abs, step)) == 1]
