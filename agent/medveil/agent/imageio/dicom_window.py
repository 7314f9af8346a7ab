"""Which windows a DICOM frame is shown in: what the file declares, what the policy presets, or a guess.

Classic objects carry one description for the whole file. Enhanced objects carry one per frame in functional
groups: the frame's own item first, then the shared one.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from medveil.agent.imageio.image import StoredArray
from medveil.agent.imageio.window import (
    DEFAULT_PERCENTILES,
    Function,
    LookupTable,
    Mapping,
    Rescale,
    StoredRange,
    StoredWindow,
    Window,
    histogram,
    percentile_window,
    undeclared_padding,
)
from medveil.models.errors import ImageError

__all__ = ["DEFAULT_PRESETS", "Choice", "WindowPolicy", "frame_window"]

Presets = ReadOnlyDict[str, tuple[tuple[float, float], ...]]

DEFAULT_PRESETS: Final[Presets] = MappingProxyType({"CT": ((40.0, 400.0),)})
"""Centre and width where a file declares none: CT soft tissue, in HU. No other modality has an absolute scale
that would make one window right everywhere."""

DESCRIPTOR_FULL: Final = 0
"""A LUT Descriptor cannot write 65,536 in 16 bits; the standard writes 0 (PS3.3 C.11.1.1)."""


class Choice(StrEnum):
    """Which windows the budget is counted in."""

    DECLARED = "declared"
    """All that the file declares; the presets where it declares none."""
    PRESETS = "presets"
    """The policy's presets; the declared ones for a modality without a preset."""
    BOTH = "both"
    """All of them at once: the strictest, and it leaves the least to perturb."""


@dataclass(frozen=True, slots=True)
class WindowPolicy:
    """How the release windows are chosen.

    Attributes:
        choice: see ``Choice``.
        presets: ``(centre, width)`` pairs per DICOM modality, in the modality's unit (HU for CT).
        percentiles: window of last resort, from the frame's own values, in [0, 100]; None refuses such files.
    """

    choice: Choice = Choice.DECLARED
    presets: Presets = field(default_factory=lambda: DEFAULT_PRESETS)
    percentiles: tuple[float, float] | None = DEFAULT_PERCENTILES


def frame_window(
    dataset: Dataset, frame: int, pixels: StoredArray, stored: StoredRange, policy: WindowPolicy
) -> StoredWindow:
    """Return the release window of one grey frame.

    Args:
        dataset: the object, pixel data not needed.
        frame: index of the frame, from 0.
        pixels: the frame's stored values; only for padding that nobody declared and for the guess.
        stored: every value that the file can store.
        policy: which windows count.

    Raises:
        ImageError: ``bad-window``, ``bad-lut``, ``bad-rescale``, or ``no-window`` where the policy forbids to
            guess.
    """
    groups = _functional_groups(dataset, frame)
    inverted = _is_inverted(dataset)
    modality = _modality_transform(dataset, groups)
    counts = histogram(pixels, stored)
    frozen = _declared_padding(dataset, stored) + _supplemental_colours(dataset)
    frozen += undeclared_padding(counts, stored, frozen)

    declared = tuple(
        Mapping(modality, voi, inverted, name) for name, voi in _declared_windows(dataset, groups, modality)
    )
    presets = tuple(
        Mapping(modality, Window(centre, width), inverted, f"{centre:g}/{width:g}")
        for centre, width in policy.presets.get(str(dataset.get("Modality", "")), ())
    )
    mappings = {
        Choice.DECLARED: declared or presets,
        Choice.PRESETS: presets or declared,
        Choice.BOTH: presets + declared,
    }[policy.choice]
    if mappings:
        return StoredWindow(stored, mappings, frozen)
    return _guessed(counts, stored, modality, inverted, policy, frozen)


def _guessed(
    counts: npt.NDArray[np.int64],
    stored: StoredRange,
    modality: Rescale | LookupTable,
    inverted: bool,
    policy: WindowPolicy,
    frozen: tuple[tuple[int, int], ...],
) -> StoredWindow:
    """Return a window over the frame's own values; over everything it can store where it holds one value."""
    if policy.percentiles is None:
        raise ImageError(
            "no-window", "This file declares no display window; add a preset for its modality to the policy."
        )
    # The guess is made in stored values; behind a modality table that is the only scale that is sure to rise.
    rescale = modality if isinstance(modality, Rescale) else Rescale()
    window = percentile_window(counts, stored, rescale, policy.percentiles, frozen)
    if window is None:
        middle, width = (stored.low + stored.high) / 2, float(stored.high - stored.low)
        rescale, window = Rescale(), Window(middle, width, Function.LINEAR_EXACT)
    return StoredWindow(stored, (Mapping(rescale, window, inverted, "percentile"),), frozen, guessed=True)


def _functional_groups(dataset: Dataset, frame: int) -> tuple[Dataset, ...]:
    """Return the functional groups that describe a frame, its own before the shared ones."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    return (*per_frame[frame : frame + 1], *shared[:1])


def _described_in(dataset: Dataset, groups: tuple[Dataset, ...], macro: str, keyword: str) -> Dataset | None:
    """Return the dataset that holds ``keyword``: a functional group's macro item, or the object itself."""
    for group in groups:
        items = group.get(macro) or ()
        if items and keyword in items[0]:
            return Dataset(items[0])
    return dataset if keyword in dataset else None


def _is_inverted(dataset: Dataset) -> bool:
    """Return whether 0 is shown white; Presentation LUT Shape only repeats it (PS3.3 C.8.11.3.1.2)."""
    return str(dataset.get("PhotometricInterpretation", "")) == "MONOCHROME1"


def _modality_transform(dataset: Dataset, groups: tuple[Dataset, ...]) -> Rescale | LookupTable:
    """Return how stored values become HU (or whatever the modality measures)."""
    if items := dataset.get("ModalityLUTSequence"):
        return _lookup_table(items[0], dataset)
    holder = _described_in(dataset, groups, "PixelValueTransformationSequence", "RescaleSlope")
    if holder is None:
        return Rescale()
    slope, intercept = _number(holder.get("RescaleSlope"), 1.0), _number(holder.get("RescaleIntercept"), 0.0)
    if not slope:
        raise ImageError("bad-rescale", "The rescale slope of this file is 0, so its values mean nothing.")
    return Rescale(slope, intercept)


def _declared_windows(
    dataset: Dataset, groups: tuple[Dataset, ...], modality: Rescale | LookupTable
) -> Iterator[tuple[str, Window | LookupTable]]:
    """Yield the name and transform of every window the file declares."""
    holder = _described_in(dataset, groups, "FrameVOILUTSequence", "WindowCenter")
    if holder is not None:
        function = _function(holder)
        centres, widths = _numbers(holder.get("WindowCenter")), _numbers(holder.get("WindowWidth"))
        for centre, width in zip(centres, widths, strict=False):  # a list cut short still names whole pairs
            if width > 0:  # 0/0 is how some systems write "no window"
                yield f"{centre:g}/{width:g}", Window(centre, width, function)
    for number, item in enumerate(dataset.get("VOILUTSequence") or (), start=1):
        # What a VOI LUT maps may be negative exactly where the modality transform gives negative values.
        yield f"VOI LUT {number}", _lookup_table(item, dataset, negative=_may_be_negative(dataset, modality))


def _function(holder: Dataset) -> Function:
    try:
        return Function(str(holder.get("VOILUTFunction") or Function.LINEAR))
    except ValueError as exc:
        raise ImageError(
            "bad-window", "This file names a window function that the standard does not know."
        ) from exc


def _may_be_negative(dataset: Dataset, modality: Rescale | LookupTable) -> bool:
    signed = bool(dataset.get("PixelRepresentation", 0))
    return isinstance(modality, Rescale) and (signed or modality.intercept < 0 or modality.slope < 0)


def _lookup_table(item: Dataset, dataset: Dataset, negative: bool | None = None) -> LookupTable:
    """Return a modality or VOI table.

    Args:
        item: sequence item with LUT Descriptor (0028,3002) and LUT Data (0028,3006).
        dataset: the object, for its byte order and sign.
        negative: whether the first mapped value is signed; as the pixels are, if not given.
    """
    try:
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        entries = _entries(item["LUTData"].value, (count & 0xFFFF) or 1 << 16, bits, dataset)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ImageError("bad-lut", "A lookup table of this file is damaged.", private=repr(exc)) from exc
    signed = bool(dataset.get("PixelRepresentation", 0)) if negative is None else negative
    first &= 0xFFFF
    return LookupTable(
        first - (1 << 16) if signed and first >= 1 << 15 else first, entries.astype("<u2").tobytes()
    )


def _entries(data: Any, count: int, bits: int, dataset: Dataset) -> npt.NDArray[np.uint16]:
    """Return the table's entries; written as words, as packed bytes, or as a list of numbers."""
    if isinstance(data, bytes):
        words = ">u2" if dataset.original_encoding[1] is False else "<u2"
        packed = bits <= 8 and len(data) < 2 * count
        values = np.frombuffer(data, np.uint8 if packed else words)
    else:
        values = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    if values.size < count:
        raise ValueError(f"{values.size} entries, {count} declared")
    return values[:count].astype(np.uint16)


def _declared_padding(dataset: Dataset, stored: StoredRange) -> tuple[tuple[int, int], ...]:
    """Return Pixel Padding Value to Pixel Padding Range Limit as a frozen range.

    Some writers store a negative padding value as an unsigned number: 63536 in a signed file is -2000.
    """
    declared = (dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit"))
    ends = sorted(
        int(value) - (1 << 16 if int(value) > stored.high and stored.low < 0 else 0)
        for value in declared
        if isinstance(value, int)
    )
    return ((ends[0], ends[-1]),) if isinstance(declared[0], int) else ()


def _supplemental_colours(dataset: Dataset) -> tuple[tuple[int, int], ...]:
    """Return the grey values that a Supplemental Palette shows in colour: a change there changes a hue."""
    descriptor = dataset.get("RedPaletteColorLookupTableDescriptor")
    if descriptor is None or str(dataset.get("PixelPresentation", "")) not in ("COLOR", "MIXED"):
        return ()
    count, first = (int(descriptor[0]) & 0xFFFF) or 1 << 16, int(descriptor[1])
    return ((first, first + count - 1),)


def _number(value: Any, default: float) -> float:
    return default if value is None or value == "" else float(value)


def _numbers(value: Any) -> list[float]:
    if value is None or value == "":
        return []
    return [float(number) for number in value] if isinstance(value, MultiValue) else [float(value)]
