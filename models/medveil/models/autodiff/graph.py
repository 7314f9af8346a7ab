"""A received graph, read into values of our own.

``parse`` turns an ONNX model into a frozen `Graph`: nodes with attributes from our table, small constants
worked out, and the shape of every value with the batch left open. Whatever isn't understood is refused here,
by name, with an `AdmissionError`; nothing later looks at the received bytes again.

How the open batch is found: shape inference runs at three concrete batch sizes. An extent that is the same in
all three is static, one that grows in proportion belongs to the batch, and anything else (an image that looks
at its neighbour, half a batch) is refused. So shape arithmetic of any exporter is followed exactly, and the
batch may sit on any axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference, version_converter

from medveil.models.autodiff.constants import LARGEST_FOLDED, evaluate
from medveil.models.autodiff.operators import FOLDED, OPERATORS, OPSET, Attribute, read_attributes, shown
from medveil.models.errors import AdmissionError

__all__ = [
    "IMAGE",
    "IR_VERSION",
    "LOGITS",
    "OPERATORS",
    "OPSETS",
    "BatchVector",
    "Graph",
    "Node",
    "Shape",
    "parse",
    "to_opset20",
]

Array = npt.NDArray[Any]

Shape: TypeAlias = tuple[int, ...]
"""Extents per axis; a negative extent ``-k`` stands for k times the batch (so ``-1`` is the batch itself)."""

OPSETS = range(13, 23)
"""Opsets that are read: 13 is the oldest the legacy torch exporter is used with, 22 the newest that was tested."""

IR_VERSION = 10
"""IR version of every graph we emit: the one of opset 21, checked to hold opset 20 too (onnxruntime >= 1.18)."""

IMAGE = "image"
LOGITS = "logits"

_BATCHES = (2, 3, 7)  # two points fix a line, the third refuses what isn't one (our choice of small primes)


class SourceGraph(Protocol):
    """Anything that carries a checked ONNX model: the admission's `AdmittedGraph`."""

    @property
    def model(self) -> onnx.ModelProto:
        """The model, at opset 20."""
        ...


@dataclass(frozen=True, slots=True)
class Node:
    """One operator application; every known attribute is present (``None``: not set, and no default)."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    @property
    def output(self) -> str:
        """The first output."""
        return self.outputs[0]

    def integer(self, attribute: str) -> int:
        """Return an integer attribute."""
        value = self.attributes[attribute]
        if not isinstance(value, int):
            raise TypeError(f"{self.op}.{attribute} is not an integer")
        return value

    def number(self, attribute: str) -> float:
        """Return a real attribute."""
        value = self.attributes[attribute]
        if not isinstance(value, int | float):
            raise TypeError(f"{self.op}.{attribute} is not a number")
        return float(value)

    def text(self, attribute: str) -> str:
        """Return a string attribute."""
        value = self.attributes[attribute]
        if not isinstance(value, str):
            raise TypeError(f"{self.op}.{attribute} is not a string")
        return value

    def integers(self, attribute: str) -> tuple[int, ...]:
        """Return a list-of-integers attribute."""
        value = self.attributes[attribute]
        if not isinstance(value, tuple):
            raise TypeError(f"{self.op}.{attribute} is not a list of integers")
        return tuple(int(v) for v in value)


@dataclass(frozen=True, eq=False, slots=True)
class BatchVector:
    """Integers that depend on the batch size B: ``static + per_batch * B``; int64 arrays of rank 0 or 1."""

    static: Array
    per_batch: Array


@dataclass(frozen=True, eq=False)
class Graph:
    """A forward graph from `IMAGE` to `LOGITS`, in topological order.

    Attributes:
        nodes: what is computed; names of values are ours, not the sender's.
        constants: weights and folded constants.
        parameters: received names of the constants that were weights (floating-point initialisers), by our
            name.
        batch_vectors: shapes that depend on the batch.
        shapes: of every value.
        dtypes: ONNX element type of every value.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    parameters: Mapping[str, str]
    batch_vectors: Mapping[str, BatchVector]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, int]


def to_opset20(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same model at opset 20, without changing the one given.

    Older models go through onnx's own adapters. Opsets 21 and 22 widened types and changed the meaning of one
    operator of our table only, GroupNormalization, which is rewritten with InstanceNormalization at every
    opset.

    Raises:
        AdmissionError: ``opset`` outside 13 to 22, or a model that the adapters can't carry over.
    """
    opset = _opset(model)
    converted = onnx.ModelProto()
    converted.CopyFrom(model)
    _rewrite_group_normalization(converted.graph, scale_per_channel=opset >= 21)
    if opset < OPSET:
        try:
            converted = version_converter.convert_version(converted, OPSET)
        except Exception as exc:  # onnx raises RuntimeError and its own C++ errors alike
            raise AdmissionError(
                "opset",
                f"The graph could not be carried over from opset {opset} to {OPSET}.",
                private=str(exc),
            ) from exc
    del converted.opset_import[:]
    converted.opset_import.append(helper.make_opsetid("", OPSET))
    return converted


def parse(source: onnx.ModelProto | SourceGraph) -> Graph:
    """Read a model with one image input and one output.

    Args:
        source: an admitted graph, or an ONNX model at opset 13 to 22. The input is float32 ``(batch, C,
            ...)``; the batch may be symbolic or any number, the other extents are static.

    Raises:
        AdmissionError: ``operator``, ``attribute``, ``opset``, ``signature``, ``shape``, ``batch`` or
            ``undefined``.
    """
    model = source if isinstance(source, onnx.ModelProto) else source.model
    model = to_opset20(model)
    received = _received_nodes(model.graph)
    image, output = _signature(model.graph)
    runs = [_specialise(model.graph, received, image, batch) for batch in _BATCHES]
    return _merge(model.graph, _without_identities(received, output), image, output, runs)


# -- reading
# ------------------------------------------------------------------------------------------------------


def _opset(model: onnx.ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        raise AdmissionError("opset", f"The graph must use one opset between {OPSETS[0]} and {OPSETS[-1]}.")
    return int(versions[0])


def _received_nodes(graph: onnx.GraphProto) -> list[Node]:
    return [Node(n.op_type, tuple(n.input), tuple(n.output), read_attributes(n)) for n in graph.node]


def _signature(graph: onnx.GraphProto) -> tuple[onnx.ValueInfoProto, str]:
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise AdmissionError("signature", "The graph must have one input (the image) and one output.")
    kind = inputs[0].type.tensor_type
    extents = kind.shape.dim
    static = all(d.HasField("dim_value") and d.dim_value > 0 for d in extents[1:])
    if kind.elem_type != TensorProto.FLOAT or len(extents) < 2 or not static:
        raise AdmissionError(
            "signature", "The graph's input must be float32 (batch, channels, ...), only the batch left open."
        )
    return inputs[0], graph.output[0].name


def _rewrite_group_normalization(graph: onnx.GraphProto, *, scale_per_channel: bool) -> None:
    """Rewrite GroupNormalization as InstanceNormalization over groups.

    Opset 18 scales each group, opset 21 each channel; both follow from the same normalised groups.
    """
    extents = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    rewritten: list[onnx.NodeProto] = []
    for index, node in enumerate(graph.node):
        if node.op_type != "GroupNormalization" or node.domain not in ("", "ai.onnx"):
            rewritten.append(node)
            continue
        attributes = read_attributes(node)
        groups, epsilon = attributes["num_groups"], attributes["epsilon"]
        x, scale, bias = node.input
        channels = extents.get(scale, ())
        if not isinstance(groups, int) or groups < 1 or len(channels) != 1:
            raise AdmissionError(
                "attribute", "The operator 'GroupNormalization' needs constant scales and groups."
            )

        def name(part: str, index: int = index) -> str:
            return f"medveil/group_normalization/{index}/{part}"

        def constant(part: str, value: Array, index: int = index) -> str:
            graph.initializer.append(numpy_helper.from_array(value, name(part, index)))
            return name(part, index)

        per_group = constant("per_group", np.array([0, groups, -1], np.int64))
        ones = constant("ones", np.ones(groups, np.float32)) if scale_per_channel else scale
        zeros = constant("zeros", np.zeros(groups, np.float32)) if scale_per_channel else bias
        parts = [
            helper.make_node("Shape", [x], [name("shape")]),
            helper.make_node("Reshape", [x, per_group], [name("groups")]),
            helper.make_node(
                "InstanceNormalization", [name("groups"), ones, zeros], [name("normalised")], epsilon=epsilon
            ),
        ]
        if scale_per_channel:
            per_channel = constant("per_channel", np.array([0, channels[0], -1], np.int64))
            last = constant("last", np.array([1], np.int64))
            parts += [
                helper.make_node("Reshape", [name("normalised"), per_channel], [name("channels")]),
                helper.make_node("Unsqueeze", [scale, last], [name("scale")]),
                helper.make_node("Unsqueeze", [bias, last], [name("bias")]),
                helper.make_node("Mul", [name("channels"), name("scale")], [name("scaled")]),
                helper.make_node("Add", [name("scaled"), name("bias")], [name("shifted")]),
            ]
        parts.append(helper.make_node("Reshape", [parts[-1].output[0], name("shape")], [node.output[0]]))
        rewritten += parts
    del graph.node[:]
    graph.node.extend(rewritten)


# -- following shapes at one batch size
# ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Run:
    """What every value is at one batch size: element type and extents, and the value itself where it is known."""

    kinds: dict[str, tuple[int, Shape]]
    values: dict[str, Array]


def _specialise(
    graph: onnx.GraphProto, nodes: Sequence[Node], image: onnx.ValueInfoProto, batch: int
) -> _Run:
    extents = (batch, *(d.dim_value for d in image.type.tensor_type.shape.dim[1:]))
    run = _Run({image.name: (TensorProto.FLOAT, extents)}, {})
    for tensor in graph.initializer:
        run.kinds[tensor.name] = (tensor.data_type, tuple(tensor.dims))
        if np.prod(tensor.dims, dtype=object) <= LARGEST_FOLDED:
            run.values[tensor.name] = numpy_helper.to_array(tensor)
    # What is computed from weights stays in the graph: a training step changes them, the runtime folds them
    # itself.
    weights = frozenset(t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims))
    for node, received in zip(nodes, graph.node, strict=True):
        if unknown := [name for name in node.inputs if name and name not in run.kinds]:
            raise AdmissionError(
                "undefined", f"A node reads a value {shown(unknown[0])!r} that nothing computes."
            )
        run.kinds.update(_infer(node, received, run))
        run.values.update(_fold(node, run, weights))
    return run


def _infer(node: Node, received: onnx.NodeProto, run: _Run) -> dict[str, tuple[int, Shape]]:
    used = [name for name in node.inputs if name]
    types = {name: helper.make_tensor_type_proto(*run.kinds[name]) for name in used}
    data = {name: numpy_helper.from_array(run.values[name], name) for name in used if name in run.values}
    try:
        inferred = shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op, OPSET, ""),
            received,
            types,
            data,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
    except Exception as exc:  # onnx raises InferenceError, ValueError and RuntimeError alike
        raise AdmissionError(
            "shape", f"The operator {shown(node.op)!r} does not fit its inputs.", private=str(exc)
        ) from exc
    kinds: dict[str, tuple[int, Shape]] = {}
    for name in filter(None, node.outputs):
        kind = inferred[name].tensor_type if name in inferred else onnx.TypeProto.Tensor()
        if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
            raise AdmissionError("shape", f"The operator {shown(node.op)!r} has a result of unknown shape.")
        kinds[name] = (kind.elem_type, tuple(d.dim_value for d in kind.shape.dim))
    return kinds


def _fold(node: Node, run: _Run, weights: frozenset[str]) -> dict[str, Array]:
    if node.op in ("Shape", "Size"):
        _, extents = run.kinds[node.inputs[0]]
        if node.op == "Size":
            return {node.output: np.array(np.prod(extents, dtype=np.int64))}
        start, end = node.attributes["start"], node.attributes["end"]
        window = (
            slice(start, end)
            if isinstance(start, int) and (end is None or isinstance(end, int))
            else slice(None)
        )
        return {node.output: np.array(extents[window], np.int64)}
    known = all(name in run.values and name not in weights for name in node.inputs if name)
    small = np.prod(run.kinds[node.output][1], dtype=object) <= LARGEST_FOLDED or node.op == "Constant"
    if not known or not small or len(node.outputs) != 1:
        return {}
    try:
        value = evaluate(node.op, node.attributes, [run.values[n] if n else None for n in node.inputs])
    except (ArithmeticError, IndexError, TypeError, ValueError) as exc:
        raise AdmissionError(
            "shape", f"The operator {shown(node.op)!r} does not fit its inputs.", private=str(exc)
        ) from exc
    return {} if value is None else {node.output: value}


def _without_identities(nodes: Sequence[Node], output: str) -> list[Node]:
    """Let every node read the original of a value that is merely passed on.

    The legacy exporter shares equal weights through Identity nodes, and onnxruntime 1.31 loses a weight that
    an Identity hands both to a batch normalisation that it fuses and to another reader.
    """
    originals: dict[str, str] = {}
    kept = []
    for node in nodes:
        node = replace(node, inputs=tuple(originals.get(name, name) for name in node.inputs))
        if node.op == "Identity" and node.output != output:
            originals[node.output] = node.inputs[0]
        else:
            kept.append(node)
    return kept


# -- leaving the batch open
# ---------------------------------------------------------------------------------------


def _merge(
    graph: onnx.GraphProto,
    nodes: Sequence[Node],
    image: onnx.ValueInfoProto,
    output: str,
    runs: Sequence[_Run],
) -> Graph:
    weights = {tensor.name: tensor for tensor in graph.initializer}
    first = runs[0]
    folded: dict[str, Array] = {}
    vectors: dict[str, BatchVector] = {}
    for node in nodes:
        values = [run.values.get(node.output) for run in runs]
        known = [value for value in values if value is not None]
        if len(known) < len(runs) or len({value.shape for value in known}) != 1:
            continue
        if all(np.array_equal(value, known[0], equal_nan=value.dtype.kind == "f") for value in known):
            folded[node.output] = known[0]
        elif known[0].dtype.kind == "i" and known[0].ndim <= 1 and (vector := _affine(known)) is not None:
            vectors[node.output] = vector
    names = _our_names(image.name, output, nodes, weights)
    gone = folded.keys() | vectors.keys()
    kept = _needed([node for node in nodes if node.output not in gone], output)
    if unusable := [node for node in kept if node.op in FOLDED]:
        raise AdmissionError("operator", f"medveil has no derivative for the operator {unusable[0].op!r}.")
    used = {name for node in kept for name in node.inputs if name} | {output}
    if output in gone or image.name not in used:
        raise AdmissionError("signature", "The graph's output does not depend on its image.")
    shapes = {
        names[name]: _open_batch([run.kinds[name][1] for run in runs])
        for name in names
        if name in first.kinds
    }
    return Graph(
        nodes=tuple(
            _explicit_window(
                replace(
                    node,
                    inputs=tuple(names[n] if n else "" for n in node.inputs),
                    outputs=tuple(names[n] if n else "" for n in node.outputs),
                ),
                shapes,
            )
            for node in kept
        ),
        constants={
            names[name]: folded[name] if name in folded else numpy_helper.to_array(weights[name])
            for name in sorted(used)
            if name in folded or name in weights
        },
        parameters={
            names[name]: name
            for name in sorted(used & weights.keys())
            if weights[name].data_type == TensorProto.FLOAT
        },
        batch_vectors={names[name]: vectors[name] for name in sorted(used & vectors.keys())},
        shapes=shapes,
        dtypes={names[name]: first.kinds[name][0] for name in names if name in first.kinds},
    )


def _affine(values: Sequence[Array]) -> BatchVector | None:
    (low, high, *_), (first, second, *_) = _BATCHES, [value.astype(np.int64) for value in values]
    per_batch = (second - first) // (high - low)
    static = first - low * per_batch
    fits = all(np.array_equal(static + b * per_batch, v) for b, v in zip(_BATCHES, values, strict=True))
    return BatchVector(static, per_batch) if fits else None


def _open_batch(extents: Sequence[Shape]) -> Shape:
    shape = []
    for sizes in zip(*extents, strict=True):
        if len(set(sizes)) == 1:
            shape.append(sizes[0])
        elif all(size * _BATCHES[0] == sizes[0] * batch for size, batch in zip(sizes, _BATCHES, strict=True)):
            shape.append(-(sizes[0] // _BATCHES[0]))
        else:
            raise AdmissionError(
                "batch", "The graph computes a size that does not follow the batch in proportion."
            )
    return tuple(shape)


def _our_names(
    image: str, output: str, nodes: Sequence[Node], weights: Mapping[str, TensorProto]
) -> dict[str, str]:
    """Name every value ourselves, so that nothing received can collide with what is added later."""
    names = {name: f"weight/{name}" for name in weights}
    computed = [name for node in nodes for name in node.outputs if name]
    names |= {name: f"forward/{index}" for index, name in enumerate(computed)}
    if len(names) != len(computed) + len(weights) or image in names or output not in computed:
        raise AdmissionError("undefined", "A value of the graph is defined twice, or its output never.")
    return names | {image: IMAGE, output: LOGITS}


def _needed(nodes: Sequence[Node], output: str) -> list[Node]:
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]


# -- windows of convolutions and pools
# ------------------------------------------------------------------------------


def _explicit_window(node: Node, shapes: Mapping[str, Shape]) -> Node:
    """Write out kernel, strides, dilations and pads, so that no rule has to know the defaults."""
    if "auto_pad" not in node.attributes:
        return node
    x, y = shapes[node.inputs[0]][2:], shapes[node.output][2:]
    given = node.attributes
    kernel = given["kernel_shape"] or shapes[node.inputs[1]][2:]
    if not isinstance(kernel, tuple) or min((*x, *y), default=1) < 1:
        raise AdmissionError("shape", f"The operator {node.op!r} needs static rows and columns.")
    axes = len(kernel)
    strides, dilations = given["strides"] or (1,) * axes, given["dilations"] or (1,) * axes
    explicit: dict[str, Attribute] = {
        "kernel_shape": kernel,
        "strides": strides,
        "dilations": dilations,
        "auto_pad": "NOTSET",
    }
    if node.op == "ConvTranspose":
        explicit["output_padding"] = given["output_padding"] or (0,) * axes
        explicit["output_shape"] = None
    window = replace(node, attributes={**given, **explicit})
    if given["auto_pad"] == "NOTSET" and not given.get("output_shape"):
        pads = given["pads"] or (0,) * (2 * axes)
    else:
        pads = _automatic_pads(window, x, y, str(given["auto_pad"]))
    return replace(window, attributes={**window.attributes, "pads": pads})


def _automatic_pads(node: Node, x: Shape, y: Shape, rule: str) -> Shape:
    """Return the pads that ``auto_pad`` or ``output_shape`` mean (ONNX operator text of Conv and ConvTranspose)."""
    kernel, strides, dilations = (node.integers(a) for a in ("kernel_shape", "strides", "dilations"))
    totals = []
    for axis, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True)):
        span = d * (k - 1) + 1
        if node.op == "ConvTranspose":
            extra = node.integers("output_padding")[axis]
            totals.append(max(0, s * (x[axis] - 1) + extra + span - y[axis]))
        else:
            totals.append(0 if rule == "VALID" else max(0, (y[axis] - 1) * s + span - x[axis]))
    # An odd pixel goes to the end for SAME_UPPER and, in ConvTranspose, for every rule but SAME_UPPER the
    # other way.
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small, strict=True)]
    begin_small = rule == "SAME_UPPER"
    return tuple(small + large) if begin_small else tuple(large + small)
