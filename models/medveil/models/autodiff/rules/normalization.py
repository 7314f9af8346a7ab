"""Normalisation layers and softmax.

With ``n`` the normalised input, ``r`` the reciprocal deviation and ``h`` the gradient reaching ``n``, every
layer that computes its own statistics has the same derivative: ``r (h - mean(h) - n mean(h n))``, means over
the normalised axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from medveil.models.autodiff.emit import Builder, Operand, Value
from medveil.models.autodiff.graph import Node
from medveil.models.autodiff.rules.registry import VECTOR, Context, Gradients, rule


@rule("BatchNormalization")
def batch_normalization(node: Node, ctx: Context, g: Value) -> Gradients:
    """Evaluation mode: the running statistics are constants."""
    rank = len(ctx.in_shape(node))
    r = 1.0 / ctx.op("Sqrt", ctx.x(node, 4) + node.number("epsilon"))
    dx = g * _per_channel(ctx, ctx.x(node, 1) * r, rank) if ctx.needs(node, 0) else None
    centred = ctx.x(node) - _per_channel(ctx, ctx.x(node, 3), rank)
    return [dx, *_affine(node, ctx, g, centred * _per_channel(ctx, r, rank)), None, None]


@rule("InstanceNormalization")
def instance_normalization(node: Node, ctx: Context, g: Value) -> Gradients:
    """Statistics per image and channel, over positions."""
    shape = ctx.in_shape(node)
    axes = range(2, len(shape))

    def mean(value: Value) -> Value:
        return ctx.mean_within(value, shape, axes)

    centred = ctx.x(node) - mean(ctx.x(node))
    n, r = normalised(ctx.builder, centred, mean, node.number("epsilon"))
    dx = None
    if ctx.needs(node, 0):
        dx = through_statistics(g * _per_channel(ctx, ctx.x(node, 1), len(shape)), n, r, mean)
    return [dx, *_affine(node, ctx, g, n)]


@rule("LayerNormalization")
def layer_normalization(node: Node, ctx: Context, g: Value) -> Gradients:
    """Statistics per position, over the last axes; the forward node hands out what it computed."""
    shape = ctx.in_shape(node)
    axes = range(node.integer("axis") % len(shape), len(shape))

    def average(value: Value) -> Value:
        return ctx.mean_within(value, shape, axes)

    mean, r = (ctx.builder.extra_output(node.output, index) for index in (1, 2))
    n = (ctx.x(node) - mean) * r
    dx = through_statistics(g * ctx.x(node, 1), n, r, average) if ctx.needs(node, 0) else None
    d_scale = d_bias = None
    if ctx.needs(node, 1):
        d_scale = ctx.unbroadcast(g * n, shape, ctx.in_shape(node, 1))
    if ctx.needs(node, 2):
        d_bias = ctx.unbroadcast(g, shape, ctx.in_shape(node, 2))
    return [dx, d_scale, d_bias][: len(node.inputs)]


@rule("LpNormalization")
def lp_normalization(node: Node, ctx: Context, g: Value) -> Gradients:
    """Y = x / |x|: dx = (g - d|x| sum(g y)) / |x|, with d|x| = sign(x) or y."""
    x, y, axis = ctx.x(node), ctx.y(node), [node.integer("axis")]
    along = ctx.reduce_sum(g * y, axis)
    if node.integer("p") == 1:
        return [(g - ctx.op("Sign", x) * along) / ctx.op("ReduceL1", x, axis)]
    return [(g - y * along) / ctx.op("ReduceL2", x, axis)]


@rule("Softmax")
def softmax(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = y (g - sum(g y))."""
    y = ctx.y(node)
    return [y * (g - _sum_along(node, ctx, g * y))]


@rule("LogSoftmax")
def log_softmax(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g - exp(y) sum(g)."""
    return [g - ctx.op("Exp", ctx.y(node)) * _sum_along(node, ctx, g)]


def normalised(
    builder: Builder, centred: Value, mean: Callable[[Value], Value], epsilon: float
) -> tuple[Value, Value]:
    """Return the normalised value and the reciprocal deviation."""
    r = 1.0 / builder.op("Sqrt", mean(centred * centred) + epsilon)
    return centred * r, r


def through_statistics(h: Value, n: Value, r: Operand, mean: Callable[[Value], Value]) -> Value:
    """Pass ``h`` back through the normalisation and its statistics (see the module's formula)."""
    return (h - mean(h) - n * mean(h * n)) * r


def _sum_along(node: Node, ctx: Context, value: Value) -> Value:
    """Sum over the node's axis, kept; over a last axis as a product with ones (see `Context.mean_within`)."""
    shape = ctx.out_shape(node)
    axis = node.integer("axis") % len(shape)
    if axis == len(shape) - 1 and math.prod(shape[1:]) % VECTOR:
        return ctx.op("MatMul", value, np.ones((shape[axis], 1), np.float32))
    return ctx.reduce_sum(value, [axis])


def _per_channel(ctx: Context, value: Value, rank: int) -> Value:
    """Line a vector of channels up with axis 1."""
    return ctx.op("Reshape", value, [-1] + [1] * (rank - 2)) if rank > 2 else value


def _affine(node: Node, ctx: Context, g: Value, n: Value) -> tuple[Value | None, Value | None]:
    axes = [axis for axis in range(len(ctx.in_shape(node))) if axis != 1]
    return (
        ctx.reduce_sum(g * n, axes, keepdims=False) if ctx.needs(node, 1) else None,
        ctx.reduce_sum(g, axes, keepdims=False) if ctx.needs(node, 2) else None,
    )
