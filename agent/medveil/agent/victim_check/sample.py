"""Which verified images the check works on: a keyed draw; the same release gives the same split again. Pure."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from medveil.models.errors import InputError

__all__ = ["Candidate", "Split", "drawn"]

_HOLD_OUT_SHARE: Final = 1 / 3
"""Share of each class that no victim trains on. Our choice: the interval shrinks with the hold-out, and 400 training
images are as many as the coordinator's own check uses."""

_FEWEST_TRAINING: Final = 20
_FEWEST_HOLD_OUT: Final = 10
"""Fewest images of a class; together about the 64 that the coordinator's own check needs of two classes. Fewer say
nothing: one image would move a class's score by more than a tenth."""

_FRAMES_PER_FILE: Final = 8
"""Most frames of one volume or cine. Our choice: they resemble each other, and other patients teach a victim more."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One verified image.

    Attributes:
        file: its file's number in the ledger.
        frame: index in the source file.
        position: index in the protected copy, where left-out frames are missing.
        class_index: class of the bundle's taxonomy.
        digest: of the clean stored values, hex.
        whole: images of one file that show one patient stay together, on one side of the split.
    """

    file: int
    frame: int
    position: int
    class_index: int
    digest: str
    whole: bool


@dataclass(frozen=True, slots=True)
class Split:
    """Images to train on, and images kept clean and apart to score on."""

    training: tuple[Candidate, ...]
    hold_out: tuple[Candidate, ...]


def drawn(candidates: Iterable[Candidate], *, seed: int, most: int) -> Split:
    """Return the split: every class in its own share, at most `most` images together.

    Images with the same pixels count once. Files are not known to be of different patients: where a patient has
    several single-image files, one may teach what another is scored on, clean and protected alike.

    Args:
        candidates: verified images, in any order.
        seed: another draw from the same images.
        most: most images in both parts together.

    Raises:
        InputError: ``one-class``, or ``too-few-images`` for a class.
    """
    by_class: dict[int, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    seen: set[str] = set()
    total = 0
    for candidate in sorted(candidates, key=lambda c: _rank(seed, c.digest)):
        if candidate.digest in seen:
            continue
        seen.add(candidate.digest)
        unit = f"file {candidate.file}" if candidate.whole else candidate.digest
        members = by_class[candidate.class_index][unit]
        if len(members) < _FRAMES_PER_FILE:
            members.append(candidate)
            total += 1
    if len(by_class) < 2:
        raise InputError(
            "one-class",
            "The verified images are all of one class (or there are none); a victim needs at least two to learn.",
        )
    share = min(1.0, most / total)
    training: list[Candidate] = []
    hold_out: list[Candidate] = []
    for index in sorted(by_class):
        units = list(by_class[index].values())
        kept = _first(units, round(share * sum(map(len, units))))
        apart = _first(kept, round(_HOLD_OUT_SHARE * sum(map(len, kept))))
        scored = [image for unit in apart for image in unit]
        learned = [image for unit in kept[len(apart) :] for image in unit]
        if len(scored) < _FEWEST_HOLD_OUT or len(learned) < _FEWEST_TRAINING:
            raise InputError(
                "too-few-images",
                f"The check needs at least {_FEWEST_HOLD_OUT + _FEWEST_TRAINING} verified images of every class, "
                "in several files; protect more images first.",
            )
        training += learned
        hold_out += scored
    return Split(tuple(training), tuple(hold_out))


def _rank(seed: int, digest: str) -> bytes:
    return hashlib.sha256(f"medveil site check {seed} {digest}".encode()).digest()


def _first(units: Sequence[list[Candidate]], images: int) -> list[list[Candidate]]:
    """Return the first whole units that hold so many images, or a few more."""
    taken: list[list[Candidate]] = []
    while units[len(taken) :] and sum(map(len, taken)) < images:
        taken.append(units[len(taken)])
    return taken
