"""Statistical disclosure control: which counts may be told, and which would give a small group away. Pure.

A count of 1 to k-1 images is withheld (k: minimum group size). Where the total is told, a single gap could be
filled by subtraction, so further counts are withheld until at least two are missing and together hold at least
k images (complementary suppression; Hundepool et al., Statistical Disclosure Control, 2012, chapter 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

__all__ = ["Figure", "Withheld", "coarsened", "gated_parts", "gated_total"]


class Withheld(Enum):
    """Why a figure is not told."""

    SMALL = "small"
    COMPLEMENTARY = "complementary"
    POLICY = "policy"
    NOISE = "noise"
    BUDGET = "budget"


Figure = int | Withheld
"""A count that may be told, or why it may not."""


def gated_total(total: int, minimum: int) -> Figure:
    """Return a count that stands alone."""
    return Withheld.SMALL if 0 < total < minimum else total


def gated_parts(total: Figure, parts: Sequence[int], minimum: int) -> list[Figure]:
    """Return the parts of a total, as far as they may be told beside it.

    Args:
        total: what is told of the sum; when it is withheld, so is every part.
        parts: counts that add up to it.
        minimum: the minimum group size.
    """
    if isinstance(total, Withheld):
        return [Withheld.COMPLEMENTARY if total is not Withheld.POLICY else total] * len(parts)
    small = {index for index, count in enumerate(parts) if 0 < count < minimum}
    hidden = set(small)
    # The smallest first: it costs the fewest images. Zeros hide nothing. One small count alone never holds
    # a whole group, so at least two end up hidden.
    spare = sorted(
        (index for index, count in enumerate(parts) if count >= minimum), key=lambda i: parts[i], reverse=True
    )
    while hidden and sum(parts[i] for i in hidden) < minimum:
        hidden.add(spare.pop())
    return [_figure(count, index in small, index in hidden) for index, count in enumerate(parts)]


def coarsened(count: int, minimum: int) -> Figure:
    """Return a running count rounded down to whole groups, so that two beats cannot be subtracted."""
    return Withheld.SMALL if 0 < count < minimum else count - count % minimum


def _figure(count: int, small: bool, hidden: bool) -> Figure:
    if small:
        return Withheld.SMALL
    return Withheld.COMPLEMENTARY if hidden else count
