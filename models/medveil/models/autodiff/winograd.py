"""Convolutions of small images with many channels, in fewer products than their definition has.

Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308): a tile of 2 x 2 results under a 3 x 3 kernel needs 16
products per pair of channels instead of 36. With positions in front, ``(rows * columns, batch * channels)``, cutting
an image into padded, overlapping tiles and transforming them is one product with a constant matrix, and so is the way
back. All that is written are matrix products and changes of layout, so no derivative rule has to know of it, and the
gradient is as cheap as the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from medveil.models.autodiff.graph import Graph, Node, Shape
from medveil.models.autodiff.operators import Attribute

__all__ = ["minimal_filtering"]

Array = npt.NDArray[Any]


# F(2 x 2, 3 x 3) along one axis (arXiv 1509.09308, section 4.1):
# y = _TO_OUTPUT @ ((_TO_KERNEL @ w) * (_TO_INPUT @ x)).
_TO_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_TO_KERNEL = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
_TO_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
_SIDE, _REACH = _TO_OUTPUT.shape
_PRODUCTS = _REACH**2

_WORTH = 0.5
"""Share of the convolution's own products up to which filtering is used. Measured: 0.47 (4 x 4 pixels, 512 channels)
gains; larger images pay more for the transforms and less for the blocked layout (``bench/results/gradients.md``).
That leaves out 64 channels and fewer, for which onnxruntime's product would add up a single image's transforms in
other pieces than a batch's."""


def minimal_filtering(graph: Graph) -> Graph:
    """Return an equal graph in which convolutions with few positions and many channels take fewer products."""
    writer = _Writer(graph)
    for node in graph.nodes:
        if _gains(graph, node):
            _write(writer, node)
        else:
            writer.nodes.append(node)
    return writer.graph()


def _gains(graph: Graph, node: Node) -> bool:
    if node.op != "Conv" or node.inputs[1] not in graph.constants or node.integers("kernel_shape") != (3, 3):
        return False
    if {*node.integers("strides"), *node.integers("dilations"), node.integer("group")} != {1}:
        return False
    (_, inputs, *x), (_, outputs, *y) = graph.shapes[node.inputs[0]], graph.shapes[node.output]
    transforms = inputs * math.prod(x) + outputs * math.prod(y)
    filtered = _PRODUCTS * _count(y) * (inputs * outputs + transforms)
    plain = 9 * math.prod(y) * inputs * outputs
    # The only tile of a single image would be a product of one row, which onnxruntime adds up in another order.
    return _count(y) > 1 and filtered <= _WORTH * plain


def _write(writer: _Writer, node: Node) -> None:
    """Write the convolution as: positions first, cut and transform, multiply channels, transform back, add bias."""
    (_, inputs, *x), (_, outputs, *y) = writer.shapes[node.inputs[0]], writer.shapes[node.output]
    cut, join = _cut_and_join(x, y, node.integers("pads"))
    tiles = _count(y)

    # The runtime works these four out when a session opens: the graph carries each weight once.
    kernel = writer.op("Transpose", (3, 3, inputs, outputs), node.inputs[1], perm=(2, 3, 1, 0))
    kernel = writer.reshape(kernel, (9, inputs * outputs))
    both_axes = writer.constant(np.kron(_TO_KERNEL, _TO_KERNEL))
    kernel = writer.op("MatMul", (_PRODUCTS, inputs * outputs), both_axes, kernel)
    kernel = writer.reshape(kernel, (_PRODUCTS, inputs, outputs))

    image = writer.op("Transpose", (*x, -1, inputs), node.inputs[0], perm=(2, 3, 0, 1))
    image = writer.reshape(image, (x[0] * x[1], -inputs))
    image = writer.op("MatMul", (_PRODUCTS * tiles, -inputs), writer.constant(cut), image)
    image = writer.reshape(image, (_PRODUCTS, -tiles, inputs))
    product = writer.op("MatMul", (_PRODUCTS, -tiles, outputs), image, kernel)
    product = writer.reshape(product, (_PRODUCTS * tiles, -outputs))
    result = writer.op("MatMul", (y[0] * y[1], -outputs), writer.constant(join), product)
    result = writer.reshape(result, (*y, -1, outputs))
    for bias in filter(None, node.inputs[2:]):
        result = writer.op("Add", (*y, -1, outputs), result, bias)
    writer.nodes.append(Node("Transpose", (result,), node.outputs, {"perm": (2, 3, 0, 1)}))


def _cut_and_join(x: Sequence[int], y: Sequence[int], pads: Shape) -> tuple[Array, Array]:
    """Return the matrices from an image's positions to its transformed tiles, and from these to the result's."""
    (cut_rows, join_rows), (cut_columns, join_columns) = (_axis(x[i], y[i], pads[i]) for i in (0, 1))
    cut = np.einsum("tax,sby->abtsxy", cut_rows, cut_columns)
    join = np.einsum("yta,zsb->yzabts", join_rows, join_columns)
    return cut.reshape(-1, x[0] * x[1]), join.reshape(y[0] * y[1], -1)


def _axis(x: int, y: int, pad: int) -> tuple[Array, Array]:
    """Return one axis of both: (tiles, 4, x) and (y, tiles, 4); what lies outside the image is dropped."""
    tiles = _count([y])
    cut = np.zeros((tiles, _REACH, pad + x + tiles * _SIDE + _REACH))
    join = np.zeros((tiles * _SIDE, tiles, _REACH))
    for t in range(tiles):
        first = t * _SIDE
        cut[t, :, first : first + _REACH] = _TO_INPUT
        join[first : first + _SIDE, t] = _TO_OUTPUT
    return cut[:, :, pad : pad + x], join[:y]


def _count(extents: Sequence[int]) -> int:
    """Tiles that cover a result; the last of an axis may reach beyond it."""
    return math.prod(-(-extent // _SIDE) for extent in extents)


class _Writer:
    """A graph being written, with the shape and type of all that is added."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constants = dict(graph.constants)
        self._dtypes = dict(graph.dtypes)
        self.shapes = dict(graph.shapes)
        self.nodes: list[Node] = []

    def op(self, op: str, shape: Shape, *inputs: str, **attributes: Attribute) -> str:
        """Append a node whose result is a float tensor of ``shape``; return the result's name."""
        name = self._name(shape, TensorProto.FLOAT)
        self.nodes.append(Node(op, inputs, (name,), attributes))
        return name

    def reshape(self, value: str, shape: Shape) -> str:
        """Append a Reshape; the axis that follows the batch is what is left over."""
        extents = np.array([max(extent, -1) for extent in shape], np.int64)
        return self.op("Reshape", shape, value, self._stored(extents, TensorProto.INT64), allowzero=0)

    def constant(self, matrix: Array) -> str:
        """Store a float matrix."""
        return self._stored(matrix.astype(np.float32), TensorProto.FLOAT)

    def graph(self) -> Graph:
        """Return what was written."""
        return replace(
            self._graph,
            nodes=tuple(self.nodes),
            constants=self._constants,
            shapes=self.shapes,
            dtypes=self._dtypes,
        )

    def _stored(self, array: Array, dtype: int) -> str:
        name = self._name(array.shape, dtype)
        self._constants[name] = array
        return name

    def _name(self, shape: Shape, dtype: int) -> str:
        name = f"winograd/{len(self.shapes)}"
        self.shapes[name], self._dtypes[name] = shape, dtype
        return name
