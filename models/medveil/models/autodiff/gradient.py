"""ONNX graph in, ONNX graph with loss and input gradient out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx import TensorProto, helper

from medveil.models.autodiff.emit import Builder, Value
from medveil.models.autodiff.graph import IMAGE, LOGITS, Graph, Node, Shape, SourceGraph, parse
from medveil.models.autodiff.losses import emit_loss
from medveil.models.autodiff.operators import ZERO_DERIVATIVE
from medveil.models.autodiff.rules import RULES, Context, Dialect, Rule
from medveil.models.autodiff.simplify import simplify
from medveil.models.errors import AdmissionError

__all__ = ["GRADIENT", "LOSS", "TARGET", "backward", "build_gradient", "describe"]

TARGET = "target"
LOSS = "loss"
GRADIENT = "gradient"


def build_gradient(
    graph: SourceGraph | onnx.ModelProto, *, loss: str = "cross_entropy", dialect: Dialect = "cpu"
) -> onnx.ModelProto:
    """Build the graph that answers a `GradientOracle`: each image's loss and its gradient in the pixels.

    The loss is summed over the batch before it is differentiated, so the answer for one image does not depend
    on the others. The batch stays open. The same graph gives the same bytes.

    Args:
        graph: an admitted graph, or a model that `parse` accepts.
        loss: ``"cross_entropy"`` (logits ``(N, K)`` or ``(N, K, ...)``), ``"cross_entropy_dice"`` (``(N, K,
            ...)``) or ``"inner_product"`` (any shape).
        dialect: ``"cpu"`` for onnxruntime's CPU provider, ``"portable"`` for every other runtime.

    Returns:
        A model with inputs ``image`` float32 ``(N, C, ...)`` and ``target`` float32, shaped like the logits,
        and outputs ``loss`` ``(N,)``, ``gradient`` (like the image) and ``logits``.

    Raises:
        AdmissionError: what `parse` raises, and ``operator`` for a use of an operator that has no derivative
            here.
        ConfigurationError: ``loss``.
    """
    forward = simplify(parse(graph), blocked=dialect == "cpu")
    shapes = forward.shapes
    builder = Builder()
    builder.include(forward)
    seed = emit_loss(loss, builder, builder.value(LOGITS), builder.value(TARGET), shapes[LOGITS])
    gradients = backward(forward, builder, {LOGITS: seed.gradient}, (IMAGE,), dialect)
    if IMAGE not in gradients:
        raise AdmissionError("signature", "The graph's output does not depend smoothly on its image.")
    builder.bind(LOSS, seed.loss)
    builder.bind(GRADIENT, gradients[IMAGE])
    return builder.build(
        "gradient",
        [describe(IMAGE, shapes[IMAGE]), describe(TARGET, shapes[LOGITS])],
        [
            describe(LOSS, shapes[LOGITS][:1]),
            describe(GRADIENT, shapes[IMAGE]),
            describe(LOGITS, shapes[LOGITS]),
        ],
    )


def backward(
    graph: Graph,
    builder: Builder,
    seeds: Mapping[str, Value],
    wanted: Iterable[str],
    dialect: Dialect,
    *,
    rules: Mapping[str, Rule] | None = None,
) -> dict[str, Value]:
    """Walk the graph in reverse and return the gradient of every wanted value that the seeded ones depend on.

    Args:
        graph: the forward graph, already included in ``builder``.
        builder: where the backward pass is appended.
        seeds: the derivative with respect to some values, from which the walk starts.
        wanted: values whose gradient is asked for.
        dialect: which equivalent forms to write.
        rules: rules that take the place of the table's, by operator.

    Raises:
        AdmissionError: ``operator`` for a node without a derivative.
    """
    targets = list(wanted)
    ctx = Context(graph, builder, dialect, _influenced(graph, targets))
    table = {**RULES, **(rules or {})}
    adjoints = dict(seeds)
    for node in reversed(graph.nodes):
        arriving = tuple(adjoints.get(name) for name in node.outputs)
        if all(g is None for g in arriving) or not ctx.active.intersection(node.outputs):
            continue
        if node.op not in table:
            raise AdmissionError("operator", f"medveil has no derivative for the operator {node.op!r}.")
        for name, g in zip(
            node.inputs, table[node.op](node, ctx, _output_gradient(node, arriving)), strict=False
        ):
            if g is not None and name in ctx.active:
                adjoints[name] = adjoints[name] + g if name in adjoints else g
    return {name: adjoints[name] for name in targets if name in adjoints}


def describe(name: str, shape: Shape) -> onnx.ValueInfoProto:
    """Declare a float32 input or output; negative extents become the symbolic batch."""
    return helper.make_tensor_value_info(
        name,
        TensorProto.FLOAT,
        ["batch" if extent == -1 else extent if extent > 0 else None for extent in shape],
    )


def _influenced(graph: Graph, sources: Iterable[str]) -> frozenset[str]:
    """Return the float values that depend on the sources through operators with a derivative."""
    active = set(sources)
    for node in graph.nodes:
        if node.op not in ZERO_DERIVATIVE and active.intersection(node.inputs):
            for name in filter(None, node.outputs):
                if graph.dtypes[name] == TensorProto.FLOAT:
                    active.add(name)
    return frozenset(active)


def _output_gradient(node: Node, arriving: tuple[Value | None, ...]) -> Value | tuple[Value | None, ...]:
    """Return what a rule is given: the first output's gradient, for Split those of all parts."""
    if node.op == "Split":
        return arriving
    if any(g is not None for g in arriving[1:]) or arriving[0] is None:
        raise AdmissionError("operator", f"medveil cannot differentiate a further output of {node.op!r}.")
    return arriving[0]
