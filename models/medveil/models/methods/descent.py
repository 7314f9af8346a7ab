"""Projected gradient descent on a frozen model, and what its gradients say about each pixel."""

from __future__ import annotations

import numpy as np

from medveil.models.errors import InputError
from medveil.models.methods import masks
from medveil.models.methods.base import Batch, Room, Settings
from medveil.models.methods.oracle import FloatArray, GradientOracle
from medveil.models.methods.projection import Budget, StepRule, at_most, step_direction
from medveil.models.methods.targets import Objective

__all__ = ["descend", "gradient_at", "masked_budget", "saliency"]


def gradient_at(images: FloatArray, targets: FloatArray, oracle: GradientOracle) -> FloatArray:
    """Return the gradient of each image's loss, ``(N, C, H, W)``.

    Raises:
        InputError: "not-finite": it holds NaN or infinity, whose sign would pass for a direction.
    """
    _, gradient = oracle.loss_and_gradient(images, targets)
    if not np.isfinite(gradient).all():
        raise InputError("not-finite", "The surrogate gave a gradient that is not a number for an image.")
    return gradient


def descend(
    images: FloatArray,
    objective: Objective,
    oracle: GradientOracle,
    budget: Budget,
    settings: Settings,
    *,
    start: FloatArray | None = None,
    rule: StepRule = "sign",
) -> FloatArray:
    """Return the perturbation, ``(N, C', H, W)``, after ``settings.steps`` projected steps from ``start``.

    PGD (Madry et al., arXiv 1706.06083, eq. 2 and section 2.1), downhill.
    """
    alpha = at_most(settings.step_size * settings.epsilon)
    delta = budget.zeros() if start is None else start
    for _ in range(settings.steps):
        gradient = budget.pull(gradient_at(images + delta, objective.targets, oracle))
        direction = step_direction(gradient, rule)
        delta = budget.project(delta - objective.sign * alpha * direction)
    return delta


def saliency(
    images: FloatArray,
    objective: Objective,
    oracle: GradientOracle,
    settings: Settings,
    warmup_steps: int,
    *,
    room: Room | None = None,
) -> FloatArray:
    """Return each pixel's share of what a step can gain, summed over free PGD steps: ``(N, 1, H, W)``.

    S[h, w] = sum_t G[h, w]_t / sum G_t with G = sum_c |dL/dx[c]| * room, the room to the side that the step goes
    to: to first order, what the loss gains there. Without it a white background that ought to become whiter
    takes a mask in which nothing can move. Every step has the same say, whatever the size of its gradient.
    (In "luma", where channels move together, |sum_c dL/dx| stands for the sum over c.) The steps are unmasked
    and end unused.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        objective: what the steps descend.
        oracle: gives the gradients.
        settings: gives epsilon, step size and colour.
        warmup_steps: how many steps.
        room: as ``Batch.room``.
    """
    free = Budget.of(images, settings, room=room)
    alpha = at_most(settings.step_size * settings.epsilon)
    delta = free.zeros()
    scores = np.zeros_like(images[:, :1])
    for _ in range(warmup_steps):
        gradient = free.pull(gradient_at(images + delta, objective.targets, oracle))
        step = -objective.sign * step_direction(gradient)
        gain = (np.abs(gradient) * free.room_towards(step)).sum(axis=1, keepdims=True)
        total = gain.reshape(len(gain), -1).sum(axis=1)[:, None, None, None]
        scores += gain / np.maximum(total, np.finfo(np.float32).tiny)
        delta = free.project(delta + alpha * step)
    return scores


def masked_budget(
    batch: Batch,
    objective: Objective,
    oracle: GradientOracle,
    settings: Settings,
    *,
    amplitude: masks.Amplitude = "even",
    psnr_floor_db: float | None = None,
) -> Budget:
    """Return the budget inside each image's mask; by default the mask of most accumulated gradient."""
    weight = masks.weights(
        batch,
        settings,
        lambda steps: saliency(batch.images, objective, oracle, settings, steps, room=batch.room),
        amplitude=amplitude,
    )
    return Budget.of(batch.images, settings, weight, room=batch.room, psnr_floor_db=psnr_floor_db)
