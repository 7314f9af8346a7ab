"""The release window of volumes that store any number: whole numbers of any width, or floating point.

Where DICOM's 16 bits fit a table, a float volume does not. Its window is a span from black to white, and a
value may move by at most epsilon of that span, in whole steps of the grid on which the volume's values lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from medveil.agent.imageio.image import StoredArray
from medveil.models.errors import ImageError

__all__ = ["SpanWindow", "grid_step", "volume_window"]

MAX_GRID_LEVELS: Final = 1 << 16
"""Values of a 16-bit detector; a volume with more different values was never on a grid that matters."""

GRID_TOLERANCE: Final = 1e-3
"""How far, in grid steps, a value may lie off the grid: float32 holds 65,536 steps to within 0.004 of one."""

STEP_TOLERANCE: Final = 1e-6
"""Slack when a budget is counted in steps, against float rounding of the step itself."""


@dataclass(frozen=True, slots=True)
class SpanWindow:
    """A release window from ``black`` to ``white``, in stored values; see ``image.ReleaseWindow``.

    Attributes:
        black: stored value shown as 0.
        white: stored value shown as 1; below ``black`` where the slope is negative.
        lowest: smallest stored value of the volume; no change goes below it.
        highest: largest stored value of the volume; no change goes above it.
        step: distance of the grid on which the values lie, counted from ``lowest``; 0 where there is none.
        guessed: whether the window comes from percentiles.
    """

    black: float
    white: float
    lowest: float
    highest: float
    step: float
    guessed: bool = False

    def display(self, stored: StoredArray) -> npt.NDArray[np.float32]:
        """Return where each value lies between black and white: float32, clipped to [0, 1]."""
        shown = (stored.astype(np.float64) - self.black) / (self.white - self.black)
        return np.clip(shown, 0.0, 1.0).astype(np.float32)

    def bounds(self, stored: StoredArray, epsilon: float) -> tuple[StoredArray, StoredArray]:
        """Return the smallest and largest value allowed; ``epsilon`` in 1/255 of the span.

        Values beyond black and white move by as much as those between: a wider window would show it.
        """
        reach = epsilon / 255 * abs(self.white - self.black)
        if self.step:
            steps = float(np.floor(reach / self.step + STEP_TOLERANCE))
            return self._on_grid(stored, np.float64(-steps)), self._on_grid(stored, np.float64(steps))
        low = np.maximum(stored.astype(np.float64) - reach, self.lowest)
        high = np.minimum(stored.astype(np.float64) + reach, self.highest)
        return _inwards(low, stored.dtype, up=True), _inwards(high, stored.dtype, up=False)

    def shifted(self, stored: StoredArray, delta: npt.NDArray[np.float32]) -> StoredArray:
        """Return ``stored + delta`` of the span, in whole grid steps; untouched where that is none."""
        move = np.asarray(delta, np.float64) * (self.white - self.black)
        if self.step:
            return self._on_grid(stored, np.rint(move / self.step))
        wide = np.clip(stored.astype(np.float64) + move, self.lowest, self.highest)
        return np.where(move == 0, stored, wide.astype(stored.dtype)).astype(stored.dtype)

    def _on_grid(self, stored: StoredArray, steps: npt.NDArray[np.float64] | np.float64) -> StoredArray:
        """Return the value ``steps`` grid levels away, computed from its level: equal levels, equal bits."""
        level = np.rint((stored.astype(np.float64) - self.lowest) / self.step) + steps
        moved = np.clip(self.lowest + level * self.step, self.lowest, self.highest).astype(stored.dtype)
        return np.where(steps == 0, stored, moved).astype(stored.dtype)


def volume_window(
    voxels: npt.NDArray[Any],
    window: tuple[float, float] | None,
    slope: float,
    intercept: float,
    percentiles: tuple[float, float] | None,
) -> SpanWindow:
    """Return the release window of a volume.

    Args:
        voxels: all stored values, finite.
        window: lower and upper end in scaled units, from the policy; None takes percentiles.
        slope: scaled value = ``slope * stored + intercept``.
        intercept: see ``slope``.
        percentiles: of the stored values, in [0, 100]; None refuses to guess.

    Raises:
        ImageError: ``no-window``.
    """
    lowest, highest = float(voxels.min()), float(voxels.max())
    if window is None:
        if percentiles is None:
            raise ImageError(
                "no-window", "A NIfTI volume declares no display window; set one in the policy (nifti)."
            )
        black, white = (float(end) for end in np.percentile(voxels, percentiles))
    else:
        black, white = sorted((end - intercept) / slope for end in window)
    step = 1.0 if voxels.dtype.kind in "iu" else grid_step(voxels)
    if slope < 0:
        black, white = white, black
    if black == white:  # a constant volume: a span of one step allows no change
        white = black + (step or 1.0) * (1 if slope >= 0 else -1)
    return SpanWindow(black, white, lowest, highest, step, guessed=window is None)


def grid_step(voxels: npt.NDArray[Any]) -> float:
    """Return the step of the regular grid on which all values lie, 0 where there is none."""
    values = np.unique(voxels).astype(np.float64)
    if not 2 <= values.size <= MAX_GRID_LEVELS:
        return 0.0
    step = float(np.diff(values).min())
    levels = np.rint((values[-1] - values[0]) / step)
    if not 1 <= levels <= MAX_GRID_LEVELS:
        return 0.0
    step = float((values[-1] - values[0]) / levels)
    at = (values - values[0]) / step
    return step if float(np.abs(at - np.rint(at)).max()) <= GRID_TOLERANCE else 0.0


def _inwards(bound: npt.NDArray[np.float64], dtype: np.dtype[Any], *, up: bool) -> StoredArray:
    """Return a bound in the stored float type, rounded so that it never widens the interval."""
    narrow = bound.astype(dtype)
    outside = narrow < bound if up else narrow > bound
    return np.where(outside, np.nextafter(narrow, dtype.type(np.inf if up else -np.inf)), narrow)
