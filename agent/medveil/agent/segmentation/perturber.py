"""From images with their masks to one wanted change per image: generators answer, the method gates and bounds.

No gradient is taken at the site. What a generator says is a proposal: the method (contour band, interior, texture
bound, clip) decides in NumPy where anything may move and how far, and the budget is enforced in stored integers after
that, as for every method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from medveil.agent.budget import channels_first
from medveil.agent.imageio import Frames, Image
from medveil.agent.segmentation.label_map import LabelMap
from medveil.agent.segmentation.tiling import Span, Tiles, padded, spans
from medveil.models.errors import ImageError
from medveil.models.methods.base import BoolArray
from medveil.models.methods.contour import band
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.segmentation import MaskedBatch, SegmentationMethod, SegmentationSettings

__all__ = ["Generator", "MaskedPerturber", "SliceMasks", "VolumeChange", "as_channels"]

_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
"""Grey as a person sees it (ITU-R BT.601), for a colour image before a grey generator."""

_ROUNDING: Final = 1e-5
"""How far an answer in [-1, 1] may be off by rounding: onnxruntime's Tanh goes beyond 1 by one float32 step
(1.31.1, CPU, measured)."""

SliceMasks = Callable[[Image], LabelMap]
"""The mask of each slice of a volume."""


class Generator(Protocol):
    """What ``engine.OnnxGenerator`` does."""

    def perturbation(self, images: FloatArray, targets: FloatArray | None = None) -> FloatArray:
        """Return answers in [-1, 1] of the images' shape."""
        ...


@dataclass(frozen=True, slots=True)
class MaskedPerturber:
    """A segmentation method with its settings and the generators it asks.

    Attributes:
        method: from the registry.
        settings: of this campaign; ``epsilon`` is that of the budget.
        generators: by part of the method; none for a method that draws its noise.
        channels: what the generators take: 1 grey, 3 colour.
        tiles: what size they take, and how tiles are joined.
    """

    method: SegmentationMethod
    settings: SegmentationSettings
    generators: Mapping[str, Generator]
    channels: int
    tiles: Tiles

    @property
    def takes_volumes(self) -> bool:
        """Whether the generators look across slices."""
        return len(self.tiles.shape) == 3

    def wanted(self, images: Sequence[Image], masks: Sequence[LabelMap]) -> FloatArray:
        """Return the change that the method wants for each image, signed, in display units.

        Args:
            images: all of one size, all grey or all colour. What an image gets doesn't depend on the others.
            masks: one for each.

        Returns:
            ``(N, channels, rows, columns)`` float32 at native resolution; 0 outside the method's gate.

        Raises:
            ImageError: ``volume-needed``: the generators look across slices, and these are single images.
        """
        if self.takes_volumes:
            raise ImageError(
                "volume-needed",
                "This bundle protects volumes; bring the series as one file (NIfTI, multi-frame).",
            )
        shown = np.stack([_shown(image) for image in images])
        labels = np.stack([mask.classes for mask in masks]).astype(np.int64)
        batch = MaskedBatch(shown, labels, tuple(image.digest for image in images))
        gate = self.method.gate(batch, self.settings)[:, 0]
        return self.method.perturb(batch, self.answers(shown, gate) or None, self.settings)

    def of_volume(self, frames: Frames, masks: SliceMasks) -> VolumeChange:
        """Return the change that the method wants for a volume, made slab by slab when it is asked for."""
        return VolumeChange(self, frames, masks)

    @property
    def marks(self) -> str:
        """What a picture marks in an image: its contour band, or its structures where the method needs no band."""
        return "contour band" if self.settings.band_radius > 0 else "marked structures"

    def marked_in(self, mask: LabelMap) -> npt.NDArray[np.bool_]:
        """Return which pixels that is, ``(rows, columns)``."""
        if self.settings.band_radius == 0:
            return mask.classes > 0
        return np.asarray(band(mask.classes[None].astype(np.int64), self.settings.band_radius)[0])

    def answers(self, images: FloatArray, where: BoolArray | None = None) -> dict[str, FloatArray]:
        """Return what each generator says about images ``(N, C, ...)``, by part; nobody has bounded it yet.

        Args:
            images: what the release window shows.
            where: ``(N, ...)`` where it matters; tiles without any of it are not asked about, and most of a volume
                is outside of what is marked. None: everywhere.
        """
        seen = as_channels(images, self.channels)
        said = {
            part: _rounded(self.tiles.answered(seen, generator.perturbation, where))
            for part, generator in self.generators.items()
        }
        return {part: _back_to_channels(answer, images.shape[1]) for part, answer in said.items()}


class VolumeChange:
    """The change of one volume, a slab at a time: the slices that one row of tiles gives.

    Slabs are cut where the tiles of the whole volume would be, so it is the same change, in the memory of one tile's
    slices.
    """

    def __init__(self, perturber: MaskedPerturber, frames: Frames, masks: SliceMasks) -> None:
        self._perturber = perturber
        self._frames = frames
        self._masks = masks
        tiles = perturber.tiles
        side = tiles.shape[0]
        length = padded(len(frames), side, tiles.alignment)
        self._spans = spans(length, side, tiles.halo, tiles.alignment)
        self._span: Span | None = None
        self._slab: FloatArray = np.empty((0, 0, 0, 0), np.float32)

    def of_slice(self, frame: int) -> FloatArray:
        """Return what one slice should change by, ``(channels, rows, columns)``; cheapest in ascending order."""
        span = next(span for span in self._spans if span.keep <= frame < span.stop)
        if span != self._span:
            self._span, self._slab = span, self._made(span)
        return np.asarray(self._slab[:, frame - span.keep])

    def _made(self, span: Span) -> FloatArray:
        """Return the change of the slices that a row of tiles gives, ``(channels, slices, rows, columns)``."""
        perturber, count = self._perturber, len(self._frames)
        stop = min(span.stop, count)
        seen = range(span.start, min(span.start + perturber.tiles.shape[0], count))
        # Band and texture look at the slices around as well; what they say there is thrown away again.
        around = perturber.settings.band_radius + 1
        gated = range(max(0, span.keep - around), min(count, stop + around))
        margins = [(0, 0), (0, 0), (span.keep - gated.start, gated.stop - stop), (0, 0), (0, 0)]
        kept = slice(span.keep - span.start, stop - span.start)
        slices = [self._frames[frame] for frame in gated]
        batch = MaskedBatch(
            self._shown(gated),
            np.stack([self._masks(image).classes for image in slices])[None].astype(np.int64),
            (slices[0].digest,),
            first_slice=gated.start,
        )
        gate = perturber.method.gate(batch, perturber.settings)[:, 0]
        where = np.zeros((1, len(seen), *gate.shape[2:]), np.bool_)
        where[:, kept] = gate[:, span.keep - gated.start : stop - gated.start]
        if not where.any():
            return np.zeros((batch.images.shape[1], stop - span.keep, *gate.shape[2:]), np.float32)
        answers = perturber.answers(self._shown(seen), where)
        padded_answers = {part: np.pad(answer[:, :, kept], margins) for part, answer in answers.items()}
        delta = perturber.method.perturb(batch, padded_answers or None, perturber.settings)
        return np.ascontiguousarray(delta[0, :, span.keep - gated.start : stop - gated.start])

    def _shown(self, frames: range) -> FloatArray:
        return np.stack([_shown(self._frames[frame]) for frame in frames], axis=1)[None]


def _rounded(answers: FloatArray) -> FloatArray:
    """Return answers with rounding beyond [-1, 1] taken off; what is further out stays, and the method refuses it."""
    rounding = np.abs(answers) <= 1 + _ROUNDING
    return np.where(rounding, np.clip(answers, -1, 1), answers)


def _shown(image: Image) -> FloatArray:
    """Return what the release window shows: ``(channels, rows, columns)`` float32 in [0, 1]."""
    return channels_first(image.window.display(image.pixels))


def as_channels(images: FloatArray, channels: int) -> FloatArray:
    """Return images ``(N, C, ...)`` with as many channels as a generator takes."""
    if images.shape[1] == channels:
        return images
    if channels == 1:
        return np.asarray(np.einsum("nc...,c->n...", images, _LUMA)[:, None], np.float32)
    return np.repeat(images, channels, axis=1)


def _back_to_channels(answers: FloatArray, channels: int) -> FloatArray:
    """Return answers with as many channels as the image has; grey takes the mean, colour moves together."""
    if answers.shape[1] == channels:
        return answers
    if channels == 1:
        return np.asarray(answers.mean(axis=1, keepdims=True), np.float32)
    return np.repeat(answers, channels, axis=1)
