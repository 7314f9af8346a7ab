"""Writing ONNX graphs: a builder, and values that can be added and multiplied.

Derivative rules read like formulas because a `Value` overloads the arithmetic operators: ``g * (y * (1.0 -
y))`` appends three nodes. The builder names values, stores each constant once and writes each node once (the
same operator on the same inputs is the same value), so rules may ask for a thing again instead of passing it
around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from medveil.models.autodiff.graph import IMAGE, IR_VERSION, BatchVector, Graph, Node, Shape
from medveil.models.autodiff.operators import OPERATORS, OPSET, Attribute

__all__ = ["Builder", "Lowering", "Operand", "Value"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Value:
    """A float tensor in the graph under construction; arithmetic appends nodes."""

    builder: Builder
    name: str

    def __add__(self, other: Operand) -> Value:
        return self.builder.op("Add", self, other)

    def __radd__(self, other: Operand) -> Value:
        return self.builder.op("Add", other, self)

    def __sub__(self, other: Operand) -> Value:
        return self.builder.op("Sub", self, other)

    def __rsub__(self, other: Operand) -> Value:
        return self.builder.op("Sub", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.builder.op("Mul", self, other)

    def __rmul__(self, other: Operand) -> Value:
        return self.builder.op("Mul", other, self)

    def __truediv__(self, other: Operand) -> Value:
        return self.builder.op("Div", self, other)

    def __rtruediv__(self, other: Operand) -> Value:
        return self.builder.op("Div", other, self)

    def __neg__(self) -> Value:
        return self.builder.op("Neg", self)


Operand: TypeAlias = Value | Array | float | Sequence[int] | None
"""A node's input: a value, an array, a float32 scalar, a list of int64, or ``None`` for one left out."""

Lowering: TypeAlias = "Callable[[Graph, Builder, Node], None]"
"""Writes a forward node as other nodes; the last of them bears the node's output name."""


class Builder:
    """An ONNX graph under construction, in topological order."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._constants: dict[str, Array] = {}
        self._constant_names: dict[tuple[str, Shape, bytes], str] = {}
        self._written: dict[tuple[Any, ...], str] = {}
        self._producer: dict[str, int] = {}

    # -- writing
    # ----------------------------------------------------------------------------------------------------

    def value(self, name: str) -> Value:
        """Return a handle on a value by its name."""
        return Value(self, name)

    def constant(self, array: Array) -> Value:
        """Store a constant once and return it."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constant_names:
            name = f"constant/{len(self._constant_names)}"
            self._constant_names[key] = name
            self._constants[name] = array
        return Value(self, self._constant_names[key])

    def op(self, op: str, *inputs: Operand, **attributes: Attribute) -> Value:
        """Append a node with one output and return that; the same node asked for twice is written once."""
        return self.ops(op, *inputs, outputs=1, **attributes)[0]

    def ops(self, op: str, *inputs: Operand, outputs: int, **attributes: Attribute) -> list[Value]:
        """Append a node with several outputs and return them."""
        names = tuple(self._name(operand) for operand in inputs)
        given = {name: value for name, value in sorted(attributes.items()) if value is not None}
        key = (op, names, outputs, tuple((name, _hashable(value)) for name, value in given.items()))
        if key not in self._written:
            stem = f"{op}/{len(self._written)}"
            self._written[key] = stem
            self.append(Node(op, names, tuple(f"{stem}/{i}" for i in range(outputs)), given))
        return [Value(self, f"{self._written[key]}/{i}") for i in range(outputs)]

    def append(self, node: Node) -> None:
        """Append a node as it is."""
        self._producer |= {name: len(self._nodes) for name in node.outputs if name}
        self._nodes.append(node)

    def bind(self, name: str, value: Value) -> None:
        """Give a value the name under which it leaves the graph."""
        self.append(Node("Identity", (value.name,), (name,), {}))

    def include(self, graph: Graph, *, lower: Mapping[str, Lowering] | None = None) -> None:
        """Append a whole forward graph: its constants, the shapes that follow the batch, and its nodes.

        Args:
            graph: what to append.
            lower: operators that are written in another way, by name.
        """
        self._constants |= graph.constants
        for name, vector in graph.batch_vectors.items():
            self._batch_vector(name, vector)
        for node in graph.nodes:
            if lower is not None and node.op in lower:
                lower[node.op](graph, self, node)
            else:
                self.append(node)

    def extra_output(self, of: str, index: int) -> Value:
        """Ask the node that computes ``of`` for one of its optional outputs as well."""
        position = self._producer[of]
        node = self._nodes[position]
        outputs = (*node.outputs, *[""] * (index + 1 - len(node.outputs)))
        if not outputs[index]:
            outputs = (*outputs[:index], f"{of}/{index}", *outputs[index + 1 :])
            self._nodes[position] = replace(node, outputs=outputs)
            self._producer[outputs[index]] = position
        return Value(self, outputs[index])

    def shape_vector(self, shape: Shape) -> Value:
        """Return a shape as an int64 vector, computed from the batch where it depends on it."""
        extents = np.array(shape, np.int64)
        if (extents >= 0).all():
            return self.constant(extents)
        factors, fixed = np.where(extents < 0, -extents, 0), np.where(extents < 0, 0, extents)
        return self._batch() * factors + fixed

    # -- finishing
    # --------------------------------------------------------------------------------------------------

    def build(
        self,
        name: str,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
    ) -> onnx.ModelProto:
        """Return the model, without what its outputs don't need; the same calls give the same bytes."""
        wanted, nodes = {value.name for value in outputs}, []
        for node in reversed(self._nodes):
            if wanted.intersection(node.outputs):
                wanted.update(node.inputs)
                nodes.append(_node_proto(node))
        supplied = {value.name for value in inputs}
        graph = helper.make_graph(
            nodes[::-1],
            name,
            list(inputs),
            list(outputs),
            [
                numpy_helper.from_array(array, constant)
                for constant, array in self._constants.items()
                if constant in wanted and constant not in supplied
            ],
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="medveil",
        )

    # -- details
    # ----------------------------------------------------------------------------------------------------

    def _name(self, operand: Operand) -> str:
        match operand:
            case None:
                return ""
            case Value():
                return operand.name
            case float() | int():
                return self.constant(np.array(operand, np.float32)).name
            case np.ndarray():
                return self.constant(operand).name
        return self.constant(np.array(operand, np.int64)).name

    def _batch(self) -> Value:
        return self.op("Shape", self.value(IMAGE), start=0, end=1)

    def _batch_vector(self, name: str, vector: BatchVector) -> None:
        batch = self._batch()
        if vector.static.ndim == 0:
            batch = self.op("Squeeze", batch, [0])
        value = batch * vector.per_batch + vector.static
        self.append(Node("Identity", (value.name,), (name,), {}))


def _hashable(value: Attribute) -> object:
    return value.SerializeToString(deterministic=True) if isinstance(value, TensorProto) else value


def _node_proto(node: Node) -> onnx.NodeProto:
    proto = helper.make_node(node.op, _trimmed(node.inputs), _trimmed(node.outputs))
    for name, value in node.attributes.items():
        if value is not None and value != _default(node.op, name):
            proto.attribute.append(helper.make_attribute(name, value))
    return proto


def _default(op: str, attribute: str) -> Attribute:
    """Return the default that needn't be written; our own helper operators have none listed."""
    known = OPERATORS.get(op)
    return None if known is None or attribute in known.required else known.defaults[attribute]


def _trimmed(names: Iterable[str]) -> list[str]:
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept
