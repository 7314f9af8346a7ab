"""How much memory a graph takes, from its shapes, before a session exists."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

__all__ = ["GraphMemory", "measure"]

_WEIGHT_COPIES: Final = 8
"""A session's copies of the weights, at most: the bytes of the model, the weights, the flipped ones of the backward
pass, and both repacked for the processor (measured 6.4 resident and 7.1 at the peak for ResNet-18, whose small images
are filtered with transformed kernels; 1.4 for a ViT, which flips nothing)."""

_SURPLUS: Final = 2.25
"""What onnxruntime takes beyond values alive in the order written: it computes the gates of the backward pass early
and keeps some values in two layouts. Measured 0.9 to 1.2 for ResNet-18 and a ViT, 2.1 to 2.3 for a U-Net; the most
counts, because a budget is a promise."""

_SESSION_BYTES: Final = 16 << 20
"""What a session takes whatever its graph (measured 10 MiB for the smallest)."""

_BATCHES: Final = (16, 32)
"""Two points, between which only what grows with the batch differs; so large that folded weights are not the peak."""
_SMALL: Final = 1 << 12  # elements; larger constants hold no shapes and need not be read

# What the builder writes to compute a shape from the batch.
_ON_SHAPES: Final[Mapping[str, Callable[..., npt.NDArray[np.int64]]]] = {
    "Add": np.add,
    "Identity": np.array,
    "Mul": np.multiply,
    "Squeeze": lambda vector, _axes: vector.reshape(()),
}


@dataclass(frozen=True)
class GraphMemory:
    """What a session needs.

    Attributes:
        fixed_bytes: for the session and its weights, once.
        bytes_per_image: for the values in use at the same moment, at the worst one, for each image of a call.
    """

    fixed_bytes: int
    bytes_per_image: int


def measure(model: ModelProto) -> GraphMemory:
    """Estimate a graph's memory: the largest sum of values alive at once in the order written, and a surplus.

    The estimate lies above what sessions were seen to take, by less than a factor of three; a test holds it there.

    Args:
        model: a graph that medveil emitted, batch open on axis 0 of its inputs.
    """
    skeleton = _skeleton(model)
    fewer, more = (_peak_bytes(skeleton, batch) for batch in _BATCHES)
    alive_per_image = (more - fewer) / (_BATCHES[1] - _BATCHES[0])
    weights = sum(math.prod(t.dims) * _item_bytes(t.data_type) for t in model.graph.initializer)
    return GraphMemory(
        _SESSION_BYTES + _WEIGHT_COPIES * weights, max(math.ceil(_SURPLUS * alive_per_image), 1)
    )


def _skeleton(model: ModelProto) -> ModelProto:
    """Return the graph with large constants declared as inputs: shape inference need not carry them around."""
    skeleton = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph, source = skeleton.graph, model.graph
    graph.name = source.name
    graph.node.extend(_inferable(node) for node in source.node)
    graph.output.extend(source.output)
    graph.input.extend(source.input)
    for tensor in source.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            declared = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(declared)
    return skeleton


def _inferable(node: NodeProto) -> NodeProto:
    """Replace what onnx infers no shape for: MaxUnpool, whose third input says the shape of its output."""
    if node.op_type != "MaxUnpool":
        return node
    return onnx.helper.make_node("ConstantOfShape", [node.input[2]], list(node.output))


def _peak_bytes(skeleton: ModelProto, batch: int) -> int:
    sized = ModelProto()
    sized.CopyFrom(skeleton)
    for value in (*sized.graph.input, *sized.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_value = batch
    _compute_shape_vectors(sized.graph)
    inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    sizes = {v.name: _bytes(v) for v in (*inferred.value_info, *inferred.output, *inferred.input)}
    constants = {t.name for t in inferred.initializer} | {v.name for v in inferred.input}
    return _peak_alive(inferred, {name: size for name, size in sizes.items() if name not in constants})


def _compute_shape_vectors(graph: onnx.GraphProto) -> None:
    """Put constants in place of shapes that the graph computes from its batch; onnx follows only some of them."""
    extents = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input
    }
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.INT64}
    kept = []
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in extents:
            window = {attribute.name: attribute.i for attribute in node.attribute}
            result = np.array(extents[node.input[0]][window.get("start", 0) : window.get("end")], np.int64)
        elif node.op_type in _ON_SHAPES and known.keys() >= set(node.input):
            result = _ON_SHAPES[node.op_type](*(known[name] for name in node.input))
        else:
            kept.append(node)
            continue
        known[node.output[0]] = result
        graph.initializer.append(numpy_helper.from_array(result, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def _peak_alive(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> int:
    last_use = {name: i for i, node in enumerate(graph.node) for name in node.input}
    last_use |= {value.name: len(graph.node) for value in graph.output}
    alive = peak = 0
    ending: dict[int, list[str]] = {}
    for i, node in enumerate(graph.node):
        for name in node.output:
            alive += sizes.get(name, 0)
            ending.setdefault(last_use.get(name, i), []).append(name)
        peak = max(peak, alive)
        alive -= sum(sizes.get(name, 0) for name in ending.get(i, ()))
    return peak


def _bytes(value: ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    elements = math.prod(int(dim.dim_value) for dim in tensor.shape.dim)
    return elements * _item_bytes(tensor.elem_type)


def _item_bytes(data_type: int) -> int:
    if data_type == TensorProto.UNDEFINED:
        return 0
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
