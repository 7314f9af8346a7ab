"""Noise from a generator, under the contract of every method: exactly k pixels, epsilon, [0, 1], zero outside.

A generator is foreign to the site: what it says is a wish. Where the budget is spent and how far a pixel moves is
decided here, in NumPy, by the code that binds the optimised methods too.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from medveil.models.errors import InputError
from medveil.models.methods import masks
from medveil.models.methods.base import Batch, Method, MethodInfo, Settings
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import Budget, at_most
from medveil.models.methods.salm import SalmSettings
from medveil.models.methods.targets import objective_for

__all__ = ["NAME", "NoiseGenerator", "bounded", "from_perturbation", "method_of"]

NAME = "generated"
"""What the method is called in a policy and in a release; it is in no registry, because it needs a bundle's graph."""


class NoiseGenerator(Protocol):
    """A finished generator: at a site an onnxruntime session."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        ...

    @property
    def takes_target(self) -> bool:
        """Whether it must be told the distribution that the noise aims at."""
        ...

    def perturbation(self, images: FloatArray, targets: FloatArray | None = None) -> FloatArray:
        """Return what it would add to images ``(N, *input_shape)``, given their targets ``(N, K)``."""
        ...


def method_of(generator: NoiseGenerator, classes: int) -> Method[SalmSettings]:
    """Return SALM's frozen form in one pass: mask and signs are the generator's, the rest is as for every method.

    Images of another size than the generator's are refused ("generator-size"): without gradients there is nothing to
    ask through the consumer's resize, and noise that is resized itself loses most of its energy.

    Args:
        generator: distilled from the optimiser under the same recipe.
        classes: number of classes K.
    """

    def pattern(batch: Batch, settings: SalmSettings) -> FloatArray:
        if batch.images.shape[1:] != generator.input_shape:
            sides = " x ".join(str(side) for side in generator.input_shape[1:])
            raise InputError(
                "generator-size",
                f"The bundle's noise generator takes images of {sides} pixels only; use the optimised noise.",
            )
        objective = objective_for(settings.target, batch, classes, settings, settings.confidence)
        targets = objective.targets if generator.takes_target else None
        return from_perturbation(batch, generator.perturbation(batch.images, targets), settings)

    return Method(
        info=MethodInfo(
            name=NAME,
            title="SALM by a noise generator",
            source="the objective of arXiv 2403.10573 as reconstructed in `salm`; distilled into one pass (ours)",
        ),
        settings=SalmSettings,
        pattern=pattern,
    )


def bounded(batch: Batch, pattern: FloatArray, score: FloatArray, settings: Settings) -> FloatArray:
    """Return the noise that a pattern becomes inside the mask of its best-scored pixels.

    Args:
        batch: the images; what is not editable stays as it is.
        pattern: ``(N, C, H, W)`` in [-1, 1], the change as a share of epsilon. In "luma" its mean over the channels
            counts.
        score: ``(N, 1, H, W)``, 0 or more. Times the room that a pixel has towards its pattern, the
            ``ceil(r*H*W)`` best pixels may change, equal ones by index.
        settings: gives epsilon, mask_ratio and colour; nothing is drawn.

    Returns:
        ``delta``, ``(N, C, H, W)`` float32.

    Raises:
        InputError: "batch-shape" (the generator's outputs do not fit the images), "not-finite" (they hold NaN or
            infinity), "generator-range" (they leave their ranges).
    """
    images = batch.images
    if pattern.shape != images.shape or score.shape != (len(images), 1, *images.shape[2:]):
        raise InputError("batch-shape", "The noise generator's outputs do not have the images' shape.")
    if not (np.isfinite(pattern).all() and np.isfinite(score).all()):
        raise InputError("not-finite", "The noise generator gave values that are not numbers: do not use it.")
    if (np.abs(pattern) > 1).any() or (score < 0).any():
        raise InputError(
            "generator-range", "A noise generator's pattern must lie in [-1, 1] and its score be 0 or more."
        )
    rows, columns = images.shape[2:]
    share = pattern.mean(axis=1, keepdims=True) if settings.colour == "luma" else pattern
    room = Budget.of(images, settings, room=batch.room).room_towards(share).max(axis=1, keepdims=True)
    count = masks.pixel_count(settings.mask_ratio, rows, columns)
    mask = masks.top_k(score * room, count, batch.editable)
    budget = Budget.of(images, settings, mask.astype(np.float32), room=batch.room)
    delta = budget.project(at_most(settings.epsilon) * share.astype(np.float32))
    return np.broadcast_to(delta, images.shape).astype(np.float32)


def from_perturbation(batch: Batch, wanted: FloatArray, settings: Settings) -> FloatArray:
    """Return the noise that one image-shaped output becomes: its size is the score, its sign the pattern.

    Projected gradient steps end at the borders of the budget nearly everywhere, so within the mask all of epsilon
    is used, and one output says all there is to say.

    Args:
        batch: the images.
        wanted: ``(N, C, H, W)``, any scale: what the generator would add.
        settings: as for `bounded`.

    Raises:
        InputError: as `bounded`.
    """
    if wanted.shape != batch.images.shape:
        raise InputError("batch-shape", "The noise generator's output does not have the images' shape.")
    moved = wanted.mean(axis=1, keepdims=True) if settings.colour == "luma" else wanted
    score = np.abs(moved).sum(axis=1, keepdims=True)
    return bounded(batch, np.broadcast_to(np.sign(moved), wanted.shape), score, settings)
