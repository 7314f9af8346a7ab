"""Sums, means, norms and extremes over axes: the gradient goes back to every element that was counted."""

from __future__ import annotations

import math

from medveil.models.autodiff.emit import Value
from medveil.models.autodiff.graph import Node
from medveil.models.autodiff.rules.registry import Context, Gradients, refuse, rule


@rule("ReduceSum")
def reduce_sum(node: Node, ctx: Context, g: Value) -> Gradients:
    """Every element counted gets g."""
    return [ctx.expand(_kept(node, ctx, g), ctx.in_shape(node))]


@rule("ReduceMean")
def reduce_mean(node: Node, ctx: Context, g: Value) -> Gradients:
    """Every element counted gets its share of g."""
    shape = ctx.in_shape(node)
    extents = [shape[axis] for axis in _axes(node, ctx)]
    if any(extent < 0 for extent in extents):
        raise refuse(node, "it averages over the batch")
    return [ctx.expand(_kept(node, ctx, g) * (1 / math.prod(extents)), shape)]


@rule("ReduceMax", "ReduceMin")
def reduce_extremum(node: Node, ctx: Context, g: Value) -> Gradients:
    """Equals share the gradient evenly, as torch's ``amax`` does."""
    won = ctx.op("Equal", ctx.x(node), _kept(node, ctx, ctx.y(node)))
    wins = ctx.op("Cast", won, to=ctx.graph.dtypes[node.output])
    return [wins * (_kept(node, ctx, g) / ctx.reduce_sum(wins, _axes(node, ctx)))]


@rule("ReduceL1")
def reduce_l1(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g sign(x)."""
    return [ctx.op("Sign", ctx.x(node)) * _kept(node, ctx, g)]


@rule("ReduceL2")
def reduce_l2(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g x / y."""
    # At the origin, where the norm has no derivative, torch passes back 0.
    norm = _kept(node, ctx, ctx.y(node))
    share = ctx.x(node) * (_kept(node, ctx, g) / norm)
    return [ctx.op("Where", ctx.op("Greater", norm, 0.0), share, 0.0)]


@rule("ReduceSumSquare")
def reduce_sum_square(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = 2 g x."""
    return [ctx.x(node) * (_kept(node, ctx, g) * 2.0)]


@rule("ReduceLogSum")
def reduce_log_sum(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g / exp(y)."""
    share = _kept(node, ctx, g) / ctx.op("Exp", _kept(node, ctx, ctx.y(node)))
    return [ctx.expand(share, ctx.in_shape(node))]


@rule("ReduceLogSumExp")
def reduce_log_sum_exp(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g exp(x - y)."""
    share = ctx.op("Exp", ctx.x(node) - _kept(node, ctx, ctx.y(node)))
    return [share * _kept(node, ctx, g)]


@rule("CumSum")
def cumulative_sum(node: Node, ctx: Context, g: Value) -> Gradients:
    """The cumulative sum of g from the other end."""
    backwards = 1 - node.integer("reverse")
    return [ctx.op("CumSum", g, ctx.x(node, 1), reverse=backwards, exclusive=node.integer("exclusive"))]


def _axes(node: Node, ctx: Context) -> list[int]:
    rank = len(ctx.in_shape(node))
    axes = ctx.constant(node, 1)
    if axes is None or not axes.size:
        return [] if node.integer("noop_with_empty_axes") else list(range(rank))
    return sorted(int(axis) % rank for axis in axes.reshape(-1))


def _kept(node: Node, ctx: Context, value: Value) -> Value:
    """Put back, with extent 1, the axes that the node dropped."""
    axes = _axes(node, ctx)
    return value if node.integer("keepdims") or not axes else ctx.op("Unsqueeze", value, axes)
