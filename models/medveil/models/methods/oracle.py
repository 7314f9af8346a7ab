"""The one question every method asks: how does the loss change when the pixels change?

The agent answers with onnxruntime, the coordinator's trainer with torch, unit tests with an analytic
quadratic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["EnsembleOracle", "FloatArray", "GradientOracle", "TrainableOracle"]

FloatArray = npt.NDArray[np.float32]


class GradientOracle(Protocol):
    """A differentiable stand-in for the attacker's model."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(channels, rows, columns)`` (or ``(channels, slices, rows, columns)``)."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes K of the taxonomy."""
        ...

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return each image's loss and its gradient with respect to that image's pixels.

        Images do not influence each other (models run in evaluation mode and the loss is *summed* over the
        batch), so the answer for one image is the same in any batch. N may be a whole set: the oracle splits it
        as its memory wants.

        Args:
            images: ``(N, *input_shape)``, float32, in [0, 1].
            targets: ``(N, K)`` float32 target distribution per image (one-hot for a class), rows sum to 1;
                for segmentation ``(N, K, rows, columns)``.

        Returns:
            losses ``(N,)`` float32 in nats, gradient ``(N, *input_shape)`` float32 in nats per unit
            intensity.
        """
        ...


class TrainableOracle(GradientOracle, Protocol):
    """An oracle whose model can also be trained: what the co-training ("min-min") methods need."""

    def train_step(self, images: FloatArray, targets: FloatArray) -> float:
        """Take one SGD step on this batch's mean loss (training-mode batch norm) and return that loss."""
        ...


class EnsembleOracle:
    """Several oracles asked at once; each has the same say whatever the scale of its own gradient.

    Every member's gradient is divided by its mean absolute value per image before averaging: without that the
    model with the steepest loss decides alone (our choice; measured in ``bench/results``).
    """

    def __init__(self, members: Sequence[GradientOracle]) -> None:
        if not members:
            raise ValueError("an ensemble needs at least one oracle")
        if len({(m.input_shape, m.classes) for m in members}) != 1:
            raise ValueError("the members of an ensemble must share input shape and classes")
        self._members = tuple(members)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, as every member takes it."""
        return self._members[0].input_shape

    @property
    def classes(self) -> int:
        """Number of classes, the same for every member."""
        return self._members[0].classes

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the members' mean loss and the mean of their scaled gradients; shapes as in the protocol."""
        losses = np.zeros(len(images), np.float32)
        gradient = np.zeros(images.shape, np.float32)
        axes = tuple(range(1, images.ndim))
        for member in self._members:
            loss, g = member.loss_and_gradient(images, targets)
            scale = np.abs(g).mean(axis=axes, keepdims=True)
            losses += loss
            gradient += g / np.maximum(scale, np.finfo(np.float32).tiny)
        count = np.float32(len(self._members))
        return losses / count, gradient / count
