"""Pools: who won keeps the gradient, an average shares it out."""

from __future__ import annotations

import math

import numpy as np

from medveil.models.autodiff.emit import Value
from medveil.models.autodiff.graph import Node
from medveil.models.autodiff.rules.registry import Array, Context, Gradients, rule


@rule("MaxPool")
def max_pool(node: Node, ctx: Context, g: Value) -> Gradients:
    """G goes to the position that won its window."""
    # The node is asked for its indices too: they are flat over (N, C, ...), and the first of equals wins as
    # in torch.
    x_shape = ctx.in_shape(node)
    winners = ctx.builder.extra_output(node.output, 1)
    tiled = all(s >= d * (k - 1) + 1 for k, s, d in zip(*_window(node), strict=True))
    if tiled and ctx.dialect == "cpu":
        kernel, strides, _ = _window(node)
        # MaxUnpool first works out a size of its own and refuses one below it: the last, partial windows are
        # pads.
        full = [(n - 1) * s + k for n, s, k in zip(ctx.out_shape(node)[2:], strides, kernel, strict=True)]
        over = [max(0, size - extent) for size, extent in zip(full, x_shape[2:], strict=True)]
        pads = (*[0] * len(over), *over) if any(over) else None
        size = ctx.builder.shape_vector(x_shape)
        return [ctx.op("MaxUnpool", g, winners, size, kernel_shape=kernel, strides=strides, pads=pads)]
    flat = ctx.op(
        "ScatterElements",
        ctx.op("ConstantOfShape", ctx.op("ReduceProd", ctx.builder.shape_vector(x_shape), [0], keepdims=1)),
        ctx.op("Reshape", winners, [-1]),
        ctx.op("Reshape", g, [-1]),
        axis=0,
        reduction="none" if tiled else "add",
    )
    return [ctx.reshape(flat, x_shape)]


@rule("GlobalMaxPool")
def global_max_pool(node: Node, ctx: Context, g: Value) -> Gradients:
    """G goes to the first of the largest."""
    shape = ctx.in_shape(node)
    size = math.prod(shape[2:])
    flat = ctx.op("Reshape", ctx.x(node), [0, 0, -1])
    first = ctx.op("ArgMax", flat, axis=2, keepdims=1, select_last_index=0)
    won = ctx.op("Equal", first, np.arange(size, dtype=np.int64))
    return [ctx.reshape(ctx.op("Where", won, ctx.op("Reshape", g, [0, 0, 1]), 0.0), shape)]


@rule("GlobalAveragePool")
def global_average_pool(node: Node, ctx: Context, g: Value) -> Gradients:
    """Every position gets its share of g."""
    shape = ctx.in_shape(node)
    return [ctx.expand(g * (1 / math.prod(shape[2:])), shape)]


@rule("AveragePool")
def average_pool(node: Node, ctx: Context, g: Value) -> Gradients:
    """Every position gets its share of each window it was counted in."""
    x, y = ctx.in_shape(node)[2:], ctx.out_shape(node)[2:]
    kernel, strides, dilations = _window(node)
    pads = node.integers("pads")
    tiled = kernel == strides and not any(pads) and all(d == 1 for d in dilations)
    if tiled and x == tuple(s * n for s, n in zip(strides, y, strict=True)):
        return [enlarge(ctx, g * (1 / math.prod(kernel)), strides)]
    rank = len(x) + 2
    for axis in range(len(x)):
        shares = _averaging_matrix(node, axis, x[axis], y[axis])
        g = ctx.map_axis(g, axis + 2, rank, shares)
    return [g]


def enlarge(ctx: Context, value: Value, factors: tuple[int, ...]) -> Value:
    """Repeat every pixel ``factors`` times along its axes."""
    scales = np.array([1, 1, *factors], np.float32)
    return ctx.op(
        "Resize",
        value,
        None,
        scales,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _averaging_matrix(node: Node, axis: int, extent: int, results: int) -> Array:
    """One axis of an average pool as a matrix (results, extent); the pool is the product over its axes."""
    kernel, strides, dilations = (values[axis] for values in _window(node))
    pads = node.integers("pads")
    begin, end = pads[axis], pads[axis + len(pads) // 2]
    matrix = np.zeros((results, extent))
    for row in range(results):
        positions = row * strides - begin + dilations * np.arange(kernel)
        inside = positions[(positions >= 0) & (positions < extent)]
        padded = positions[positions < extent + end]  # what ceil_mode adds behind the padding never counts
        matrix[row, inside] = 1 / len(padded if node.integer("count_include_pad") else inside)
    return matrix


def _window(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return node.integers("kernel_shape"), node.integers("strides"), node.integers("dilations")
