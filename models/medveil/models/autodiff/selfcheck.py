"""A session proves itself before anybody relies on it.

Runtimes have returned wrong gradients in silence (OpenVINO did, for two of three equivalent forms of the same
graph), so nobody is believed: a session must reproduce what the surrogate's trainer signed, its gradient must
predict how its own loss changes, and one image's answer must not depend on the others in its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from medveil.models.errors import SelfTestError
from medveil.models.methods.oracle import FloatArray, GradientOracle

__all__ = ["GoldenVector", "check_golden", "directional_check", "independence_check", "norms"]

ALIGNED_THRESHOLD: Final = 0.05
"""Largest relative error along directions that half follow the gradient. On four nets (CNN, MLP, ViT, ResNet-18;
60 seeds on the first two) right gradients were measured below 0.014; sign-flipped, mirrored, transposed, zero and
stale ones above 0.8, one scaled by 1.1 at 0.10."""

ISOTROPIC_THRESHOLD: Final = 0.3
"""Largest relative error along random directions, where fp32 rounding and ReLU kinks weigh more: right gradients were
measured below 0.08, one that is zero in half of the pixels above 0.38."""

LARGEST_RTOL: Final = 1e-2
"""A golden vector may not ask for less than this: fp32 runtimes agree to 1e-6, and to 1e-3 across ReLU kinks."""

_IMAGES: Final = 2
_DIRECTIONS: Final = 4  # of each kind; eight slopes in all
_STEPS: Final = (1e-3, 3e-4)
"""Steps of the central difference, in intensity: a longer one meets ReLU's kinks, a shorter one fp32's rounding.
Which is worse depends on the net, so the better of the two counts; a wrong gradient fails at both."""


@dataclass(frozen=True, eq=False)
class GoldenVector:
    """What a surrogate answers to a few images, computed by its trainer and signed with the bundle.

    Attributes:
        images: ``(N, C, rows, columns)`` (or with slices), float32, in [0, 1].
        targets: ``(N, K)`` or ``(N, K, rows, columns)``, float32.
        losses: ``(N,)`` float32, nats.
        gradients: like ``images``, float32, nats per unit intensity.
        rtol: largest relative L2 distance, per image, between a session's gradient and ``gradients``; also the
            largest relative error of a loss.

    Raises:
        SelfTestError: ``golden-vector`` for shapes, types or values that could not prove anything.
    """

    images: FloatArray
    targets: FloatArray
    losses: FloatArray
    gradients: FloatArray
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse a vector that every session would pass, or none."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rtol"}
        count = len(self.images)
        sound = (
            count > 0
            and all(
                a.dtype == np.float32 and len(a) == count and np.isfinite(a).all() for a in arrays.values()
            )
            and self.losses.shape == (count,)
            and self.gradients.shape == self.images.shape
            and 0 < self.rtol <= LARGEST_RTOL
            and bool((norms(self.gradients) > 0).all())
        )
        if not sound:
            raise SelfTestError(
                "golden-vector", "The bundle's golden vector proves nothing; build the bundle again."
            )


def check_golden(oracle: GradientOracle, golden: GoldenVector, *, name: str) -> None:
    """Check that an oracle reproduces the signed losses and gradients of its surrogate.

    Args:
        oracle: the session to check.
        golden: what the trainer computed.
        name: the surrogate's name, for the error.

    Raises:
        SelfTestError: ``golden`` when an answer is further off than ``golden.rtol``.
    """
    losses, gradients = oracle.loss_and_gradient(golden.images, golden.targets)
    loss_error = np.abs(losses - golden.losses) / np.maximum(np.abs(golden.losses), 1.0)
    gradient_error = norms(gradients - golden.gradients) / norms(golden.gradients)
    worst = float(np.concatenate([loss_error, gradient_error]).max())
    if not worst <= golden.rtol:  # "not <=" refuses NaN too
        public = f"Surrogate {name!r} does not reproduce its golden vector on this machine; do not use this runtime."
        raise SelfTestError("golden", public, private=f"relative error {worst:.2e} above {golden.rtol:.0e}")


def directional_check(
    oracle: GradientOracle,
    rng: np.random.Generator,
    *,
    name: str,
    threshold: float = ALIGNED_THRESHOLD,
    target_shape: tuple[int, ...] | None = None,
) -> float:
    """Check that the gradient predicts how the loss changes: ``<g, v>`` against central differences along ``v``.

    Half of the directions follow the gradient's sign in a random half of the pixels: the change is large, so the
    comparison is sharp. The others are random throughout: there the relative error estimates the relative L2 error
    of the whole gradient, so a gradient that is right only in places fails too.

    Args:
        oracle: the session to check.
        rng: where images, targets and directions come from.
        name: the surrogate's name, for the error.
        threshold: largest relative error along the first kind of direction.
        target_shape: shape of one image's target; ``(oracle.classes,)`` if not given.

    Returns:
        The relative error along the first kind.

    Raises:
        SelfTestError: ``directional`` for a gradient that does not predict the loss, ``constant`` for a surrogate
            whose loss does not depend on the image.
    """
    shape = oracle.input_shape
    images = rng.uniform(0.25, 0.75, (_IMAGES, *shape)).astype(np.float32)
    targets = _targets(rng, target_shape or (oracle.classes,))
    # Other images first: a session that hands out what an earlier call left in memory must not be right by chance.
    oracle.loss_and_gradient(images[::-1].copy(), targets[::-1].copy())
    gradient = oracle.loss_and_gradient(images, targets)[1]

    isotropic = rng.choice(np.array([-1, 1], np.float32), (_DIRECTIONS, _IMAGES, *shape))
    followed = (rng.random(isotropic.shape) < 0.5) & (gradient != 0)
    aligned = np.where(followed, np.sign(gradient), isotropic)
    sharp = _directional_error(oracle, images, targets, gradient, aligned)
    broad = _directional_error(oracle, images, targets, gradient, isotropic)
    if math.isinf(sharp) and math.isinf(broad):
        raise SelfTestError("constant", f"The loss of surrogate {name!r} does not depend on the image.")
    if not (sharp <= threshold and broad <= ISOTROPIC_THRESHOLD):  # "not <=" refuses NaN too
        public = f"Surrogate {name!r} fails the directional check: its gradient does not predict its loss."
        raise SelfTestError("directional", public, private=f"relative errors {sharp:.3g} and {broad:.3g}")
    return sharp


def independence_check(
    oracle: GradientOracle,
    rng: np.random.Generator,
    *,
    name: str,
    target_shape: tuple[int, ...] | None = None,
) -> None:
    """Check that each image's answer has the same bits alone and in a batch, and when it is asked for twice.

    Raises:
        SelfTestError: ``batch-dependence`` or ``not-repeatable``.
    """
    images = rng.uniform(0, 1, (_IMAGES, *oracle.input_shape)).astype(np.float32)
    targets = _targets(rng, target_shape or (oracle.classes,))
    together = oracle.loss_and_gradient(images, targets)
    if not _same(together, oracle.loss_and_gradient(images, targets)):
        public = f"Surrogate {name!r} answers the same question differently each time; use --device cpu."
        raise SelfTestError("not-repeatable", public)
    for i in reversed(range(_IMAGES)):
        alone = oracle.loss_and_gradient(images[i : i + 1], targets[i : i + 1])
        if not _same(alone, (together[0][i : i + 1], together[1][i : i + 1])):
            public = f"Surrogate {name!r} lets the images of a batch influence each other; export it for inference."
            raise SelfTestError("batch-dependence", public)


def norms(batch: FloatArray) -> FloatArray:
    """Return the L2 norm of each image of a batch, ``(N,)``."""
    flat = batch.reshape(len(batch), -1)
    return np.asarray(np.sqrt((flat.astype(np.float64) ** 2).sum(1)), np.float32)


def _targets(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Draw target distributions: half of them one-hot, half uniform.

    Where a surrogate is sure of its answer, the loss of the one is flat but that of the other is not.
    """
    classes, space = shape[0], shape[1:]
    targets = np.full((_IMAGES, *shape), 1 / classes, np.float32)
    chosen = rng.integers(0, max(classes, 2), (_IMAGES // 2, 1, *space))
    labels = np.arange(classes).reshape(1, classes, *(1 for _ in space))
    targets[: _IMAGES // 2] = chosen == labels
    return targets


def _directional_error(
    oracle: GradientOracle,
    images: FloatArray,
    targets: FloatArray,
    gradient: FloatArray,
    directions: FloatArray,
) -> float:
    """Return the relative L2 distance between predicted and observed slopes, at the better step.

    Relative to what is larger: the slopes observed, or those that the gradient makes one expect of random
    directions, which keeps a chance of small slopes from inflating the error. Infinite where the loss does not change
    and should not. ``directions`` is ``(D, N, *shape)``, of signs.
    """
    count = len(directions) * len(images)
    predicted = (gradient.astype(np.float64) * directions).reshape(count, -1).sum(1)
    expected = math.sqrt(len(directions)) * float(np.linalg.norm(gradient.astype(np.float64)))
    repeated = np.concatenate([targets] * (2 * len(directions)))
    errors = []
    for step in _STEPS:
        ends = np.concatenate([images + np.float32(sign * step) * directions for sign in (1, -1)])
        losses = oracle.loss_and_gradient(ends.reshape(-1, *images.shape[1:]), repeated)[0].astype(np.float64)
        observed = (losses[:count] - losses[count:]) / (2 * step)
        scale = max(float(np.linalg.norm(observed)), expected)
        errors.append(float(np.linalg.norm(observed - predicted)) / scale if scale else np.inf)
    return min(errors)


def _same(a: tuple[FloatArray, FloatArray], b: tuple[FloatArray, FloatArray]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))
