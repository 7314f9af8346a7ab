"""Operators that move values without changing them: the gradient moves back."""

from __future__ import annotations

import numpy as np

from medveil.models.autodiff.emit import Value
from medveil.models.autodiff.graph import Node, Shape
from medveil.models.autodiff.rules.registry import Context, Gradients, refuse, rule


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node, ctx: Context, g: Value) -> Gradients:
    """G in the input's shape."""
    return [ctx.reshape(g, ctx.in_shape(node))]


@rule("Transpose")
def transpose(node: Node, ctx: Context, g: Value) -> Gradients:
    """G with the axes put back."""
    rank = len(ctx.in_shape(node))
    order = node.attributes["perm"]
    perm = [int(axis) for axis in order] if isinstance(order, tuple) else list(range(rank))[::-1]
    return [ctx.op("Transpose", g, perm=tuple(perm.index(axis) for axis in range(rank)))]


@rule("Expand")
def expand(node: Node, ctx: Context, g: Value) -> Gradients:
    """G summed over the axes that were broadcast."""
    return [ctx.unbroadcast(g, ctx.out_shape(node), ctx.in_shape(node))]


@rule("Tile")
def tile(node: Node, ctx: Context, g: Value) -> Gradients:
    """G summed over the copies."""
    shape = ctx.in_shape(node)
    result = ctx.out_shape(node)
    repeats = [size // extent for size, extent in zip(result, shape, strict=True)]
    if any(extent < 0 and n > 1 for extent, n in zip(shape, repeats, strict=True)):
        raise refuse(node, "it repeats the batch")
    if all(extent == 1 for extent, n in zip(shape, repeats, strict=True) if n != 1):
        return [ctx.unbroadcast(g, result, shape)]
    tiles: Shape = tuple(e for n, extent in zip(repeats, shape, strict=True) for e in (n, extent))
    return [ctx.reduce_sum(ctx.reshape(g, tiles), list(range(0, len(tiles), 2)), keepdims=False)]


@rule("Concat")
def concat(node: Node, ctx: Context, g: Value) -> Gradients:
    """Each operand's part of g."""
    axis = node.integer("axis") % len(ctx.out_shape(node))
    if ctx.out_shape(node)[axis] < 0:
        raise refuse(node, "it joins along the batch")
    gradients: list[Value | None] = []
    start = 0
    for i in range(len(node.inputs)):
        end = start + ctx.in_shape(node, i)[axis]
        gradients.append(ctx.op("Slice", g, [start], [end], [axis]) if ctx.needs(node, i) else None)
        start = end
    return gradients


@rule("Split")
def split(node: Node, ctx: Context, g: tuple[Value | None, ...]) -> Gradients:
    """The parts' gradients joined; an unused part counts zero."""
    parts = [
        part if part is not None else _zeros(ctx, ctx.graph.shapes[name])
        for part, name in zip(g, node.outputs, strict=True)
    ]
    return [ctx.op("Concat", *parts, axis=node.integer("axis"))]


@rule("Slice")
def slice_(node: Node, ctx: Context, g: Value) -> Gradients:
    """G at the positions taken, zero elsewhere."""
    shape, result = ctx.in_shape(node), ctx.out_shape(node)
    rank = len(shape)
    starts, axes, steps = (ctx.constant(node, index) for index in (1, 3, 4))
    if starts is None:
        raise refuse(node, "it has no start")
    begin, end = [0] * rank, [0] * rank
    chosen = range(len(starts)) if axes is None else (int(axis) % rank for axis in axes)
    for i, axis in enumerate(chosen):
        step = 1 if steps is None else int(steps[i])
        extent, size = shape[axis], result[axis]
        if extent < 0:
            if size != extent or step != 1:
                raise refuse(node, "it cuts the batch")
            continue
        first, *_ = range(extent)[slice(int(starts[i]), None, step)]
        if step < 0:  # turn the axis round: the slice then runs upwards, from its last element
            g = ctx.op("Slice", g, [-1], [-(2**31)], [axis], [-1])
            first, step = first + (size - 1) * step, -step
        if step > 1:
            g = _spread(ctx, g, result, axis, step)
        begin[axis] = first
        end[axis] = extent - first - ((size - 1) * step + 1)
    return [_padded(ctx, g, begin, end)]


def _spread(ctx: Context, g: Value, shape: Shape, axis: int, step: int) -> Value:
    """Put ``step - 1`` zeros between neighbours along an axis."""
    rank, size = len(shape), shape[axis]
    lifted = ctx.op("Unsqueeze", g, [axis + 1])
    after = [0] * (rank + 1)
    after[axis + 1] = step - 1
    spread = _padded(ctx, lifted, [0] * (rank + 1), after)
    # The extents behind the axis are merged and taken apart again by number, so that the batch may stay open
    # before it.
    merged = ctx.op("Reshape", spread, [*([0] * axis), size * step, *shape[axis + 1 :]])
    return ctx.op("Slice", merged, [0], [(size - 1) * step + 1], [axis])


@rule("Gather")
def gather(node: Node, ctx: Context, g: Value) -> Gradients:
    """G added up at the positions taken."""
    shape = ctx.in_shape(node)
    rank, axis = len(shape), node.integer("axis") % len(shape)
    indices = ctx.constant(node, 1)
    if indices is None or shape[axis] < 0:
        raise refuse(node, "it picks from the batch")
    flat = indices.reshape(-1) % shape[axis]
    if indices.ndim == 0:
        g = ctx.op("Unsqueeze", g, [axis])
    elif indices.ndim > 1:
        g = ctx.reshape(g, (*shape[:axis], len(flat), *shape[axis + 1 :]))
    if (np.diff(flat) == 1).all():  # a run of neighbours, or a single index
        begin, end = [0] * rank, [0] * rank
        begin[axis], end[axis] = int(flat[0]), shape[axis] - 1 - int(flat[-1])
        return [_padded(ctx, g, begin, end)]
    if len(set(flat)) == len(flat) == shape[axis]:
        return [ctx.op("Gather", g, np.argsort(flat), axis=axis)]
    front = (axis, *(i for i in range(rank) if i != axis))
    moved = ctx.op("Transpose", g, perm=front) if axis else g
    zeros = _zeros(ctx, tuple(shape[i] for i in front))
    summed = ctx.op("ScatterND", zeros, flat.astype(np.int64).reshape(-1, 1), moved, reduction="add")
    back = tuple(front.index(i) for i in range(rank))
    return [ctx.op("Transpose", summed, perm=back) if axis else summed]


@rule("GatherElements")
def gather_elements(node: Node, ctx: Context, g: Value) -> Gradients:
    """G added up at the positions taken."""
    zeros = _zeros(ctx, ctx.in_shape(node))
    axis = node.integer("axis")
    return [ctx.op("ScatterElements", zeros, ctx.x(node, 1), g, axis=axis, reduction="add"), None]


@rule("GatherND")
def gather_nd(node: Node, ctx: Context, g: Value) -> Gradients:
    """G added up at the positions taken."""
    return [ctx.op("ScatterND", _zeros(ctx, ctx.in_shape(node)), ctx.x(node, 1), g, reduction="add"), None]


@rule("Pad")
def pad(node: Node, ctx: Context, g: Value) -> Gradients:
    """G without the border; what the border copied is added at its source."""
    shape = ctx.in_shape(node)
    rank = len(shape)
    amounts, axes = ctx.constant(node, 1), ctx.constant(node, 3)
    if amounts is None:
        raise refuse(node, "it has no amounts")
    begin, end = [0] * rank, [0] * rank
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    for i, axis in enumerate(chosen):
        begin[axis], end[axis] = int(amounts[i]), int(amounts[i + len(amounts) // 2])
    touched = [axis for axis in range(rank) if begin[axis] or end[axis]]
    if any(shape[axis] < 0 for axis in touched):
        raise refuse(node, "it pads the batch")
    mode = node.text("mode")
    if mode == "constant":
        return [_padded(ctx, g, [-amount for amount in begin], [-amount for amount in end])]
    for axis in touched:
        source = _padded_indices(mode, shape[axis], begin[axis], end[axis])
        g = ctx.map_axis(g, axis, rank, np.eye(shape[axis], dtype=np.float32)[source])
    return [g]


def _padded_indices(
    mode: str, extent: int, begin: int, end: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return which source element each element of a padded axis copies; negative amounts cut."""
    known = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}[mode]
    indices = np.pad(np.arange(extent), (max(begin, 0), max(end, 0)), mode=known)  # type: ignore[call-overload]
    return np.asarray(indices[max(-begin, 0) : len(indices) - max(-end, 0)])


@rule("DepthToSpace")
def depth_to_space(node: Node, ctx: Context, g: Value) -> Gradients:
    """G rearranged back."""
    block = node.integer("blocksize")
    if node.text("mode") == "DCR":
        return [ctx.op("SpaceToDepth", g, blocksize=block)]
    _, channels, rows, columns = ctx.in_shape(node)
    split_up = ctx.op("Reshape", g, [-1, channels // block**2, rows, block, columns, block])
    return [ctx.reshape(ctx.op("Transpose", split_up, perm=(0, 1, 3, 5, 2, 4)), ctx.in_shape(node))]


@rule("SpaceToDepth")
def space_to_depth(node: Node, ctx: Context, g: Value) -> Gradients:
    """G rearranged back."""
    return [ctx.op("DepthToSpace", g, blocksize=node.integer("blocksize"), mode="DCR")]


@rule("Trilu")
def triangle(node: Node, ctx: Context, g: Value) -> Gradients:
    """G with the same triangle kept."""
    offset = ctx.x(node, 1) if len(node.inputs) > 1 and node.inputs[1] else None
    return [ctx.op("Trilu", g, offset, upper=node.integer("upper"))]


def _zeros(ctx: Context, shape: Shape) -> Value:
    return ctx.op("ConstantOfShape", ctx.builder.shape_vector(shape))


def _padded(ctx: Context, g: Value, begin: list[int], end: list[int]) -> Value:
    """Pad with zeros; negative amounts cut."""
    cut = [axis for axis in range(len(begin)) if begin[axis] < 0 or end[axis] < 0]
    if cut:
        starts = [max(-begin[axis], 0) for axis in cut]
        ends = [end[axis] if end[axis] < 0 else 2**31 - 1 for axis in cut]
        g = ctx.op("Slice", g, starts, ends, cut)
    amounts = [max(amount, 0) for amount in (*begin, *end)]
    return ctx.op("Pad", g, amounts) if any(amounts) else g
