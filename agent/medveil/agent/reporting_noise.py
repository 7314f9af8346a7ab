"""Noise for counts that leave: the discrete Laplace distribution, drawn exactly.

A table of counts in which one patient changes at most ``n`` images is epsilon-differentially private once each count
has a draw of scale ``n / epsilon`` in it (Ghosh, Roughgarden and Sundararajan 2009, arXiv 0811.2841; Dwork and Roth
2014, section 3.3). Drawn with whole numbers only (Canonne, Kamath and Steinke 2020, arXiv 2004.00010, Alg. 1 and 2):
noise made from floating point gives itself away in its last bits (Mironov 2012). OpenDP draws the same in a wheel of
47 MB, without a seed to test it by.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from random import Random, SystemRandom
from typing import Final

__all__ = ["Draw", "discrete_laplace", "secret_draw"]

Draw = Callable[[Fraction], int]
"""Takes a scale and returns one independent draw, in images."""

_ONE: Final = Fraction(1)


def secret_draw(scale: Fraction) -> int:
    """Return a draw from the machine's cryptographic source: what nobody can repeat, nobody can subtract."""
    return discrete_laplace(scale, SystemRandom())


def discrete_laplace(scale: Fraction, source: Random) -> int:
    """Return a draw with P(n) proportional to exp(-|n| / scale) (Alg. 2).

    Args:
        scale: above 0.
        source: of uniform whole numbers.
    """
    over, under = scale.numerator, scale.denominator
    while True:
        low = source.randrange(over)
        if not _exp_minus(Fraction(low, over), source):
            continue
        high = 0
        while _exp_minus(_ONE, source):
            high += 1
        size = (low + over * high) // under
        is_negative = source.randrange(2) == 1
        if size or not is_negative:  # or zero would come up twice as often as it should
            return -size if is_negative else size


def _exp_minus(gamma: Fraction, source: Random) -> bool:
    """Return True with probability exp(-gamma), for gamma in [0, 1] (Alg. 1)."""
    tries = 1
    while source.randrange(gamma.denominator * tries) < gamma.numerator:
        tries += 1
    return tries % 2 == 1
