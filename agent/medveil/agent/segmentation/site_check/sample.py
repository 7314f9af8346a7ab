"""Which verified images with masks the check works on: a keyed draw by patient, as far as files tell. Pure."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final

from medveil.agent.segmentation.label_map import BACKGROUND
from medveil.agent.victim_check.sample import Candidate, Split
from medveil.models.errors import InputError

__all__ = ["FEWEST_HOLD_OUT", "FEWEST_TRAINING", "drawn"]

FEWEST_TRAINING: Final = 4
FEWEST_HOLD_OUT: Final = 3
"""Fewest volumes, series or single images on either side. Our choice: with fewer apart, no interval can be given."""

_HOLD_OUT_SHARE: Final = 1 / 3
_IMAGES_PER_UNIT: Final = 8
"""Most slices of one volume or series: they resemble each other, and other patients teach a victim more. Both as for
labelled images."""


def drawn(candidates: Iterable[Candidate], units: Mapping[int, str], *, seed: int, most: int) -> Split:
    """Return the split; only images in which some structure is marked take part.

    Args:
        candidates: verified images, in any order.
        units: by file: what stays together on one side, a volume or a series. A file that is not in it is a unit of
            its own.
        seed: another draw from the same images.
        most: most images in both parts together.

    Raises:
        InputError: ``too-few-images``.
    """
    members: dict[str, list[Candidate]] = defaultdict(list)
    seen: set[str] = set()
    for candidate in sorted(candidates, key=lambda c: _rank(seed, c.digest)):
        if candidate.class_index == BACKGROUND or candidate.digest in seen:
            continue
        seen.add(candidate.digest)
        unit = members[units.get(candidate.file, f"file {candidate.file}")]
        if len(unit) < _IMAGES_PER_UNIT:
            unit.append(candidate)
    kept: list[list[Candidate]] = []
    for unit in members.values():
        if sum(map(len, kept)) < most:
            kept.append(unit)
    apart = max(FEWEST_HOLD_OUT, round(_HOLD_OUT_SHARE * len(kept)))
    if len(kept) - apart < FEWEST_TRAINING:
        raise InputError(
            "too-few-images",
            f"The check needs at least {FEWEST_HOLD_OUT + FEWEST_TRAINING} verified volumes, series or single images "
            "with something marked; protect more first.",
        )
    return Split(
        training=tuple(image for unit in kept[apart:] for image in unit),
        hold_out=tuple(image for unit in kept[:apart] for image in unit),
    )


def _rank(seed: int, digest: str) -> bytes:
    return hashlib.sha256(f"medveil site check {seed} {digest}".encode()).digest()
