"""The table of derivative rules, and what a rule may ask.

A rule is a function ``(node, ctx, g) -> gradients``: ``g`` is the loss's derivative with respect to the
node's output (for Split a tuple, one per output), the result holds one entry per input, ``None`` where there
is nothing to pass back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from medveil.models.autodiff.emit import Builder, Operand, Value
from medveil.models.autodiff.graph import Graph, Node, Shape
from medveil.models.autodiff.operators import Attribute
from medveil.models.errors import AdmissionError

__all__ = ["RULES", "VECTOR", "Context", "Dialect", "Gradients", "Rule", "refuse", "rule"]

Array = npt.NDArray[Any]

Dialect: TypeAlias = Literal["cpu", "portable"]
"""``cpu``: forms that stay inside onnxruntime's blocked convolution layout; ``portable``: forms every runtime has."""

Gradients: TypeAlias = Sequence[Value | None]
Rule: TypeAlias = Callable[[Node, "Context", Value], Gradients]

RULES: dict[str, Callable[[Node, Context, Any], Gradients]] = {}
"""Rules by operator name; filled by the `rule` decorator in this package's modules."""

_STEEPEST = 3e38  # just below the largest float32: the product with any normal number is at least 1
_STEEP = 2.0**120  # a power of two, so that scaling is exact; |threshold| * 2**120 stays finite below 2**8
_STEEP_LIMIT = 128.0

VECTOR = 16
"""Floats in the widest vector register (AVX-512)."""


def rule(*operators: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Register a function as the rule of one or several operators."""

    def register(function: Callable[..., Gradients]) -> Callable[..., Gradients]:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


def refuse(node: Node, why: str) -> AdmissionError:
    """Return the error for a node that has a rule, but not for this use of it."""
    return AdmissionError("operator", f"medveil cannot differentiate the operator {node.op!r} here: {why}.")


@dataclass(frozen=True, eq=False)
class Context:
    """What a rule may know and do.

    Attributes:
        graph: the forward graph.
        builder: where the backward pass is written.
        dialect: which of several equivalent forms to write.
        active: values whose gradient is asked for (an input outside needs none).
    """

    graph: Graph
    builder: Builder
    dialect: Dialect
    active: frozenset[str]

    # -- about the forward graph
    # --------------------------------------------------------------------------------------

    def needs(self, node: Node, index: int) -> bool:
        """Whether the gradient of the node's input at ``index`` is asked for."""
        return index < len(node.inputs) and node.inputs[index] in self.active

    def x(self, node: Node, index: int = 0) -> Value:
        """Return an input of the node."""
        return self.builder.value(node.inputs[index])

    def y(self, node: Node) -> Value:
        """Return the node's first output."""
        return self.builder.value(node.output)

    def in_shape(self, node: Node, index: int = 0) -> Shape:
        """Shape of an input."""
        return self.graph.shapes[node.inputs[index]]

    def out_shape(self, node: Node) -> Shape:
        """Shape of the first output."""
        return self.graph.shapes[node.output]

    def constant(self, node: Node, index: int) -> Array | None:
        """Value of an input that is a constant; ``None`` where the input is left out.

        Raises:
            AdmissionError: ``operator`` where the input is computed.
        """
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        if node.inputs[index] not in self.graph.constants:
            raise refuse(node, "one of its settings is computed by the graph")
        return self.graph.constants[node.inputs[index]]

    # -- writing
    # ------------------------------------------------------------------------------------------------------

    def op(self, op: str, *inputs: Operand, **attributes: Attribute) -> Value:
        """Append a node; see `Builder.op`."""
        return self.builder.op(op, *inputs, **attributes)

    def gate(self, g: Value, x: Value, *, above: float | None = None, below: float | None = None) -> Value:
        """Return ``g`` where ``above < x < below`` and 0 elsewhere.

        In the cpu dialect the gate is a HardSigmoid so steep that it is 0 or 1: comparisons would leave the
            blocked layout.
        It is exact for every normal float32 (a subnormal ``x`` counts partly). OpenVINO was measured to get
        it wrong, so every other runtime gets the comparison.
        """
        bounds = [bound for bound in (above, below) if bound is not None]
        if self.dialect == "cpu" and all(abs(bound) < _STEEP_LIMIT for bound in bounds):
            for bound, sign in ((above, 1.0), (below, -1.0)):
                if bound is not None:
                    steep = _STEEPEST if bound == 0 else _STEEP
                    g = g * self.op("HardSigmoid", x, alpha=sign * steep, beta=-sign * steep * bound + 0.0)
            return g
        for bound, comparison in ((above, "Greater"), (below, "Less")):
            if bound is not None:
                g = self.op("Where", self.op(comparison, x, float(bound)), g, 0.0)
        return g

    def reshape(self, value: Value, shape: Shape) -> Value:
        """Reshape to a forward shape; the batch is what is left over."""
        open_axes = sum(extent < 0 for extent in shape)
        if open_axes > 1:
            return self.op("Reshape", value, self.builder.shape_vector(shape))
        return self.op("Reshape", value, [max(extent, -1) for extent in shape])

    def expand(self, value: Value, shape: Shape) -> Value:
        """Broadcast to a forward shape."""
        return self.op("Expand", value, self.builder.shape_vector(shape))

    def reduce_sum(self, value: Value, axes: Sequence[int], *, keepdims: bool = True) -> Value:
        """Sum over some axes."""
        return self.op("ReduceSum", value, list(axes), keepdims=int(keepdims))

    def mean_within(self, value: Value, shape: Shape, axes: Sequence[int]) -> Value:
        """Average a value of ``shape`` over its last axes, kept; per image the same bits in any batch.

        onnxruntime's reductions depend on where a row lies in memory; its pools and products were measured
        not to.
        """
        rank, extents = len(shape), [shape[axis] for axis in axes]
        if list(axes) == [rank - 1]:
            return self.op("MatMul", value, np.full((extents[0], 1), 1 / extents[0], np.float32))
        if rank > 3 and list(axes) == list(range(2, rank)):
            return self.op("GlobalAveragePool", value)
        return self.op("ReduceMean", value, list(axes), keepdims=1)

    def unbroadcast(self, g: Value, shape: Shape, target: Shape) -> Value:
        """Sum ``g`` (of ``shape``) over the axes along which a value of shape ``target`` was broadcast."""
        lead = len(shape) - len(target)
        padded = (1,) * lead + target
        axes = [
            i for i, (have, want) in enumerate(zip(shape, padded, strict=True)) if want == 1 and have != 1
        ]
        if not lead:
            return self.reduce_sum(g, axes) if axes else g
        dropped = self.reduce_sum(g, axes) if axes else g
        return self.op("Squeeze", dropped, list(range(lead)))

    def map_axis(self, value: Value, axis: int, rank: int, matrix: Array) -> Value:
        """Apply ``matrix`` (m, n) along one axis: extent m becomes n."""
        if axis == rank - 1:
            return self.op("MatMul", value, matrix.astype(np.float32))
        if axis == rank - 2:
            return self.op("MatMul", np.ascontiguousarray(matrix.T, np.float32), value)
        order = [i for i in range(rank) if i != axis] + [axis]
        back = [order.index(i) for i in range(rank)]
        last = self.op("MatMul", self.op("Transpose", value, perm=tuple(order)), matrix.astype(np.float32))
        return self.op("Transpose", last, perm=tuple(back))
