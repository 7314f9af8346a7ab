"""The losses a surrogate is asked about, each with its derivative in closed form.

A loss is never differentiated by rule: its derivative with respect to the logits is written down, which is
shorter and keeps its digits. Per image throughout: an image's gradient doesn't depend on the rest of its
batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from medveil.models.autodiff.emit import Builder, Value
from medveil.models.autodiff.graph import Shape
from medveil.models.autodiff.rules.registry import VECTOR
from medveil.models.errors import ConfigurationError

__all__ = ["LOSSES", "Seed", "emit_loss"]

_SMOOTHING = 1e-5
"""Keeps Dice defined where a class is absent from image and prediction (MONAI's DiceLoss uses the same value)."""


@dataclass(frozen=True, slots=True)
class Seed:
    """A loss in the graph.

    Attributes:
        loss: ``(N,)``, nats (Dice: a number in [0, 1]) per image.
        gradient: derivative of each image's loss with respect to its logits, shaped like them.
    """

    loss: Value
    gradient: Value


LossFunction: TypeAlias = Callable[[Builder, Value, Value, Shape], Seed]


def emit_loss(name: str, builder: Builder, logits: Value, target: Value, shape: Shape) -> Seed:
    """Write a loss by name.

    Raises:
        ConfigurationError: ``loss`` for an unknown name, or logits of a shape that the loss isn't defined
            for.
    """
    if name not in LOSSES:
        raise ConfigurationError("loss", f"Unknown loss {name!r}; known are {', '.join(sorted(LOSSES))}.")
    return LOSSES[name](builder, logits, target, shape)


def cross_entropy(builder: Builder, logits: Value, target: Value, shape: Shape) -> Seed:
    """Cross-entropy against a distribution over classes; averaged over positions where there are any.

    One channel is one yes-or-no question, its logit held against 0: the target is the probability of yes.
    """
    _require_channels(shape)
    if shape[1] == 1:
        paired = cross_entropy(
            builder,
            builder.op("Concat", logits * 0.0, logits, axis=1),
            builder.op("Concat", 1.0 - target, target, axis=1),
            (shape[0], 2, *shape[2:]),
        )
        return Seed(paired.loss, builder.op("Slice", paired.gradient, [1], [2], [1]))
    p, log_p = _softmax(builder, logits, shape)
    each = -(target * log_p)
    gradient = p * _over_classes(builder, target, shape) - target
    positions = math.prod(shape[2:])
    if positions > 1:
        each, gradient = _mean_over_positions(builder, each), gradient * (1 / positions)
    return Seed(_per_image(builder, each, shape[1]), gradient)


def cross_entropy_dice(builder: Builder, logits: Value, target: Value, shape: Shape) -> Seed:
    """Mean cross-entropy over positions plus one minus the mean soft Dice over classes (background included).

    With p the probabilities, I the sum of p t and S the sum of p + t over positions, Dice is (2 I + s) / (S +
    s), and its derivative with respect to p is (2 t (S + s) - (2 I + s)) / (S + s)^2.
    """
    _require_channels(shape)
    if len(shape) < 3:
        raise ConfigurationError(
            "loss", "The loss 'cross_entropy_dice' is for segmentation: one class per position."
        )
    entropy = cross_entropy(builder, logits, target, shape)
    positions = math.prod(shape[2:])
    single = shape[1] == 1
    p = builder.op("Sigmoid", logits) if single else _softmax(builder, logits, shape)[0]
    overlap = _mean_over_positions(builder, p * target) * (2.0 * positions) + _SMOOTHING
    size = _mean_over_positions(builder, p + target) * float(positions) + _SMOOTHING
    dice = _per_image(builder, overlap / size, shape[1]) * (1 / shape[1])
    d_p = (overlap / size - target * 2.0) / size * (1 / shape[1])  # of 1 - Dice
    through = d_p * (1.0 - p) if single else d_p - _over_classes(builder, d_p * p, shape)
    return Seed(entropy.loss + (1.0 - dice), entropy.gradient + p * through)


def inner_product(builder: Builder, logits: Value, target: Value, shape: Shape) -> Seed:
    """The inner product of logits and target: turns a gradient graph into a vector-Jacobian product."""
    each = logits * target
    rest = list(range(1, len(shape)))
    return Seed(builder.op("ReduceSum", each, rest, keepdims=0) if rest else each, target)


# Sums whose last digit doesn't depend on where in the batch an image lies. onnxruntime's own reductions start
# at the next multiple of four floats in memory, so that rows of ten classes are added up in another order in
# every other image, and split their work by the size of the batch; its matrix products and pools were
# measured to do neither.


def _softmax(builder: Builder, logits: Value, shape: Shape) -> tuple[Value, Value]:
    """Return probabilities and their logarithms over axis 1.

    Position by position, onnxruntime's own LogSoftmax is slow: it turns the classes to the last axis and calls its
    kernel for each position (1.8 % of a U-Net's pass). Its Log, however, treats what doesn't fill a vector register
    in another way.
    """
    if math.prod(shape[2:]) % VECTOR:
        log_p = builder.op("LogSoftmax", logits, axis=1)
        return builder.op("Exp", log_p), log_p
    shifted = logits - builder.op("ReduceMax", logits, [1], keepdims=1)
    exponentials = builder.op("Exp", shifted)
    total = _over_classes(builder, exponentials, shape)
    return exponentials / total, shifted - builder.op("Log", total)


def _over_classes(builder: Builder, value: Value, shape: Shape) -> Value:
    """Sum over axis 1, kept."""
    classes, space = shape[1], shape[2:]
    if not space:
        return builder.op("MatMul", value, np.ones((classes, 1), np.float32))
    flat = builder.op("Reshape", value, [0, classes, -1])
    summed = builder.op("MatMul", np.ones((1, classes), np.float32), flat)
    return builder.op("Reshape", summed, [0, 1, *space])


def _per_image(builder: Builder, value: Value, classes: int) -> Value:
    """Sum the classes of (N, K) or (N, K, 1, ...) to (N,)."""
    summed = builder.op("MatMul", builder.op("Flatten", value, axis=1), np.ones((classes, 1), np.float32))
    return builder.op("Squeeze", summed, [1])


def _mean_over_positions(builder: Builder, value: Value) -> Value:
    return builder.op("GlobalAveragePool", value)


def _require_channels(shape: Shape) -> None:
    if len(shape) < 2 or any(extent < 1 for extent in shape[1:]):
        raise ConfigurationError("loss", "The loss needs logits (batch, classes, ...) of static extents.")


LOSSES: Mapping[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "cross_entropy_dice": cross_entropy_dice,
    "inner_product": inner_product,
}
"""Losses by name."""
