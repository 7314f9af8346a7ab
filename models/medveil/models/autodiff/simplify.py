"""Equal forward graphs that are cheaper to differentiate.

onnxruntime would fold batch norms itself, but only in the forward half: left to it, the backward half would still
scale every gradient. What is gained by each change is in ``bench/results/gradients.md``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from medveil.models.autodiff.graph import LOGITS, Graph, Node
from medveil.models.autodiff.winograd import minimal_filtering

__all__ = ["simplify"]

Array = npt.NDArray[Any]


_BLOCK = 16
"""Channels in a block of onnxruntime's layout for convolutions with AVX-512 (8 with AVX2, which divides it)."""


def simplify(graph: Graph, *, blocked: bool) -> Graph:
    """Fold evaluation-mode batch norms into the convolutions before them, and write spatial means as pools.

    Args:
        graph: a forward graph.
        blocked: whether the runtime has a blocked layout for convolutions that is costly to leave; then
            convolutions of joined channels are taken apart too, and those of small images, for which that layout
            is slow, are filtered with fewer products.
    """
    graph = _pools_for_means(_without_batch_norms(graph))
    return minimal_filtering(_without_joins(graph)) if blocked else graph


def _without_batch_norms(graph: Graph) -> Graph:
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    convolutions = {node.output: node for node in graph.nodes if node.op == "Conv" and node.output != LOGITS}
    constants, shapes = dict(graph.constants), dict(graph.shapes)
    replaced: dict[str, Node | None] = {}  # by the output of the node that goes
    for node in graph.nodes:
        conv = convolutions.get(node.inputs[0]) if node.op == "BatchNormalization" else None
        operands = (*node.inputs[1:], *(conv.inputs[1:] if conv else ()))
        if (
            conv is None
            or readers[conv.output] != 1
            or not all(name in constants for name in operands if name)
        ):
            continue
        weight, bias = _folded(graph, conv, node)
        names = f"{conv.inputs[1]}/{node.output}", f"{conv.inputs[1]}/{node.output}/bias"
        for name, array in zip(names, (weight, bias), strict=True):
            constants[name], shapes[name] = array, array.shape
        replaced[node.output] = replace(conv, inputs=(conv.inputs[0], *names), outputs=node.outputs[:1])
        replaced[conv.output] = None
    nodes = [replaced.get(node.output, node) for node in graph.nodes]
    return replace(graph, nodes=tuple(n for n in nodes if n is not None), constants=constants, shapes=shapes)


def _folded(graph: Graph, conv: Node, norm: Node) -> tuple[Array, Array]:
    """Return the kernel and bias of a convolution that normalises too, worked out in double precision."""
    kernel, *rest = (graph.constants[name].astype(np.float64) for name in conv.inputs[1:] if name)
    scale, shift, mean, variance = (graph.constants[name].astype(np.float64) for name in norm.inputs[1:])
    factor = scale / np.sqrt(variance + norm.number("epsilon"))
    bias = shift + ((rest[0] if rest else 0.0) - mean) * factor
    weight = kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))
    return weight.astype(np.float32), np.asarray(bias, np.float32)


def _pools_for_means(graph: Graph) -> Graph:
    """Write a mean over all positions as a global pool: it stays in the blocked layout and its sums don't move."""
    nodes: list[Node] = []
    shapes = dict(graph.shapes)
    for node in graph.nodes:
        shape = graph.shapes[node.inputs[0]] if node.op == "ReduceMean" else ()
        axes = (
            graph.constants.get(node.inputs[1]) if node.op == "ReduceMean" and len(node.inputs) > 1 else None
        )
        wanted = list(range(2, len(shape)))
        if axes is None or len(shape) < 4 or sorted(int(a) % len(shape) for a in axes.reshape(-1)) != wanted:
            nodes.append(node)
        elif node.integer("keepdims"):
            nodes.append(Node("GlobalAveragePool", node.inputs[:1], node.outputs, {}))
        else:
            pooled = f"{node.output}/pooled"
            shapes[pooled] = (*shape[:2], *[1] * len(wanted))
            nodes.append(Node("GlobalAveragePool", node.inputs[:1], (pooled,), {}))
            nodes.append(Node("Flatten", (pooled,), node.outputs, {"axis": 1}))
    dtypes = {**graph.dtypes, **dict.fromkeys(shapes.keys() - graph.dtypes.keys(), TensorProto.FLOAT)}
    return replace(graph, nodes=tuple(nodes), shapes=shapes, dtypes=dtypes)


def _without_joins(graph: Graph) -> Graph:
    """Write a convolution of joined channels as a sum of convolutions: its gradient then needs no cutting apart.

    Join and cut are where a U-Net's skip connections would leave the blocked layout; the sum is fused into the second
    convolution.
    """
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    joins = {node.output: node for node in graph.nodes if node.op == "Concat" and readers[node.output] == 1}
    constants, shapes, dtypes = dict(graph.constants), dict(graph.shapes), dict(graph.dtypes)
    nodes: list[Node] = []
    for node in graph.nodes:
        join = joins.get(node.inputs[0]) if node.op == "Conv" else None
        if join is None or not _separable(graph, node, join):
            nodes.append(node)
            continue
        weight, start, total = graph.constants[node.inputs[1]], 0, ""
        for index, part in enumerate(join.inputs):
            end = start + graph.shapes[part][1]
            kernel, result = f"{node.inputs[1]}/{node.output}/{index}", f"{node.output}/part/{index}"
            constants[kernel] = np.ascontiguousarray(weight[:, start:end])
            shapes[kernel], dtypes[kernel] = constants[kernel].shape, TensorProto.FLOAT
            bias = node.inputs[2:] if index == 0 else ()
            nodes.append(replace(node, inputs=(part, kernel, *bias), outputs=(result,)))
            last = index == len(join.inputs) - 1
            summed = (node.output if last else f"{node.output}/sum/{index}") if index else result
            if index:
                nodes.append(Node("Add", (total, result), (summed,), {}))
            for name in (result, summed):
                shapes[name], dtypes[name] = graph.shapes[node.output], TensorProto.FLOAT
            total, start = summed, end
    used = {name for node in nodes for name in node.inputs}
    kept = tuple(node for node in nodes if node.output not in joins or node.output in used)
    return replace(graph, nodes=kept, constants=constants, shapes=shapes, dtypes=dtypes)


def _separable(graph: Graph, conv: Node, join: Node) -> bool:
    whole_blocks = all(graph.shapes[part][1] % _BLOCK == 0 for part in join.inputs)
    constant = conv.inputs[1] in graph.constants
    return whole_blocks and constant and join.integer("axis") == 1 and conv.integer("group") == 1
