"""The release window of rasters: black is 0 and white is the largest value that the file can store."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np
import numpy.typing as npt

from medveil.agent.imageio.image import StoredArray
from medveil.agent.imageio.stepping import stepped

__all__ = ["FullRange"]


@dataclass(frozen=True, slots=True)
class FullRange:
    """The release window of rasters: every stored value from 0 to ``maximum`` (8 bit: 255).

    Attributes:
        maximum: the stored value at the far end of the range.
        inverted: whether 0 is white (TIFF ``MINISWHITE``) instead of black.
    """

    maximum: int
    inverted: bool = False

    @property
    def guessed(self) -> bool:
        """Never: what a raster's values look like is not in doubt."""
        return False

    def display(self, stored: StoredArray) -> npt.NDArray[np.float32]:
        """Return ``stored / maximum``, or one minus that when inverted."""
        shown: npt.NDArray[np.float32] = np.asarray(stored, np.float32) / np.float32(self.maximum)
        return np.float32(1) - shown if self.inverted else shown

    def bounds(self, stored: StoredArray, epsilon: float) -> tuple[StoredArray, StoredArray]:
        """Return ``stored -+ floor(epsilon * maximum / 255)`` within [0, maximum]; exact rationals."""
        reach = min(floor(Fraction(epsilon) * self.maximum / 255), self.maximum)
        # Compared before it is added: nothing overflows, so the stored type is wide enough (9 times faster).
        step, room = stored.dtype.type(reach), stored.dtype.type(self.maximum - reach)
        return np.maximum(stored, step) - step, np.minimum(stored, room) + step

    def shifted(self, stored: StoredArray, delta: npt.NDArray[np.float32]) -> StoredArray:
        """Return ``stored +- round(delta * maximum)`` within [0, maximum]."""
        steps = -self.maximum if self.inverted else self.maximum
        return stepped(stored, delta, steps, 0, self.maximum)
