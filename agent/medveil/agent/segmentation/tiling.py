"""A generator takes one size; images come in all sizes. Tiles cut, answered, and joined without a seam.

Generators are convolutions with zero padding inside (see ``SegmentationContract``): the answer in the middle of a
tile is the answer for the whole image, and only ``halo`` pixels at a border that is not the image's own know less. So
tiles overlap, begin where the pooling grid of the whole image begins, and each gives its middle. Works along any
number of axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Final

import numpy as np

from medveil.models.errors import ConfigurationError, ImageError
from medveil.models.methods.base import BoolArray
from medveil.models.methods.oracle import FloatArray

__all__ = ["Span", "Tiles", "padded", "spans"]

_TILES_TOGETHER: Final = 32
"""Most tiles handed to the engine at once: enough for its batches on four threads. Our choice."""

_BYTES_TOGETHER: Final = 64 << 20
"""Most bytes of them: 16 tiles of a volume of 64 x 128 x 128 voxels. Our choice."""


@dataclass(frozen=True, slots=True)
class Span:
    """One tile along one axis.

    Attributes:
        start: first pixel of the tile.
        keep: first pixel whose answer is taken from this tile.
        stop: the pixel after the last one.
    """

    start: int
    keep: int
    stop: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a generator's tiles lie.

    Attributes:
        shape: one tile, without channels: ``([slices,] rows, columns)``.
        halo: pixels that a tile's inner border knows less about.
        alignment: tiles begin on multiples of this.

    Raises:
        ConfigurationError: ``tiles``: the tile does not fit its own grid.
    """

    shape: tuple[int, ...]
    halo: int
    alignment: int

    def __post_init__(self) -> None:
        if any(side % self.alignment for side in self.shape):
            raise ConfigurationError(
                "tiles",
                "The bundle's generator takes tiles that cannot be joined; ask your coordinator for another.",
            )

    def answered(
        self, images: FloatArray, ask: Callable[[FloatArray], FloatArray], where: BoolArray | None = None
    ) -> FloatArray:
        """Return what a generator says about whole images.

        Args:
            images: ``(N, C, *space)`` float32.
            ask: the generator: tiles ``(n, C, *shape)`` in, answers of that shape out.
            where: ``(N, *space)`` bool, what anybody wants to know; a tile without any of it isn't asked about. None:
                everything.

        Returns:
            ``(N, C, *space)`` float32; 0 where nobody asked.

        Raises:
            ImageError: ``larger-than-tile``; see `spans`.
        """
        space = images.shape[2:]
        padding = [(0, padded(length, side, self.alignment) - length) for length, side in self._sides(space)]
        whole = np.pad(images, [(0, 0), (0, 0), *padding])
        answers = np.zeros_like(whole)
        places = self._places(whole.shape[2:], len(images))
        if where is not None:
            places = ((n, place) for n, place in places if where[n][_kept(place)].any())
        together = max(1, min(_TILES_TOGETHER, _BYTES_TOGETHER // self._tile_bytes(images.shape[1])))
        for group in _groups(places, together):
            tiles = np.stack([whole[number][self._window(place)] for number, place in group])
            for (number, place), answer in zip(group, ask(tiles), strict=True):
                inside = tuple(slice(span.keep - span.start, span.stop - span.start) for span in place)
                answers[number][(slice(None), *_kept(place))] = answer[(slice(None), *inside)]
        return answers[(slice(None), slice(None), *(slice(length) for length in space))]

    def _tile_bytes(self, channels: int) -> int:
        return np.dtype(np.float32).itemsize * channels * math.prod(self.shape)

    def _sides(self, space: tuple[int, ...]) -> list[tuple[int, int]]:
        return list(zip(space, self.shape, strict=True))

    def _places(self, space: tuple[int, ...], count: int) -> Iterator[tuple[int, tuple[Span, ...]]]:
        along = [spans(length, side, self.halo, self.alignment) for length, side in self._sides(space)]
        return product(range(count), product(*along))

    def _window(self, place: tuple[Span, ...]) -> tuple[slice, ...]:
        starts = zip(place, self.shape, strict=True)
        return (slice(None), *(slice(span.start, span.start + side) for span, side in starts))


def _kept(place: tuple[Span, ...]) -> tuple[slice, ...]:
    """Return the pixels whose answer is taken from a tile."""
    return tuple(slice(span.keep, span.stop) for span in place)


def padded(length: int, side: int, alignment: int) -> int:
    """Return the length that an axis is filled up to with zeros: at least one tile, and a multiple of the grid."""
    return max(side, -(-length // alignment) * alignment)


def spans(length: int, side: int, halo: int, alignment: int) -> list[Span]:
    """Return the tiles along one axis; together they keep every pixel once.

    Args:
        length: of the axis, at least ``side`` and a multiple of ``alignment``.
        side: of a tile.
        halo: pixels at an inner border that are not kept.
        alignment: every tile begins on a multiple of it.

    Raises:
        ImageError: ``larger-than-tile``: it takes several tiles, and one holds nothing but borders.
    """
    step = (side - 2 * halo) // alignment * alignment
    if length > side and step <= 0:
        raise ImageError(
            "larger-than-tile",
            "This image is larger than this bundle's generators can work on; ask the coordinator for larger tiles.",
        )
    found, kept = [], 0
    for start in [*range(0, length - side, max(step, alignment)), length - side]:
        stop = length if start == length - side else start + side - halo
        found.append(Span(start, kept, stop))
        kept = stop
    return found


def _groups(
    places: Iterator[tuple[int, tuple[Span, ...]]], size: int
) -> Iterator[Sequence[tuple[int, tuple[Span, ...]]]]:
    while group := list(islice(places, size)):
        yield group
