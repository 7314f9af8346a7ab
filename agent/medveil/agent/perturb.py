"""From images of any size and depth to what the method takes, and back to one wanted change per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medveil.agent.budget import Budget, channels_first, room
from medveil.agent.imageio import Image
from medveil.models.methods.base import Batch, Method, Settings
from medveil.models.methods.oracle import GradientOracle
from medveil.models.methods.transforms import Channels, Compose, Resize, Transform, TransformedOracle

__all__ = ["Perturber", "fitted"]


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
    channels, rows, columns = oracle.input_shape
    steps: list[Transform] = []
    if shape[0] != channels:
        steps.append(Channels(shape[0], channels))
    if shape[1:] != (rows, columns):
        steps.append(Resize((shape[1], shape[2]), (rows, columns)))
    return TransformedOracle(oracle, Compose(*steps)) if steps else oracle
