"""Matrix products."""

from __future__ import annotations

import string

from medveil.models.autodiff.emit import Value
from medveil.models.autodiff.graph import Node, Shape
from medveil.models.autodiff.rules.registry import Context, Gradients, refuse, rule


@rule("Gemm")
def gemm(node: Node, ctx: Context, g: Value) -> Gradients:
    """Y = alpha A B + beta C: dA = alpha G B^T, dB = alpha A^T G, dC = beta G."""
    a, b = ctx.x(node, 0), ctx.x(node, 1)
    alpha, beta = node.number("alpha"), node.number("beta")
    flip_a, flip_b = node.integer("transA"), node.integer("transB")
    da = db = dc = None
    if ctx.needs(node, 0):
        # Y = A B: dA = G B^T; where A is given transposed, dA^T = B G^T
        da = (
            ctx.op("Gemm", b, g, alpha=alpha, transA=flip_b, transB=1)
            if flip_a
            else ctx.op("Gemm", g, b, alpha=alpha, transA=0, transB=1 - flip_b)
        )
    if ctx.needs(node, 1):
        db = (
            ctx.op("Gemm", g, a, alpha=alpha, transA=1, transB=flip_a)
            if flip_b
            else ctx.op("Gemm", a, g, alpha=alpha, transA=1 - flip_a, transB=0)
        )
    if ctx.needs(node, 2):
        dc = ctx.unbroadcast(g if beta == 1 else g * beta, ctx.out_shape(node), ctx.in_shape(node, 2))
    return [da, db, dc]


@rule("MatMul")
def matmul(node: Node, ctx: Context, g: Value) -> Gradients:
    """DA = G B^T, dB = A^T G, summed over axes that were broadcast."""
    a_shape, b_shape = ctx.in_shape(node, 0), ctx.in_shape(node, 1)
    a, b, y_shape = ctx.x(node, 0), ctx.x(node, 1), ctx.out_shape(node)
    if len(b_shape) == 1:  # a vector on the right is a column whose axis is dropped from the result
        b, b_shape, y_shape = ctx.op("Unsqueeze", b, [1]), (*b_shape, 1), (*y_shape, 1)
        g = ctx.op("Unsqueeze", g, [-1])
    if len(a_shape) == 1:
        a, a_shape, y_shape = ctx.op("Unsqueeze", a, [0]), (1, *a_shape), (*y_shape[:-1], 1, y_shape[-1])
        g = ctx.op("Unsqueeze", g, [-2])
    da = db = None
    if ctx.needs(node, 0):
        da = ctx.op("MatMul", g, _transposed(ctx, b, b_shape))
        da = ctx.unbroadcast(da, (*y_shape[:-1], a_shape[-1]), a_shape)
        da = ctx.op("Squeeze", da, [0]) if len(ctx.in_shape(node, 0)) == 1 else da
    if ctx.needs(node, 1):
        db = _right_gradient(ctx, a, a_shape, g, y_shape, b_shape)
        db = ctx.op("Squeeze", db, [1]) if len(ctx.in_shape(node, 1)) == 1 else db
    return [da, db]


def _right_gradient(
    ctx: Context, a: Value, a_shape: Shape, g: Value, y_shape: Shape, b_shape: Shape
) -> Value:
    if len(b_shape) == 2:  # one matrix for the whole batch: a single product over all rows
        if len(a_shape) > 2:
            a, g = ctx.op("Reshape", a, [-1, a_shape[-1]]), ctx.op("Reshape", g, [-1, y_shape[-1]])
        return ctx.op("Gemm", a, g, transA=1)
    db = ctx.op("MatMul", _transposed(ctx, a, a_shape), g)
    return ctx.unbroadcast(db, (*y_shape[:-2], *b_shape[-2:]), b_shape)


def _transposed(ctx: Context, value: Value, shape: Shape) -> Value:
    rank = len(shape)
    return ctx.op("Transpose", value, perm=(*range(rank - 2), rank - 1, rank - 2))


@rule("Einsum")
def einsum(node: Node, ctx: Context, g: Value) -> Gradients:
    """Exchange the operand's subscripts with the result's."""
    terms, result = _subscripts(node, ctx)
    gradients: list[Value | None] = []
    for i, term in enumerate(terms):
        if not ctx.needs(node, i):
            gradients.append(None)
            continue
        others = [t for j, t in enumerate(terms) if j != i]
        reachable = [c for c in term if c in result or any(c in other for other in others)]
        equation = ",".join([result, *others]) + "->" + "".join(reachable)
        operands = [ctx.x(node, j) for j in range(len(terms)) if j != i]
        da = ctx.op("Einsum", g, *operands, equation=equation)
        if len(reachable) < len(
            term
        ):  # an index summed in this operand alone: its gradient is the same all along it
            da = ctx.op("Unsqueeze", da, [axis for axis, c in enumerate(term) if c not in reachable])
            da = ctx.expand(da, ctx.in_shape(node, i))
        gradients.append(da)
    return gradients


def _subscripts(node: Node, ctx: Context) -> tuple[list[str], str]:
    """Return the equation's terms with the ellipsis and an implicit result written out."""
    left, arrow, result = node.text("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    letters = [c for c in left if c.isalpha()]
    if not arrow:
        once = sorted(c for c in set(letters) if letters.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    free = [c for c in string.ascii_letters if c not in letters]
    widths = {len(ctx.in_shape(node, i)) - len(t) + 3 for i, t in enumerate(terms) if "..." in t}
    if len(widths) > 1:
        raise refuse(node, "its ellipses cover different numbers of axes")
    axes = "".join(free[: widths.pop()]) if widths else ""
    terms, result = [t.replace("...", axes) for t in terms], result.replace("...", axes)
    if any(len(set(t)) < len(t) for t in (*terms, result)):
        raise refuse(node, "it takes a diagonal")
    sizes: dict[str, int] = {}
    for i, term in enumerate(terms):
        for c, extent in zip(term, ctx.in_shape(node, i), strict=True):
            if sizes.setdefault(c, extent) != extent:
                raise refuse(node, "it broadcasts an axis of extent 1")
    return terms, result
