"""DICOM series as volumes, for generators that look across slices: the slices in the order in which they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from medveil.agent.imageio import Image, Item
from medveil.agent.segmentation.dicom_masks import read_header
from medveil.agent.segmentation.geometry import Plane, plane_of
from medveil.agent.segmentation.perturber import MaskedPerturber, SliceMasks, VolumeChange
from medveil.models.errors import ImageError
from medveil.models.methods.oracle import FloatArray

__all__ = ["SeriesChange", "in_series"]


@dataclass(frozen=True, slots=True)
class _Slices:
    """The images of one series, read one at a time."""

    items: tuple[Item, ...]
    read: Callable[[Item], Image]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, frame: int) -> Image:
        return self.read(self.items[frame])


class SeriesChange:
    """What the slices of a source's series should change by; holds one slab of one series at a time.

    Args:
        perturber: with generators that look across slices.
        items: the source's files.
        read: reads the one image of a file.
        mask: the mask of a file's image.
    """

    def __init__(
        self,
        perturber: MaskedPerturber,
        items: Sequence[Item],
        read: Callable[[Item], Image],
        mask: Callable[[Item], SliceMasks],
    ) -> None:
        self._perturber = perturber
        self._read = read
        self._mask = mask
        self._series = in_series(items)
        self._place = {
            item.relative: (number, position)
            for number, group in enumerate(self._series)
            for position, item in enumerate(group)
        }
        self._current: tuple[int, VolumeChange] | None = None

    def place(self, item: Item) -> tuple[int, int]:
        """Return an order in which slabs are made once: by series, by position; other files come first."""
        return self._place.get(item.relative, (-1, 0))

    def of(self, item: Item) -> Callable[[int], FloatArray] | None:
        """Return what asks for the change of a file's image; None where it belongs to no series."""
        if item.relative not in self._place:
            return None
        number, position = self._place[item.relative]
        return lambda frame: self._volume(number).of_slice(position)

    def _volume(self, number: int) -> VolumeChange:
        if self._current is None or self._current[0] != number:
            slices = _Slices(self._series[number], self._read)
            by_path: dict[PurePosixPath, Item] = {item.relative: item for item in slices.items}
            change = self._perturber.of_volume(slices, lambda image: self._mask(by_path[image.path])(image))
            self._current = (number, change)
        return self._current[1]


def in_series(items: Sequence[Item]) -> list[tuple[Item, ...]]:
    """Return the one-frame DICOM images of a source by series, each in the order of its slices.

    Slices of another size or direction than the others (a localiser) make a volume of their own; images that don't
    say where they lie are in none.
    """
    groups: dict[object, list[tuple[float, Item]]] = defaultdict(list)
    for item in items:
        if item.format != "dicom" or item.frames != 1:
            continue
        try:
            header = read_header(item.path)
            plane = plane_of(header, 0)
        except ImageError:
            continue  # its own turn will name the reason
        if plane is not None:
            key = (str(header.get("SeriesInstanceUID") or ""), plane.shape, *_direction(plane))
            groups[key].append((float(plane.position @ plane.normal), item))
    ordered = (
        sorted(group, key=lambda entry: (entry[0], str(entry[1].relative))) for group in groups.values()
    )
    return [tuple(item for _, item in group) for group in ordered]


def _direction(plane: Plane) -> tuple[float, ...]:
    steps = np.concatenate([plane.rows_step, plane.columns_step])
    return tuple(float(value) for value in np.round(steps, 3))  # a micrometre per pixel
