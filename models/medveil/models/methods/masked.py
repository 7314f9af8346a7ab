"""What every segmentation method takes and gives: images with label maps in, bounded noise out.

A method says how far each of its parts may move each pixel (its *limits*, from the label map and the image alone);
what fills the limits are answers in [-1, 1], one array per part, from generators that one forward pass asks, or
drawn from the image's key. The same lines bind both, and the trainer's generators, too:

    delta = clip01( x + sum over parts of clip( epsilon * answer, -limit, +limit ) ) - x

A generator is foreign to the site: the bound, and that nothing moves where all limits are 0, hold whatever it says.
Everything here works in two and in three dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from medveil.models.errors import ConfigurationError, InputError
from medveil.models.methods.base import BoolArray, IntArray, MethodInfo
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import at_most

__all__ = ["Answers", "Limits", "MaskedBatch", "SegmentationMethod", "SegmentationSettings"]

# UMed's budget (arXiv 2403.14250), half of what classification uses.
_DEFAULT_EPSILON = 4 / 255

Answers = Mapping[str, FloatArray]
"""Part to what fills it, ``(N, C, ...)`` in [-1, 1], as a share of epsilon."""
Limits = Mapping[str, FloatArray]
"""Part to the largest change there, ``(N, 1, ...)``, from 0 to epsilon."""


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """Images with their label maps.

    Attributes:
        images: ``(N, C, rows, columns)`` or ``(N, C, slices, rows, columns)``, float32 in [0, 1].
        labels: ``(N, ...)`` int64 over the same pixels, class index, 0 for background.
        keys: one digest of the image's own content per image.
        first_slice: where these slices begin in their volumes: what a volume gets doesn't depend on how it is cut.

    Raises:
        InputError: "batch-shape" or "batch-range": the arrays do not fit together, or hold NaN or values
            outside [0, 1].
    """

    images: FloatArray
    labels: IntArray
    keys: tuple[bytes, ...]
    first_slice: int = 0

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim not in (4, 5) or images.dtype != np.float32 or 0 in images.shape[1:]:
            raise InputError(
                "batch-shape", "Images must be float32 of shape (N, channels, [slices,] rows, columns)."
            )
        if labels.shape != (len(images), *images.shape[2:]) or labels.dtype != np.int64:
            raise InputError("batch-shape", "A label map must be int64 and of its image's size.")
        if (labels < 0).any():
            raise InputError("batch-shape", "A label map holds class indices, 0 or more.")
        if len(self.keys) != len(images):
            raise InputError("batch-shape", "Every image needs a key of its own.")
        if not ((images >= 0) & (images <= 1)).all():
            raise InputError("batch-range", "Every pixel must be finite and lie in [0, 1].")

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, index: IntArray) -> MaskedBatch:
        """Return the images at ``index`` (N',), in that order, as a batch of their own."""
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            keys=tuple(self.keys[i] for i in index),
        )


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings:
    """What every segmentation method can be told.

    Attributes:
        epsilon: largest absolute change of a pixel, as a fraction of the [0, 1] range.
        band_radius: how far the contour band reaches to both sides of a border, in pixels.
        texture_bound: limit the noise inside by the local texture.
        seed: together with an image's key, the only source of randomness.
    """

    epsilon: float = _DEFAULT_EPSILON
    band_radius: int = 3
    texture_bound: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1 or self.band_radius < 0 or self.seed < 0:
            raise ConfigurationError(
                "setting", "Epsilon must lie between 0 and 1; band radius and seed must be 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class SegmentationMethod:
    """One segmentation method.

    Attributes:
        info: what a screen says about it.
        limits: how far each part may move each pixel, by part.
        draw: the answers of a method without generators; None for a method that asks generators.
        across_slices: whether it is made for whole volumes, and slices alone are not enough for it.
    """

    info: MethodInfo
    limits: Callable[[MaskedBatch, SegmentationSettings], Limits] = field(repr=False)
    parts: tuple[str, ...]
    draw: Callable[[MaskedBatch, SegmentationSettings], Answers] | None = field(default=None, repr=False)
    across_slices: bool = False

    @property
    def generators(self) -> tuple[str, ...]:
        """The parts that a generator must answer for; none for a method that draws its noise."""
        return self.parts if self.draw is None else ()

    def gate(self, batch: MaskedBatch, settings: SegmentationSettings) -> BoolArray:
        """Return where anything may move, ``(N, 1, ...)`` bool."""
        limits = self.limits(batch, settings)
        return np.asarray(sum(limits[part] for part in self.parts) > 0, np.bool_)

    def perturb(
        self, batch: MaskedBatch, answers: Answers | None, settings: SegmentationSettings
    ) -> FloatArray:
        """Return the noise of each image.

        Args:
            batch: images and label maps.
            answers: what the generators say, by part; None for a method that has none.
            settings: budget and geometry.

        Returns:
            ``delta``, ``(N, C, ...)`` float32: at most epsilon, 0 outside the gate, ``images + delta`` in [0, 1].

        Raises:
            ConfigurationError: "generator-missing": a part that nobody answers for.
            InputError: "batch-shape", "not-finite", "generator-range": an answer does not have the images' shape,
                holds NaN or infinity, or leaves [-1, 1].
        """
        if self.draw is not None:
            answers = self.draw(batch, settings)
        if answers is None or not set(self.parts) <= set(answers):
            raise ConfigurationError(
                "generator-missing", f"The method {self.info.name} needs the generators {self.parts}."
            )
        limits = self.limits(batch, settings)
        epsilon = at_most(settings.epsilon)
        total = np.zeros_like(batch.images)
        for part in self.parts:
            _check_answer(answers[part], batch.images)
            total += np.clip(epsilon * answers[part], -limits[part], limits[part])
        # Parts do not overlap in the published methods; where a new one does, the budget still binds.
        total = np.clip(total, np.maximum(-epsilon, -batch.images), np.minimum(epsilon, 1 - batch.images))
        return np.asarray(total, np.float32)


def _check_answer(answer: FloatArray, images: FloatArray) -> None:
    if answer.shape != images.shape:
        raise InputError("batch-shape", "The noise generator's output does not have the images' shape.")
    if not np.isfinite(answer).all():
        raise InputError("not-finite", "The noise generator gave values that are not numbers: do not use it.")
    if (np.abs(answer) > 1).any():
        raise InputError("generator-range", "A noise generator's answer must lie in [-1, 1].")
