"""Images on their way to the surrogates, which take one size per batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from medveil.agent.imageio import Image, Item
from medveil.agent.ledger import FileRow
from medveil.agent.segmentation import LabelMap
from medveil.models.methods.oracle import FloatArray

__all__ = ["Queue", "Work", "subject_of"]

_BATCH_IMAGES: Final = 128
"""Images perturbed and committed together: a kill costs at most this much work. Our choice."""

_BATCH_VALUES: Final = 2**22
"""Stored values in one batch; some ten float32 copies of them are alive at once (160 MiB). Our choice."""

_QUEUED_VALUES: Final = 4 * _BATCH_VALUES
"""Stored values that wait for others of their size before the fullest group goes ahead."""


@dataclass(frozen=True, slots=True)
class Work:
    """One image on its way.

    Attributes:
        file: its file's row in the ledger.
        item: its file.
        image: itself.
        class_index: its class; for a masked image that of the largest structure.
        mask: its mask, where the task is segmentation.
        of_volume: what its slices should change by, where generators look across slices.
    """

    file: FileRow
    item: Item
    image: Image
    class_index: int
    mask: LabelMap | None = None
    of_volume: Callable[[int], FloatArray] | None = None

    @property
    def kind(self) -> tuple[int, ...]:
        """Shape of the stored values: what images of one batch share."""
        return self.image.pixels.shape

    @property
    def subject(self) -> str:
        """What the audit log calls it."""
        return subject_of(self.item, self.image.frame)


def subject_of(item: Item, frame: int) -> str:
    """Return what the audit log calls an image: its file, and the frame if there are several."""
    return str(item.relative) if item.frames == 1 else f"{item.relative}#{frame}"


class Queue:
    """Images that wait for others of their size: the surrogates take one size per batch."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, ...], list[Work]] = defaultdict(list)
        self._values = 0

    def put(self, work: Work) -> None:
        """Add one image."""
        self._waiting[work.kind].append(work)
        self._values += work.image.pixels.size

    def full_batches(self) -> Iterator[list[Work]]:
        """Yield groups that are large enough, and the largest ones while too much waits altogether."""
        for kind in list(self._waiting):
            if len(self._waiting[kind]) >= _batch_limit(kind):
                yield self._take(kind)
        while self._values > _QUEUED_VALUES:
            yield self._take(max(self._waiting, key=lambda kind: len(self._waiting[kind]) * _values(kind)))

    def remaining_batches(self) -> Iterator[list[Work]]:
        """Yield what is left, group by group."""
        for kind in list(self._waiting):
            yield self._take(kind)

    def _take(self, kind: tuple[int, ...]) -> list[Work]:
        batch = self._waiting.pop(kind)
        self._values -= len(batch) * _values(kind)
        return batch


def _values(kind: tuple[int, ...]) -> int:
    return int(np.prod(kind))


def _batch_limit(kind: tuple[int, ...]) -> int:
    return max(1, min(_BATCH_IMAGES, _BATCH_VALUES // _values(kind)))
