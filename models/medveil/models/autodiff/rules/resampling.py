"""Resize: a linear map along each axis, so its derivative is the transposed matrix along each axis."""

from __future__ import annotations

import math

import numpy as np

from medveil.models.autodiff.emit import Value
from medveil.models.autodiff.graph import Node
from medveil.models.autodiff.rules.registry import Array, Context, Gradients, refuse, rule


@rule("Resize")
def resize(node: Node, ctx: Context, g: Value) -> Gradients:
    """The transposed map along each axis; where pixels are merely repeated, the sum over the copies."""
    x, y = ctx.in_shape(node), ctx.out_shape(node)
    rank = len(x)
    scales = _scales(node, ctx)
    changed = [axis for axis in range(rank) if x[axis] != y[axis] or scales[axis] != 1]
    if any(extent < 0 for axis in changed for extent in (x[axis], y[axis])):
        raise refuse(node, "it resizes the batch")
    if factors := _repetition(node, ctx, scales):
        pooled = ctx.op("AveragePool", g, kernel_shape=factors, strides=factors)
        return [pooled * float(math.prod(factors))]
    for axis in changed:
        g = ctx.map_axis(g, axis, rank, _matrix(node, x[axis], y[axis], scales[axis]))
    return [g]


def _scales(node: Node, ctx: Context) -> list[float]:
    """Return the scale per axis: as given, or the ratio of the extents where sizes are given."""
    x, y = ctx.in_shape(node), ctx.out_shape(node)
    axes = node.attributes["axes"]
    chosen = [int(a) % len(x) for a in axes] if isinstance(axes, tuple) else list(range(len(x)))
    scales = [size / extent for extent, size in zip(x, y, strict=True)]
    given = ctx.constant(node, 2)
    if given is not None and given.size:
        for axis, scale in zip(chosen, given, strict=True):
            scales[axis] = float(scale)
    return scales


def _repetition(node: Node, ctx: Context, scales: list[float]) -> tuple[int, ...]:
    """Return the whole factors by which pixels are merely repeated, or nothing."""
    if node.text("mode") != "nearest" or scales[:2] != [1, 1] or len(scales) < 3:
        return ()
    factors = tuple(round(scale) for scale in scales[2:])
    x, y = ctx.in_shape(node)[2:], ctx.out_shape(node)[2:]
    for extent, size, factor, scale in zip(x, y, factors, scales[2:], strict=True):
        expected = np.repeat(np.eye(extent), factor, axis=0) if factor == scale else np.zeros((0, 0))
        if expected.shape != (size, extent) or (expected != _matrix(node, extent, size, scale)).any():
            return ()
    return factors


def _matrix(node: Node, extent: int, size: int, scale: float) -> Array:
    """One axis of a resize as a matrix (size, extent), from the formulas of the ONNX operator text."""
    positions = _positions(node, extent, size, np.float32(scale))
    rows = np.arange(size)
    matrix = np.zeros((size, extent))
    if node.text("mode") == "nearest":
        matrix[rows, np.clip(_nearest(node, positions), 0, extent - 1)] = 1
        return matrix
    if node.text("mode") == "linear":
        positions = np.clip(positions, 0, extent - 1)
    low = np.floor(positions).astype(int)
    weights = _cubic(node, positions - low) if node.text("mode") == "cubic" else _linear(positions - low)
    for offset, weight in weights.items():
        np.add.at(matrix, (rows, np.clip(low + offset, 0, extent - 1)), weight)
    return matrix


def _positions(node: Node, extent: int, size: int, scale: np.float32) -> Array:
    at = np.arange(size, dtype=np.float32)
    half = np.float32(0.5)
    match node.text("coordinate_transformation_mode"):
        case "align_corners":
            return at * np.float32(extent - 1) / np.float32(max(size - 1, 1))
        case "asymmetric":
            return at / scale
        case "pytorch_half_pixel" if size == 1:
            return np.zeros(1, np.float32)
        case "half_pixel_symmetric":
            adjusted = np.float32(size) / (scale * np.float32(extent))
            offset = np.float32(extent / 2) * (1 - adjusted)
            return np.asarray(offset + (at + half) / scale - half)
    return (at + half) / scale - half


def _nearest(node: Node, positions: Array) -> Array:
    match node.text("nearest_mode"):
        case "floor":
            rounded = np.floor(positions)
        case "ceil":
            rounded = np.ceil(positions)
        case "round_prefer_ceil":
            rounded = np.floor(positions + np.float32(0.5))
        case _:
            rounded = np.ceil(positions - np.float32(0.5))
    return rounded.astype(int)


def _linear(t: Array) -> dict[int, Array]:
    return {0: 1 - t, 1: t}


def _cubic(node: Node, t: Array) -> dict[int, Array]:
    """Keys' cubic convolution kernel at distances 1 + t, t, 1 - t, 2 - t (IEEE TASSP 29(6), 1981)."""
    a = node.number("cubic_coeff_a")

    def near(d: Array) -> Array:
        return np.asarray(((a + 2) * d - (a + 3)) * d * d + 1)

    def far(d: Array) -> Array:
        return np.asarray(((a * d - 5 * a) * d + 8 * a) * d - 4 * a)

    return {-1: far(1 + t), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
