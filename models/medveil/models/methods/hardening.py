"""Noise that lasts: gradients averaged over views of an image, and taken where an adversary has moved it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medveil.models.errors import ConfigurationError
from medveil.models.methods.oracle import FloatArray, GradientOracle
from medveil.models.methods.transforms import (
    Blur,
    Compose,
    Flip,
    Resize,
    Shape,
    Shift,
    Transform,
    TransformedOracle,
)

__all__ = ["AdversarialOracle", "ExpectationOracle", "Hardening"]

# All steps together go twice the radius: REM's 10 steps of radius/5.
_ATTACK_LENGTH = 2.0


class ExpectationOracle:
    """The mean over a fixed set of views: noise that works in each (EOT: Athalye et al., arXiv 1707.07397).

    The set is fixed rather than drawn, so that an image's noise cannot depend on its batch.
    """

    def __init__(self, oracle: GradientOracle, views: Sequence[Transform]) -> None:
        if not views:
            raise ConfigurationError("setting", "An expectation needs at least one view.")
        self._views = tuple(TransformedOracle(oracle, view) for view in views)
        if len({view.input_shape for view in self._views}) != 1:
            raise ConfigurationError("setting", "All views must take images of one shape.")

    @property
    def input_shape(self) -> Shape:
        """Shape of one image, before any view."""
        return self._views[0].input_shape

    @property
    def classes(self) -> int:
        """Number of classes of the model behind it."""
        return self._views[0].classes

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean loss and mean gradient over the views."""
        answers = [view.loss_and_gradient(images, targets) for view in self._views]
        return _mean([losses for losses, _ in answers]), _mean([gradient for _, gradient in answers])


class AdversarialOracle:
    """The gradient at the worst image near the one asked about (REM: arXiv 2203.14533, eq. 4).

    Whoever trains adversarially moves each image uphill within ``radius`` before every step, against the
    noise's aim; noise made for those images still has an effect on them. The attack starts at the image
    itself and draws nothing.
    """

    def __init__(self, oracle: GradientOracle, radius: float, steps: int) -> None:
        if not 0 < radius < 1 or steps < 1:
            raise ConfigurationError(
                "setting", "The adversary needs a radius in (0, 1) and at least one step."
            )
        self._oracle = oracle
        self._radius = np.float32(radius)
        self._steps = steps
        self._step = np.float32(_ATTACK_LENGTH * radius / steps)

    @property
    def input_shape(self) -> Shape:
        """Shape of one image."""
        return tuple(self._oracle.input_shape)

    @property
    def classes(self) -> int:
        """Number of classes of the model behind it."""
        return self._oracle.classes

    def attacked(self, images: FloatArray, targets: FloatArray) -> FloatArray:
        """Return the images (N, C, H, W) moved uphill within the radius and [0, 1]."""
        low = np.maximum(images - self._radius, np.float32(0))
        high = np.minimum(images + self._radius, np.float32(1))
        moved = images
        for _ in range(self._steps):
            _, gradient = self._oracle.loss_and_gradient(moved, targets)
            moved = np.clip(moved + self._step * np.sign(gradient), low, high)
        return moved

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return loss and gradient at the attacked images."""
        return self._oracle.loss_and_gradient(self.attacked(images, targets), targets)


@dataclass(frozen=True, kw_only=True)
class Hardening:
    """What the noise must survive, as a value: the views of the expectation, and an adversary in each.

    Attributes:
        blur_sigmas: Gaussian blurs, in pixels of the image.
        shifts: (rows, columns) moves, in pixels of the image.
        scales: resizes there and back, as a fraction of the image's sides.
        flip: left-right mirror.
        adversary_radius: how far an adversarial trainer moves a pixel, fraction of [0, 1]; 0: no adversary.
        adversary_steps: its steps.
    """

    blur_sigmas: tuple[float, ...] = ()
    shifts: tuple[tuple[int, int], ...] = ()
    scales: tuple[float, ...] = ()
    flip: bool = False
    adversary_radius: float = 0.0
    adversary_steps: int = 3

    def wrap(self, oracle: GradientOracle) -> GradientOracle:
        """Return ``oracle`` seen through the adversary and the views; itself when nothing is asked for."""
        if self.adversary_radius:
            oracle = AdversarialOracle(oracle, self.adversary_radius, self.adversary_steps)
        views = self._views(tuple(oracle.input_shape))
        return ExpectationOracle(oracle, (Compose(), *views)) if views else oracle

    def _views(self, shape: Shape) -> tuple[Transform, ...]:
        rows, columns = shape[-2:]
        resizes = []
        for scale in self.scales:
            small = (max(1, round(rows * scale)), max(1, round(columns * scale)))
            resizes.append(Compose(Resize((rows, columns), small), Resize(small, (rows, columns))))
        return (
            *(Blur(sigma) for sigma in self.blur_sigmas),
            *(Shift(down, right) for down, right in self.shifts),
            *resizes,
            *([Flip()] if self.flip else []),
        )


def _mean(arrays: Sequence[FloatArray]) -> FloatArray:
    """Return the mean of arrays of one shape, in float32 and in their order."""
    total = np.zeros_like(arrays[0])
    for array in arrays:
        total += array
    return total / np.float32(len(arrays))
