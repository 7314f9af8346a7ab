"""From images of any size and depth to what the method takes, and back to one wanted change per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medveil.agent.budget import Budget, may_move
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
            budget: decides which pixels have room for a change at all.

        Returns:
            ``(N, channels, rows, columns)`` float32 at native resolution.
        """
        batch = Batch(
            images=np.stack([_shown(image) for image in images]),
            labels=np.asarray(classes, np.int64),
            keys=tuple(image.digest for image in images),
            editable=np.stack([may_move(image, budget)[None] for image in images]),
        )
        oracle = None if self.oracle is None else fitted(self.oracle, batch.images.shape[1:])
        return self.method.perturb(batch, oracle, self.settings)


def _shown(image: Image) -> npt.NDArray[np.float32]:
    """Return what the release window shows: ``(channels, rows, columns)`` float32 in [0, 1]."""
    shown = image.window.display(image.pixels)
    return np.ascontiguousarray(shown.transpose(2, 0, 1) if image.is_colour else shown[None])


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
