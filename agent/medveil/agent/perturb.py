"""From images of any size and depth to what the method takes, and back to one wanted change per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medveil.agent.budget import Budget, channels_first, room
from medveil.agent.imageio import Image, StoredArray
from medveil.models.methods.base import Batch, Method, Settings
from medveil.models.methods.oracle import FloatArray, GradientOracle
from medveil.models.methods.transforms import Channels, Compose, Resize, Transform, TransformedOracle

__all__ = ["Perturber", "fitted", "seen"]


@dataclass(frozen=True, slots=True)
class Perturber:
    """A method with its settings and the surrogates it asks.

    Attributes:
        method: from the registry.
        settings: of this campaign; ``epsilon`` and ``mask_ratio`` are those of the budget.
        oracle: the surrogates; None for a method that asks nothing.
    """

    method: Method[Any]
    settings: Settings
    oracle: GradientOracle | None

    def wanted(
        self, images: Sequence[Image], classes: Sequence[int], budget: Budget
    ) -> npt.NDArray[np.float32]:
        """Return the change that the method wants for each image, signed, in display units.

        Args:
            images: all of one size, all grey or all colour. What an image gets doesn't depend on the others.
            classes: index of each image's class.
            budget: decides how far each pixel can go.

        Returns:
            ``(N, channels, rows, columns)`` float32 at native resolution.
        """
        rooms = [room(image, budget) for image in images]
        batch = Batch(
            images=np.stack([channels_first(image.window.display(image.pixels)) for image in images]),
            labels=np.asarray(classes, np.int64),
            keys=tuple(image.digest for image in images),
            room=(np.stack([down for down, _ in rooms]), np.stack([up for _, up in rooms])),
        )
        oracle = None if self.oracle is None else fitted(self.oracle, batch.images.shape[1:])
        return self.method.perturb(batch, oracle, self.settings)


def fitted(oracle: GradientOracle, shape: tuple[int, ...]) -> GradientOracle:
    """Return an oracle that takes images of ``shape`` (channels, rows, columns).

    The consumer's resize is in the loop: a perturbation made at the surrogates' size and upsampled
    keeps a quarter of its energy after that resize; asking the surrogates through it keeps all that the
    native size can carry.
    """
    steps = _fitting(shape, oracle.input_shape)
    return TransformedOracle(oracle, Compose(*steps)) if steps else oracle


def seen(image: Image, stored: StoredArray, shape: tuple[int, ...]) -> FloatArray:
    """Return what the release window shows of stored values, at a model's channels and size.

    Args:
        image: whose window.
        stored: its own values, or those of its protected copy.
        shape: (channels, rows, columns) that the model takes.

    Returns:
        float32 in [0, 1] of that shape.
    """
    planes = channels_first(image.window.display(stored))
    shown: FloatArray = Compose(*_fitting(planes.shape, shape)).apply(planes[None])[0]
    return shown


def _fitting(given: tuple[int, ...], wanted: tuple[int, ...]) -> list[Transform]:
    """Return the steps from one shape (channels, rows, columns) to another."""
    steps: list[Transform] = []
    if given[0] != wanted[0]:
        steps.append(Channels(given[0], wanted[0]))
    if given[1:] != wanted[1:]:
        steps.append(Resize((given[1], given[2]), (wanted[1], wanted[2])))
    return steps
