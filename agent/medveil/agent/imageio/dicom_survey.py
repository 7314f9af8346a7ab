"""What would happen to a folder of hospital files: each one protected, renamed, or refused with its reason.

A dry run with sign noise at full budget in place of a method: it takes every file through reading, the budget,
writing, reading back and restoring, and needs no bundle. Benchmarks print its table; a site can run it before it
joins a campaign.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np

from medveil.agent.imageio.base import Frames, ImageFormat, Item
from medveil.agent.imageio.image import Image, StoredArray
from medveil.models.errors import ImageError

__all__ = ["Outcome", "Result", "sign_noise", "survey", "table"]

HEAD_BYTES: Final = 512


class Outcome(StrEnum):
    """What became of a file."""

    PROTECTED = "protected"
    COMPANION = "companion"
    NOT_PROTECTABLE = "not-protectable"
    REFUSED = "refused"
    DIFFERS = "differs"
    """Read back or restored otherwise than meant: a defect of medveil, never of the file."""


@dataclass(frozen=True, slots=True)
class Result:
    """One file's outcome.

    Attributes:
        relative: its path below the folder.
        outcome: see ``Outcome``.
        reason: error code where it was refused.
        frames: images in it.
        changed: share of stored values that changed.
        largest: largest change shown in the release window, in 1/255.
        seals_original: whether restoring needs the whole original file.
    """

    relative: PurePosixPath
    outcome: Outcome
    reason: str = ""
    frames: int = 0
    changed: float = 0.0
    largest: float = 0.0
    seals_original: bool = False


def survey(folder: Path, formats: Sequence[ImageFormat], epsilon: float, scratch: Path) -> Iterator[Result]:
    """Take every file of a folder through the whole path; files are visited in order of their names.

    Args:
        folder: read only.
        formats: the first that recognises a file takes it; what none recognises is refused as ``not-an-image``.
        epsilon: budget in 1/255 of the release window.
        scratch: an empty folder for the copies; each is deleted before the next file.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = PurePosixPath(path.relative_to(folder))
        try:
            yield _try(path, relative, formats, epsilon, scratch)
        except ImageError as error:
            yield Result(relative, Outcome.REFUSED, error.code)
        for copy in scratch.iterdir():
            copy.unlink()


def sign_noise(image: Image, epsilon: float) -> StoredArray:
    """Return ``image`` with the full budget added or taken away at random, keyed by the image's own digest.

    Colour moves in luma: R, G and B of a pixel by the same number of stored units, where all three can.
    """
    generator = np.random.default_rng(np.frombuffer(image.digest, np.uint32))
    delta = generator.choice(np.array([-epsilon / 255, epsilon / 255], np.float32), image.size)
    if image.is_colour:
        delta = np.repeat(delta[:, :, None], 3, axis=2)
    low, high = image.window.bounds(image.pixels, epsilon)
    moved: StoredArray = np.clip(image.window.shifted(image.pixels, delta), low, high)
    if image.is_colour:
        step = moved.astype(np.int64) - image.pixels
        least = np.maximum(step.min(axis=2, keepdims=True), 0) + np.minimum(
            step.max(axis=2, keepdims=True), 0
        )
        moved = (image.pixels + least).astype(image.pixels.dtype)
    return moved


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table, one line per file, with a line of totals."""
    lines = [
        "| file | outcome | reason | frames | changed | largest /255 | sealed |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        numbers = (
            f"{result.frames} | {result.changed:.0%} | {result.largest:.1f}" if result.frames else " | | "
        )
        sealed = "original" if result.seals_original else ""
        lines.append(f"| {result.relative} | {result.outcome} | {result.reason} | {numbers} | {sealed} |")
    counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in Outcome}
    lines.append("")
    lines.append(", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count))
    return "\n".join(lines)


def _try(
    path: Path, relative: PurePosixPath, formats: Sequence[ImageFormat], epsilon: float, scratch: Path
) -> Result:
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    taken = next((entry for entry in formats if entry.recognises(head, path)), None)
    if taken is None:
        raise ImageError("not-an-image", "This file is of no format that medveil reads.")
    item = taken.inspect(path, relative)
    copy, restored = scratch / "protected", scratch / "restored"
    if not item.frames:
        taken.write(item, (), (), copy)
        taken.restore(copy, (), taken.patch(item), restored)
        return Result(relative, Outcome.COMPANION, seals_original=item.seals_original)
    changes = _Changes(epsilon)
    with taken.open(item, scratch) as frames:
        taken.write(item, range(item.frames), (changes.made(frames[n]) for n in range(item.frames)), copy)
        exact = _reads_back(taken, item, copy, changes)
        taken.restore(copy, (frames[n].pixels for n in range(item.frames)), taken.patch(item), restored)
        exact = exact and _is_restored(taken, item, frames, restored)
    outcome = Outcome.PROTECTED if changes.changed else Outcome.NOT_PROTECTABLE
    return Result(
        relative,
        outcome if exact else Outcome.DIFFERS,
        frames=item.frames,
        changed=changes.changed / item.pixels,
        largest=changes.largest,
        seals_original=item.seals_original,
    )


class _Changes:
    """Makes the change of each frame and adds up what it amounts to, without keeping the frames."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.changed = 0
        self.largest = 0.0
        self.digests: list[int] = []

    def made(self, image: Image) -> StoredArray:
        """Return the changed frame."""
        moved = sign_noise(image, self.epsilon)
        shown = image.window.display(moved).astype(np.float64) - image.window.display(image.pixels)
        self.changed += int(np.count_nonzero(moved != image.pixels))
        self.largest = max(self.largest, float(np.abs(shown).max()) * 255)
        self.digests.append(hash(moved.tobytes()))
        return moved


def _is_restored(taken: ImageFormat, item: Item, frames: Frames, restored: Path) -> bool:
    """Return whether a restored file is the original: its bytes where those were sealed, else its pixels."""
    if item.seals_original:
        return restored.read_bytes() == item.path.read_bytes()
    with taken.read_back(restored) as back:
        return all(np.array_equal(frames[n].pixels, pixels) for n, pixels in enumerate(back))


def _reads_back(taken: ImageFormat, item: Item, copy: Path, changes: _Changes) -> bool:
    """Return whether the copy holds exactly the frames that were meant."""
    with taken.read_back(copy) as back:
        found = [hash(np.ascontiguousarray(pixels).tobytes()) for pixels in back]
    return found == changes.digests and len(found) == item.frames
