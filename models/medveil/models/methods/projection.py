"""Where a perturbation may go: the epsilon ball, the [0, 1] range, the mask, and an optional PSNR floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from medveil.models.methods.base import BoolArray, Room, Settings
from medveil.models.methods.oracle import FloatArray

__all__ = ["Budget", "StepRule", "at_most", "step_direction", "stored_steps"]

StepRule = Literal["sign", "gradient"]

_STORED_MAX = np.float32(255)


@dataclass(frozen=True, eq=False)
class Budget:
    """The set that a perturbation is projected onto.

    Attributes:
        low, high: ``(N, C', H, W)`` float32, the interval of each value's change, around 0. C' is 1 when the
            channels of a pixel change together ("luma"), and then the tightest channel decides.
        rms_limit: largest root mean square of one image's change, in units of the range; None: no limit.
    """

    low: FloatArray
    high: FloatArray
    rms_limit: float | None = None

    @classmethod
    def of(
        cls,
        images: FloatArray,
        settings: Settings,
        weight: FloatArray | None = None,
        *,
        room: Room | None = None,
        psnr_floor_db: float | None = None,
    ) -> Budget:
        """Return the budget of ``images`` (N, C, H, W).

        Args:
            images: in [0, 1].
            settings: gives epsilon and colour.
            weight: ``(N, 1, H, W)`` in [0, 1], each pixel's share of epsilon: the mask. None: all of it.
            room: how far each value can really go (``Batch.room``); None: epsilon and [0, 1] decide.
            psnr_floor_db: lowest PSNR that an image may end with, for a peak of 1.
        """
        epsilon = at_most(settings.epsilon)
        reach = np.full_like(images[:, :1], epsilon) if weight is None else epsilon * weight
        low, high = np.maximum(-reach, -images), np.minimum(reach, 1 - images)
        if room is not None:
            low, high = np.maximum(low, room[0]), np.minimum(high, room[1])
        if settings.colour == "luma":
            low, high = low.max(axis=1, keepdims=True), high.min(axis=1, keepdims=True)
        limit = None if psnr_floor_db is None else 10 ** (-psnr_floor_db / 20)
        return cls(low, high, limit)

    def zeros(self) -> FloatArray:
        """Return the perturbation that changes nothing, ``(N, C', H, W)``."""
        return np.zeros_like(self.low)

    def movable(self) -> BoolArray:
        """Return which pixels can change at all: ``(N, 1, H, W)``."""
        free: BoolArray = np.logical_or(self.low < 0, self.high > 0)
        return np.asarray(free.any(axis=1, keepdims=True), np.bool_)

    def room_towards(self, direction: FloatArray) -> FloatArray:
        """Return how far each value can go to the side of ``direction`` (N, C', H, W); same shape, 0 or more."""
        return np.where(direction > 0, self.high, -self.low)

    def pull(self, gradient: FloatArray) -> FloatArray:
        """Return the gradient by the perturbation, ``(N, C', H, W)``, from the one by the pixels."""
        return gradient.sum(axis=1, keepdims=True) if self.low.shape[1] == 1 else gradient

    def project(self, delta: FloatArray) -> FloatArray:
        """Return the nearest allowed perturbation: clip, then shrink what lies below the PSNR floor.

        Shrinking cannot leave the box, because every interval holds 0.
        """
        delta = np.clip(delta, self.low, self.high)
        if self.rms_limit is None:
            return delta
        rms = np.sqrt(np.square(delta, dtype=np.float64).reshape(len(delta), -1).mean(axis=1))
        scale = np.minimum(1.0, self.rms_limit / np.maximum(rms, self.rms_limit))
        return np.asarray(delta * scale[:, None, None, None], np.float32)


def at_most(value: float) -> np.float32:
    """Return the largest float32 that does not exceed ``value``: rounding may not widen a budget."""
    nearest = np.float32(value)
    return nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(0))


def step_direction(gradient: FloatArray, rule: StepRule = "sign") -> FloatArray:
    """Return a step's direction, in [-1, 1]: the gradient's sign, or it over each image's largest value."""
    if rule == "sign":
        return np.asarray(np.sign(gradient), np.float32)
    largest = np.abs(gradient).max(axis=(1, 2, 3), keepdims=True)
    return np.asarray(gradient / np.maximum(largest, np.finfo(np.float32).tiny), np.float32)


def stored_steps(images: FloatArray, delta: FloatArray, epsilon: float) -> FloatArray:
    """Return ``images + delta`` as a site stores it in 8 bits, read back: rounded to nearest, within the budget.

    Args:
        images: any shape, read from 8 bits.
        delta: the noise, same shape.
        epsilon: budget, fraction of [0, 1]; it counts in whole steps.
    """
    # A thousandth of a step against the rounding of epsilon itself: 4/255*255 must stay 4.
    whole_steps = np.floor(np.float32(epsilon) * _STORED_MAX + np.float32(1e-3))
    change = np.clip(np.rint(delta * _STORED_MAX), -whole_steps, whole_steps)
    stored = np.clip(np.rint(images * _STORED_MAX) + change, 0, _STORED_MAX)
    return np.asarray(stored / _STORED_MAX, np.float32)
