"""The release-window rule: how far each stored integer may move before a screen shows more than the budget.

A stored value becomes a grey level in two steps: the modality transform (slope and intercept, or a table)
gives the modality's own unit (HU, SUV), and the window (LINEAR, LINEAR_EXACT, SIGMOID, or a table) gives the
display value in [0, 1]. Both are evaluated once for every value the file can store. A table of at most 65,536
entries then answers every question exactly, whatever the transforms were, and nothing is ever computed per
pixel.

The allowed interval of a stored value v holds every u whose display differs from v's by at most epsilon, in
*every* window of the release. Three rules go beyond the bare definition:

* A linear window counts as if its ramp went on past black and white, and behind a table the change may not
  exceed epsilon of the stored span that the table spreads over the screen. Where a window saturates the eye
  sees nothing, but a wider window and every threshold in HU would.
* Padding never moves, and nothing ever lands on it: a changed padding value would appear as tissue.
* A table that runs up *and* down has no interval; it is refused by name.

Sources: DICOM PS3.3 C.11.1 (modality LUT), C.11.2.1.2 (windows and their formulas), C.7.5.1.1.2 (padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from math import floor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from medveil.agent.imageio.image import StoredArray
from medveil.agent.imageio.stepping import blocks, stepped
from medveil.models.errors import ImageError

__all__ = [
    "DEFAULT_PERCENTILES",
    "Function",
    "LookupTable",
    "Mapping",
    "Rescale",
    "StoredRange",
    "StoredWindow",
    "Window",
    "histogram",
    "percentile_window",
    "undeclared_padding",
]

Table = npt.NDArray[np.float64]

DEFAULT_PERCENTILES: Final = (0.5, 99.5)
"""The guess for files without a window; a wider one would allow larger changes (our choice)."""

DISPLAY_TOLERANCE: Final = 1e-9
"""Slack for float rounding when display values are compared: far below one 16-bit grey level (1.5e-5)."""

NARROWEST_RAMP: Final = 1e-6
"""Stand-in for a ramp of width 0 (LINEAR with width 1 is a threshold): nothing may cross it, no division by
0."""

PADDING_MIN_GAP: Final = 0.1
"""Undeclared padding lies at least this share of the used range away from the nearest real value (our choice:
a head CT's -2000 outside the field leaves a gap of 0.2 to air; an image's own darkest value leaves none)."""

PADDING_MIN_SHARE: Final = 0.005
"""... and covers at least this share of the pixels (our choice: padding fills corners, a dead pixel does
not)."""

PADDING_MIN_LEVELS: Final = 16
"""... in a frame that uses at least this many distinct values besides it: a mask or a drawing has no
padding."""


class Function(StrEnum):
    """How a window's ramp is drawn: VOI LUT Function (0028,1056)."""

    LINEAR = "LINEAR"
    LINEAR_EXACT = "LINEAR_EXACT"
    SIGMOID = "SIGMOID"


@dataclass(frozen=True, slots=True)
class StoredRange:
    """Every value a file's pixels can take: ``low`` to ``high``, both inclusive."""

    low: int
    high: int

    @classmethod
    def of_bits(cls, bits: int, *, signed: bool) -> StoredRange:
        """Return the range of ``bits`` stored bits, in two's complement if ``signed``."""
        return cls(-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else cls(0, (1 << bits) - 1)

    def values(self) -> npt.NDArray[np.int64]:
        """Return all values, ascending."""
        return np.arange(self.low, self.high + 1)


@dataclass(frozen=True, slots=True)
class LookupTable:
    """A table as DICOM stores it: input ``first`` gives the first entry; inputs outside give the end entries.

    Attributes:
        first: first input value mapped.
        entries: little-endian uint16 entries as bytes (hashable without a copy).
    """

    first: int
    entries: bytes

    def of(self, values: Table) -> Table:
        """Return the entry of each (integer) value."""
        entries = np.frombuffer(self.entries, "<u2").astype(np.float64)
        return entries[np.clip(np.rint(values).astype(np.int64) - self.first, 0, entries.size - 1)]

    def span(self) -> tuple[float, float]:
        """Return the smallest and the largest entry."""
        entries = np.frombuffer(self.entries, "<u2")
        return float(entries.min()), float(entries.max())


@dataclass(frozen=True, slots=True)
class Rescale:
    """Modality transform by rescale slope and intercept: ``m = slope * v + intercept``."""

    slope: float = 1.0
    intercept: float = 0.0

    def of(self, values: Table) -> Table:
        """Return each stored value in the modality's unit."""
        return self.slope * values + self.intercept


@dataclass(frozen=True, slots=True)
class Window:
    """A window by centre and width, in the modality's unit.

    Raises:
        ImageError: ``bad-window`` where the width is not one that the standard allows.
    """

    centre: float
    width: float
    function: Function = Function.LINEAR

    def __post_init__(self) -> None:
        smallest = 1.0 if self.function is Function.LINEAR else NARROWEST_RAMP
        if not (np.isfinite(self.centre) and np.isfinite(self.width) and self.width >= smallest):
            raise ImageError(
                "bad-window", "The display window of this file has no valid width; set one in the policy."
            )

    def of(self, values: Table) -> Table:
        """Return the display value, clipped to [0, 1]."""
        if self.function is Function.SIGMOID:
            return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - self.centre) / self.width, -700.0, 700.0)))
        return np.clip(self.ramp(values), 0.0, 1.0)

    def ramp(self, values: Table) -> Table:
        """Return the straight line through the window's middle, not clipped (C.11.2.1.2.1 and C.11.2.1.3.2).

        A sigmoid's line is its tangent at the centre, its steepest part: whoever keeps to the line keeps to
        both.
        """
        if self.function is Function.LINEAR:
            return (values - (self.centre - 0.5)) / max(self.width - 1.0, NARROWEST_RAMP) + 0.5
        return (values - self.centre) / self.width + 0.5


@dataclass(frozen=True, slots=True)
class Mapping:
    """One way from stored value to screen: modality transform, window, and whether white is 0 (MONOCHROME1).

    Attributes:
        name: what the report calls this window (``"40/400"``, ``"VOI LUT 1"``, ``"percentile"``).
    """

    modality: Rescale | LookupTable
    voi: Window | LookupTable
    inverted: bool = False
    name: str = ""

    def display(self, stored: StoredRange) -> Table:
        """Return what a screen shows for every stored value: float64 in [0, 1]."""
        units = self.modality.of(stored.values().astype(np.float64))
        shown = self.voi.of(units)
        if isinstance(self.voi, LookupTable):
            low, high = self.voi.span()
            shown = (shown - low) / max(high - low, NARROWEST_RAMP)
        return 1.0 - shown if self.inverted else shown

    def budget_tables(self, stored: StoredRange) -> list[Table]:
        """Return the tables in which a change is counted, each monotone.

        Raises:
            ImageError: ``non-monotone-lut`` where a table runs up and down.
        """
        shown = self.display(stored)
        steps = np.diff(shown)
        if (steps > 0).any() and (steps < 0).any():
            raise ImageError(
                "non-monotone-lut",
                "A lookup table of this file runs up and down, so no change can be bounded; leave it out.",
            )
        values = stored.values().astype(np.float64)
        if isinstance(self.modality, Rescale) and isinstance(self.voi, Window):
            ramp = self.voi.ramp(self.modality.of(values))
            return [ramp] if self.voi.function is not Function.SIGMOID else [shown, ramp]
        moving = np.flatnonzero(steps)
        span = moving[-1] - moving[0] + 1 if moving.size else 0
        return [shown, values / max(float(span), NARROWEST_RAMP)]


@dataclass(frozen=True, slots=True)
class StoredWindow:
    """The release window of a file that stores integers of up to 16 bits; see ``image.ReleaseWindow``.

    Attributes:
        stored: every value the pixels can take.
        mappings: the windows that matter; the first is the one the surrogate and the contact sheet see.
        frozen: inclusive ranges of values that never move and that nothing moves to (padding).
        guessed: whether the window was taken from the image's own values for want of a declared one.
    """

    stored: StoredRange
    mappings: tuple[Mapping, ...]
    frozen: tuple[tuple[int, int], ...] = ()
    guessed: bool = False

    def display(self, stored: StoredArray) -> npt.NDArray[np.float32]:
        """Return what the first window shows: float32 in [0, 1], same shape."""
        (shown,) = self._look_up(stored, _display_table(self.mappings[0], self.stored))
        return shown

    def bounds(self, stored: StoredArray, epsilon: float) -> tuple[StoredArray, StoredArray]:
        """Return the smallest and largest value allowed; ``epsilon`` in 1/255 of the release windows."""
        low, high = (table.astype(stored.dtype) for table in interval_table(self, epsilon))
        least, most = self._look_up(stored, low, high)
        return least, most

    def shifted(self, stored: StoredArray, delta: npt.NDArray[np.float32]) -> StoredArray:
        """Return the values that come nearest to showing ``display + delta`` in the first window.

        A linear window moves along its unclipped ramp, so that black and white pixels take part as well.
        """
        first = self.mappings[0]
        if isinstance(first.modality, Rescale) and isinstance(first.voi, Window):
            width = first.voi.width - (1.0 if first.voi.function is Function.LINEAR else 0.0)
            sign = -1.0 if first.inverted else 1.0
            steps = sign * width / first.modality.slope
            return stepped(stored, delta, steps, self.stored.low, self.stored.high)
        return self._nearest(stored, np.asarray(delta, np.float64)).astype(stored.dtype)

    def _nearest(self, stored: StoredArray, delta: Table) -> Table:
        """Return the value whose entry in the (monotone) display table lies nearest to the wish."""
        table = self.mappings[0].display(self.stored)
        falling = bool(table[0] > table[-1])
        wish = table[stored.astype(np.intp) - self.stored.low] + delta
        if falling:
            table, wish = -table, -wish
        right = np.clip(np.searchsorted(table, wish), 1, table.size - 1)
        nearer = right - (wish - table[right - 1] < table[right] - wish)
        return np.where(delta == 0, stored, nearer + self.stored.low).astype(np.float64)

    def _look_up(self, stored: StoredArray, *tables: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """Return each table's entry for every stored value."""
        found = tuple(np.empty(stored.shape, table.dtype) for table in tables)
        flat, into = stored.reshape(-1), [values.reshape(-1) for values in found]
        for block in blocks(flat.size):
            index = flat[block].astype(np.intp) - self.stored.low
            for table, values in zip(tables, into, strict=True):
                values[block] = table[index]
        return found


@lru_cache(maxsize=32)
def _display_table(mapping: Mapping, stored: StoredRange) -> npt.NDArray[np.float32]:
    return mapping.display(stored).astype(np.float32)


@lru_cache(maxsize=32)  # the slices of a series share their window: one table for hundreds of files
def interval_table(
    window: StoredWindow, epsilon: float
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return ``low`` and ``high`` for every stored value (index 0 is ``window.stored.low``), both inclusive.

    Args:
        window: the release windows and what is frozen.
        epsilon: largest change in any of the windows, in 1/255.
    """
    values = window.stored.values()
    low, high = np.full_like(values, values[0]), np.full_like(values, values[-1])
    for mapping in window.mappings:
        for table in mapping.budget_tables(window.stored):
            least, most = _reach(table, float(Fraction(epsilon) / 255))
            low, high = np.maximum(low, values[least]), np.minimum(high, values[most])
    for first, last in window.frozen:
        padding = (values >= first) & (values <= last)
        low[values > last] = np.maximum(low[values > last], last + 1)
        high[values < first] = np.minimum(high[values < first], first - 1)
        low[padding] = high[padding] = values[padding]
    # A value between two padding ranges, or one that a step of the table isolates, stays where it is.
    return np.minimum(low, values).astype(np.int32), np.maximum(high, values).astype(np.int32)


def _reach(table: Table, epsilon: float) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return for each index the first and last index whose entry lies within ``epsilon`` (table monotone)."""
    rising = table if table[-1] >= table[0] else -table
    slack = epsilon + DISPLAY_TOLERANCE
    first = np.searchsorted(rising, rising - slack, side="left")
    last = np.searchsorted(rising, rising + slack, side="right") - 1
    return first, last


def histogram(pixels: StoredArray, stored: StoredRange) -> npt.NDArray[np.int64]:
    """Return how many pixels hold each stored value (index 0 is ``stored.low``)."""
    index = pixels.astype(np.intp).ravel() - stored.low
    return np.bincount(index, minlength=stored.high - stored.low + 1)


def _without(
    counts: npt.NDArray[np.int64], stored: StoredRange, frozen: Sequence[tuple[int, int]]
) -> npt.NDArray[np.int64]:
    """Return a histogram in which padding does not count."""
    counts = counts.copy()
    for first, last in frozen:
        counts[max(first - stored.low, 0) : max(last - stored.low + 1, 0)] = 0
    return counts


def undeclared_padding(
    counts: npt.NDArray[np.int64], stored: StoredRange, declared: Sequence[tuple[int, int]] = ()
) -> tuple[tuple[int, int], ...]:
    """Return the padding that a frame uses without declaring it, as frozen ranges (none, one or two).

    Scanners write a value that no tissue has outside the field of view, such as -2000 in CT, without setting
    Pixel Padding Value. It stands alone at an end of the range, far from the nearest real value, and is
    frequent.

    Args:
        counts: pixels per stored value, see ``histogram``.
        stored: what index 0 of ``counts`` stands for.
        declared: padding that the file does declare; it may name another value than the one it uses.
    """
    counts = _without(counts, stored, declared)
    used = np.flatnonzero(counts)
    if used.size <= PADDING_MIN_LEVELS:
        return ()
    gap = PADDING_MIN_GAP * (used[-1] - used[0])
    total = counts.sum()
    ends = ((used[0], used[1]), (used[-1], used[-2]))
    return tuple(
        (int(end) + stored.low, int(end) + stored.low)
        for end, neighbour in ends
        if abs(int(end) - int(neighbour)) >= gap and counts[end] >= PADDING_MIN_SHARE * total
    )


def percentile_window(
    counts: npt.NDArray[np.int64],
    stored: StoredRange,
    modality: Rescale,
    percentiles: tuple[float, float],
    frozen: Sequence[tuple[int, int]],
) -> Window | None:
    """Guess a window from the values a frame uses, padding left out; None where it uses a single value.

    Args:
        counts: pixels per stored value, see ``histogram``.
        stored: what index 0 of ``counts`` stands for.
        modality: rescale that the window is expressed in.
        percentiles: lower and upper percentile, in [0, 100].
        frozen: inclusive ranges of padding.
    """
    cumulative = np.cumsum(_without(counts, stored, frozen))
    if not cumulative[-1]:
        return None
    low, high = (
        int(np.searchsorted(cumulative, floor(cumulative[-1] * share / 100), side="right"))
        for share in percentiles
    )
    ends = modality.of(np.array([low, min(high, counts.size - 1)], np.float64) + stored.low)
    width = float(abs(ends[1] - ends[0]))
    if not width:
        return None
    return Window(float(ends.mean()), width, Function.LINEAR_EXACT)
