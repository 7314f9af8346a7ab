"""Which foreign graphs medveil is willing to read at all, and why not the others.

A received graph is never executed. It is read as data, held against the rules below (each has its own error
code), measured, and re-emitted from our own operator table; only that second graph is differentiated and run.
The order matters: what can be decided from what the bytes *claim* (a size, a type, a shape) is decided before
memory is taken for the claim, and before onnx's C++ code (checker, converter, shape inference) sees a word of
it. Checker and converter never see the weights: they work on a skeleton in which large tensors are declared.

Call :func:`medveil.models.autodiff.sandbox.admit_in_child` for bytes that came from elsewhere; :func:`admit`
is what runs inside that child.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from medveil.models.autodiff.graph import IMAGE, LOGITS, OPSETS, Graph, Node, Shape, parse, to_opset20
from medveil.models.autodiff.operators import OPERATORS, shown
from medveil.models.errors import AdmissionError

__all__ = ["AdmittedGraph", "Limits", "Role", "admit"]

Role = Literal["surrogate", "generator"]
"""``surrogate``: image -> class scores; ``generator``: image (and target) -> perturbation like the image."""

_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The largest graph that is admitted.

    The defaults are our choice: above the largest surrogates we expect (ViT-B: 330 MiB, 35 GFLOP; a U-Net of
    width 16 at 512 px: 190 MiB of values), and small enough for a site's workstation.

    Attributes:
        file_bytes: size of the received file.
        nodes: operators in the graph.
        tensor_bytes: one initialiser, or one value computed for one image.
        tensor_rank: axes of a tensor.
        activation_bytes: all values computed for one image, without reuse of memory.
        flops: floating-point operations for one image (forward).
        metadata_bytes: documentation and metadata strings, which torch writes and nobody here reads.
        text_bytes: one name or one string attribute.
    """

    file_bytes: int = 512 * _MIB
    nodes: int = 20_000
    tensor_bytes: int = 256 * _MIB
    tensor_rank: int = 8
    activation_bytes: int = 1024 * _MIB
    flops: int = 10**12
    metadata_bytes: int = 16 * _MIB
    text_bytes: int = 1024


@dataclass(frozen=True, eq=False)
class AdmittedGraph:
    """A foreign graph that passed every rule.

    Attributes:
        model: the validated graph; opset 20, domain ai.onnx only, no external data, batch symbolic on axis 0.
        input_shape: shape of one image, ``(C, ...)``, without the batch axis.
        output_shape: shape of one image's output: ``(K,)``, ``(K, rows, columns)``, or a generator's image.
        operators: operator types in use, sorted.
        parameters: number of elements in all floating-point initialisers.
        flops: floating-point operations of one image's forward pass (a multiply-add counts as two).
        activation_bytes: bytes of all values that one image's forward pass computes, without reuse of memory.
        target_shape: shape of one image's target, for a generator that takes it too; else ``None``.
    """

    model: ModelProto
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    operators: tuple[str, ...]
    parameters: int
    flops: int
    activation_bytes: int
    target_shape: tuple[int, ...] | None = None


def admit(data: bytes, limits: Limits | None = None, *, role: Role = "surrogate") -> AdmittedGraph:
    """Hold a received graph against every admission rule and return it, validated and measured.

    Args:
        data: the bytes of an ONNX ``ModelProto``.
        limits: the largest graph to admit.
        role: which inputs and outputs the graph must have.

    Raises:
        AdmissionError: the graph breaks a rule; ``code`` names it. Besides the codes of this file:
            ``operator``, ``attribute``, ``shape`` and ``batch`` from :mod:`medveil.models.autodiff.graph`.
    """
    limits = limits or Limits()
    model = _parse(data, limits)
    opset = _check_model(model, limits)
    _check_nodes(model.graph, opset, limits)
    _check_initialisers(model.graph, limits)
    _check_names(model.graph, limits)
    image, target = _check_signature(model.graph, role)
    if target is not None:
        _with_one_input(model.graph, image, target)

    model = _at_opset20(model)
    graph = parse(
        model
    )  # refuses what has no derivative, sizes that aren't fixed, images that see each other
    _check_constants(graph)
    activation_bytes = _activation_bytes(graph, limits)
    flops = _flops(graph, limits)
    _check_batch_axes(graph)
    output = _check_output(image, graph.shapes[LOGITS], role)

    return AdmittedGraph(
        model=model,
        input_shape=image,
        output_shape=output,
        operators=tuple(sorted({node.op for node in graph.nodes})),
        parameters=sum(graph.constants[name].size for name in graph.parameters),
        flops=flops,
        activation_bytes=activation_bytes,
        target_shape=target,
    )


# --- 1. The file --------------------------------------------------------------------------------------------


def _refuse(code: str, public: str, private: str = "") -> NoReturn:
    raise AdmissionError(code, public, private=private)


def _parse(data: bytes, limits: Limits) -> ModelProto:
    if len(data) > limits.file_bytes:
        _refuse(
            "file-size",
            f"The graph file is larger than {limits.file_bytes // _MIB} MiB; ship a smaller model.",
        )
    if data[4:8] == b"ORTM":  # the FlatBuffers file identifier of onnxruntime's own format
        _refuse("ort-format", "The graph is in onnxruntime's private format; export it as ONNX.")
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as exc:
        raise AdmissionError("unparsable", "The graph file is damaged or not ONNX; export it again.") from exc
    if not model.HasField("graph"):
        _refuse("unparsable", "The file holds no graph; export the model again.")
    return model


def _check_model(model: ModelProto, limits: Limits) -> int:
    """Check what lies beside the graph and return its opset."""
    if model.functions:
        _refuse("functions", "The graph defines functions of its own; inline them before export.")
    if model.training_info:
        _refuse("training-info", "The graph carries training information; export it for inference.")
    if model.graph.sparse_initializer:
        _refuse("sparse", "The graph holds sparse tensors; export dense weights.")
    if model.graph.quantization_annotation:
        _refuse("quantization", "The graph is quantised; export it in float32.")
    if _metadata_bytes(model) > limits.metadata_bytes:
        _refuse(
            "metadata-size",
            f"The graph carries over {limits.metadata_bytes // _MIB} MiB of metadata; strip it.",
        )
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        _refuse(
            "ir-version", f"The graph's IR version is not one of 3 to {onnx.IR_VERSION}; export it again."
        )
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            _refuse(
                "domain",
                f"The graph imports operators of {shown(entry.domain)!r}; export plain ai.onnx ones.",
            )
    if len(model.opset_import) != 1 or model.opset_import[0].version not in OPSETS:
        oldest, newest = OPSETS[0], OPSETS[-1]
        _refuse("opset", f"The graph must name one opset from {oldest} to {newest}; export it again.")
    return int(model.opset_import[0].version)


def _metadata_bytes(model: ModelProto) -> int:
    graph = model.graph
    parts: list[ModelProto | GraphProto | NodeProto | TensorProto | ValueInfoProto] = [model, graph]
    parts += [*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]
    return sum(
        len(part.doc_string) + sum(entry.ByteSize() for entry in part.metadata_props) for part in parts
    )


# --- 2. Nodes -----------------------------------------------------------------------------------------------

_CONTROL_FLOW: Final = frozenset({"If", "Loop", "Scan", "SequenceMap"})


def _check_nodes(graph: GraphProto, opset: int, limits: Limits) -> None:
    if len(graph.node) > limits.nodes:
        _refuse("node-count", f"The graph has more than {limits.nodes} nodes; ship a smaller model.")
    for node in graph.node:
        name = shown(node.op_type)
        if node.domain not in ("", "ai.onnx"):
            _refuse(
                "domain", f"Operator {name!r} is of domain {shown(node.domain)!r}; only ai.onnx is admitted."
            )
        if node.overload:
            _refuse("functions", f"Operator {name!r} calls a function of the graph; inline it before export.")
        if node.op_type in _CONTROL_FLOW or any(_holds_graph(attribute) for attribute in node.attribute):
            _refuse("subgraph", f"Operator {name!r} holds a subgraph; export the model without control flow.")
        for attribute in node.attribute:
            _check_attribute(name, attribute, limits)
    _check_operators(graph.node, opset)


def _holds_graph(attribute: AttributeProto) -> bool:
    return attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) or bool(
        attribute.HasField("g") or attribute.graphs
    )


def _check_attribute(operator: str, attribute: AttributeProto, limits: Limits) -> None:
    """Check what an attribute holds; whether the operator may have it is a matter of its schema."""
    if attribute.ref_attr_name:
        _refuse(
            "functions", f"Operator {operator!r} refers to a function's attribute; inline it before export."
        )
    if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
        _refuse("sparse", f"Operator {operator!r} holds a sparse tensor; export dense weights.")
    if any(len(text) > limits.text_bytes for text in (attribute.s, *attribute.strings)):
        _refuse("text-size", f"A string of operator {operator!r} is longer than {limits.text_bytes} bytes.")
    for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
        _check_tensor(tensor, limits)


def _check_operators(nodes: Iterable[NodeProto], opset: int) -> None:
    """Hold each node against the closed operator set and the standard's schema at its opset.

    Our own attribute table follows once the graph is at opset 20, in ``graph.parse``.
    """
    for node in nodes:
        name = shown(node.op_type)
        if node.op_type not in OPERATORS:
            _refuse("operator", f"medveil has no derivative for the operator {name!r}.")
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError as exc:
            raise AdmissionError("operator", f"Operator {name!r} does not exist in opset {opset}.") from exc
        for attribute in node.attribute:
            known = schema.attributes.get(attribute.name)
            if known is None or known.type.value != attribute.type:  # type: ignore[attr-defined]
                _refuse(
                    "attribute", f"Operator {name!r} has no attribute {shown(attribute.name)!r} of that type."
                )
        if len({attribute.name for attribute in node.attribute}) != len(node.attribute):
            _refuse("attribute", f"Operator {name!r} repeats an attribute.")
        inputs_fit = schema.min_input <= len(node.input) <= schema.max_input
        if not (inputs_fit and schema.min_output <= len(node.output) <= schema.max_output):
            _refuse("arity", f"Operator {name!r} has the wrong number of inputs or outputs.")


# --- 3. Tensors ---------------------------------------------------------------------------------------------

_FLOATING: Final = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE})

# Data type -> bytes per element, and the field that holds elements when raw_data does not.
_TYPES: Final[Mapping[int, tuple[int, str]]] = {
    TensorProto.FLOAT: (4, "float_data"),
    TensorProto.DOUBLE: (8, "double_data"),
    TensorProto.INT32: (4, "int32_data"),
    TensorProto.INT64: (8, "int64_data"),
    TensorProto.BOOL: (1, "int32_data"),
}
_TYPED_FIELDS: Final = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")


def _check_initialisers(graph: GraphProto, limits: Limits) -> None:
    for tensor in graph.initializer:
        _check_tensor(tensor, limits)


def _check_tensor(tensor: TensorProto, limits: Limits) -> None:
    name = shown(tensor.name)
    # One rule for `..`, absolute paths, symlinks and hard links: a graph that names any file is refused.
    if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
        _refuse("external-data", "The graph keeps weights in another file; save it as one file.")
    if tensor.data_type == TensorProto.STRING or tensor.string_data:
        _refuse("string-tensor", f"Tensor {name!r} holds text.")
    if tensor.data_type not in _TYPES:
        _refuse("tensor-type", f"Tensor {name!r} is not float32, float64, int32, int64 or bool.")
    if len(tensor.dims) > limits.tensor_rank:
        _refuse("tensor-rank", f"Tensor {name!r} has more than {limits.tensor_rank} axes.")
    if any(dim < 0 for dim in tensor.dims) or tensor.HasField("segment"):
        _refuse("tensor-shape", f"Tensor {name!r} has a negative size or is only a segment.")
    item_bytes, field = _TYPES[tensor.data_type]
    count = math.prod(tensor.dims)
    if count * item_bytes > limits.tensor_bytes:
        _refuse("tensor-bomb", f"Tensor {name!r} claims more than {limits.tensor_bytes // _MIB} MiB.")
    typed = [other for other in _TYPED_FIELDS if len(getattr(tensor, other))]
    raw = tensor.raw_data if tensor.HasField("raw_data") else None
    held = count * item_bytes == len(raw) if raw is not None else count == len(getattr(tensor, field))
    if not held or typed not in ([], [field]) or (typed and raw is not None):
        _refuse("raw-data-length", f"Tensor {name!r} does not hold as many elements as its shape says.")
    if tensor.data_type in _FLOATING and not _finite(tensor, raw):
        _refuse(
            "non-finite-weights", f"Tensor {name!r} holds NaN or infinity; train or export the model again."
        )


def _finite(tensor: TensorProto, raw: bytes | None) -> bool:
    if raw is None:
        return all(math.isfinite(x) for x in (*tensor.float_data, *tensor.double_data))
    kind = "<f4" if tensor.data_type == TensorProto.FLOAT else "<f8"
    values = np.frombuffer(raw, kind)
    # In slices: isfinite of the whole tensor would take a quarter of its size once more.
    return all(np.isfinite(values[i : i + _MIB]).all() for i in range(0, len(values), _MIB))


# --- 4. Names and signature ---------------------------------------------------------------------------------


def _fed_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """Return the inputs a caller feeds; before IR version 4 initialisers are listed among the inputs too."""
    initialisers = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in initialisers]


def _check_names(graph: GraphProto, limits: Limits) -> None:
    """Check that every value has one name and one origin, before its first use."""
    origins = [tensor.name for tensor in graph.initializer] + [value.name for value in _fed_inputs(graph)]
    computed = [name for node in graph.node for name in node.output if name]
    if len({*origins, *computed}) != len(origins) + len(computed):
        _refuse("duplicate-name", "Two values of the graph have the same name; export the model again.")
    if any(not name or len(name) > limits.text_bytes for name in (*origins, *computed)):
        _refuse("text-size", f"A value's name is empty or longer than {limits.text_bytes} characters.")
    known, later = set(origins), set(computed)
    for node in graph.node:
        for name in filter(None, node.input):
            if name not in known:
                if name in later:
                    _refuse(
                        "node-order", "The graph is cyclic or its nodes are out of order; export it again."
                    )
                _refuse(
                    "undefined-name", f"Operator {shown(node.op_type)!r} reads a value that nothing computes."
                )
        known.update(node.output)
    if any(value.name not in later for value in graph.output):
        _refuse("undefined-name", "The graph's output is not computed by any of its nodes.")


def _dims(value: ValueInfoProto) -> tuple[int, ...]:
    """Return the declared dimensions, 0 for a symbolic or missing one."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _check_signature(graph: GraphProto, role: Role) -> tuple[Shape, Shape | None]:
    """Return the shapes of one image and, for a generator that takes it, of one target."""
    inputs, outputs = _fed_inputs(graph), list(graph.output)
    allowed_inputs = (1,) if role == "surrogate" else (1, 2)
    if len(inputs) not in allowed_inputs or len(outputs) != 1:
        wanted = "one input" if role == "surrogate" else "an image (and a target) as input"
        _refuse("signature", f"A {role} must have {wanted} and one output; export it so.")
    for value in (*inputs, *outputs):
        tensor = value.type.tensor_type if value.type.HasField("tensor_type") else None
        if tensor is None or tensor.elem_type != TensorProto.FLOAT:
            _refuse("signature", f"A {role}'s inputs and output must be float32 tensors.")
    if any(not value.type.tensor_type.shape.dim or _dims(value)[0] for value in inputs):
        _refuse("signature", "The batch axis must be dynamic; export the model with a symbolic first axis.")
    image, *targets = (_dims(value)[1:] for value in inputs)
    if any(extent < 1 for shape in (image, *targets) for extent in shape):
        _refuse("signature", "Every axis but the batch must have a fixed size; export the model so.")
    if not 2 <= len(image) <= 4:
        _refuse(
            "signature", f"A {role}'s image must have the axes batch, channels and one to three in space."
        )
    if not targets:
        return image, None
    if len(targets[0]) < 1 or targets[0][1:] not in ((), image[1:]):
        _refuse(
            "signature",
            "A generator's target must be (batch, classes), or a mask of the image's size per class.",
        )
    return image, targets[0]


def _check_output(image: Shape, output: Shape, role: Role) -> Shape:
    """Return the shape of one image's output."""
    batch, *rest = output or (0,)
    shape = tuple(rest)
    if batch != -1 or any(extent < 1 for extent in shape):
        _refuse(
            "batch", "The output must have the batch, and only it, as its first axis; export the model so."
        )
    if role == "generator" and shape != image:
        _refuse("signature", "A generator's output must have the shape of its image.")
    if role == "surrogate" and (not shape or shape[0] < 2 or shape[1:] not in ((), image[1:])):
        _refuse("signature", "A surrogate must score at least two classes, per image or per pixel.")
    return shape


# --- 5. One input for every graph ---------------------------------------------------------------------------


def _with_one_input(graph: GraphProto, image: Shape, target: Shape) -> None:
    """Let a generator that takes the target too read both from one input: target planes follow the image's.

    The rest of ``autodiff`` knows graphs of one input only. A class target ``(K,)`` is K constant planes, of
    which the first pixel is read back.
    """
    names = [value.name for value in _fed_inputs(graph)]
    packed = "medveil/packed"
    channels, space = image[0], image[1:]
    constants = {
        "zero": [0],
        "one": [1],
        "channels": [channels],
        "end": [channels + target[0]],
        "origin": [0] * len(space),
        "pixel": [1] * len(space),
        "space": list(range(2, 2 + len(space))),
    }
    for part, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), f"{packed}/{part}"))

    def cut(source: str, result: str, start: str, end: str, axes: str) -> NodeProto:
        return onnx.helper.make_node(
            "Slice", [source, *(f"{packed}/{p}" for p in (start, end, axes))], [result]
        )

    prologue = [cut(packed, names[0], "zero", "channels", "one")]
    if target[1:] == space:
        prologue.append(cut(packed, names[1], "channels", "end", "one"))
    else:
        prologue.append(cut(packed, f"{packed}/planes", "channels", "end", "one"))
        prologue.append(cut(f"{packed}/planes", f"{packed}/first", "origin", "pixel", "space"))
        prologue.append(onnx.helper.make_node("Flatten", [f"{packed}/first"], [names[1]], axis=1))
    body = list(graph.node)
    del graph.node[:], graph.input[:]
    graph.node.extend([*prologue, *body])
    dims: list[str | int | None] = ["batch", channels + target[0], *space]
    graph.input.append(onnx.helper.make_tensor_value_info(packed, TensorProto.FLOAT, dims))


# --- 6. Through onnx's C++ code, without the weights --------------------------------------------------------

_SKELETON_ELEMENTS: Final = 1 << 16
"""Tensors up to this size stay in the skeleton: shapes, axes, pads and scales that the converter reads."""


def _at_opset20(model: ModelProto) -> ModelProto:
    """Check the model's structure with onnx and convert it; large weights are put aside meanwhile.

    Shapes and texts that came with the graph are forgotten here: what they claim is inferred anew.
    """
    skeleton, weights = _split(model)
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as exc:
        raise AdmissionError(
            "invalid", "The graph is not valid ONNX; export it again.", private=str(exc)
        ) from exc
    converted = to_opset20(skeleton)
    put_aside = {tensor.name for tensor in weights}
    fed = [value for value in converted.graph.input if value.name not in put_aside]
    del converted.graph.input[:]
    converted.graph.input.extend(fed)
    converted.graph.initializer.extend(weights)
    return converted


def _split(model: ModelProto) -> tuple[ModelProto, list[TensorProto]]:
    """Return a skeleton, in which large initialisers are declared as inputs, and those initialisers."""
    source = model.graph
    weights = [tensor for tensor in source.initializer if math.prod(tensor.dims) > _SKELETON_ELEMENTS]
    skeleton = ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    graph = skeleton.graph
    graph.name = "admitted"
    graph.input.extend(
        onnx.helper.make_tensor_value_info(value.name, TensorProto.FLOAT, ["batch", *_dims(value)[1:]])
        for value in _fed_inputs(source)
    )
    graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights)
    graph.initializer.extend(t for t in source.initializer if math.prod(t.dims) <= _SKELETON_ELEMENTS)
    graph.node.extend(source.node)
    for part in (*graph.node, *graph.initializer):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    graph.output.extend(
        onnx.helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [None] * len(_dims(value)))
        for value in source.output
    )
    return skeleton, weights


# --- 7. What running it would cost --------------------------------------------------------------------------


def _for_one(shape: Shape) -> Shape:
    """Return a shape for a batch of one image (a negative extent ``-k`` is k times the batch)."""
    return tuple(abs(extent) for extent in shape)


def _check_batch_axes(graph: Graph) -> None:
    """Refuse a graph that sums or compares images: what depends on them must follow the batch, along one axis.

    Mixing that leaves the shape alone (a softmax along the batch) is found by the session's self-check.
    """
    follows = {IMAGE}
    for node in graph.nodes:
        if follows.isdisjoint(node.inputs):
            continue
        for name in filter(None, node.outputs):
            if sum(extent < 0 for extent in graph.shapes[name]) != 1:
                _refuse(
                    "batch",
                    f"{node.op!r} mixes the images of a batch; each image must be worked on by itself.",
                )
            follows.add(name)


def _check_constants(graph: Graph) -> None:
    """Refuse index arithmetic near the edge of int64, where sizes wrap around and later checks would lie."""
    for value in graph.constants.values():
        if value.dtype.kind == "i" and value.size:
            plain = value[(value > _INT64.min + 1) & (value != _INT64.max)]
            if plain.size and max(int(plain.max()), -int(plain.min())) > _LARGEST_INDEX:
                _refuse("tensor-bomb", "The graph computes with a size no tensor can have.")


_INT64: Final = np.iinfo(np.int64)  # its extremes are what exporters write for "to the end" in Slice
_LARGEST_INDEX: Final = (
    1 << 31
)  # above any admitted extent; the product with an admitted size still fits int64


def _activation_bytes(graph: Graph, limits: Limits) -> int:
    """Return the bytes of all values computed for one image; none of them exists yet."""
    total = 0
    for node in graph.nodes:
        for name in filter(None, node.outputs):
            shape = _for_one(graph.shapes[name])
            if len(shape) > limits.tensor_rank:
                _refuse("tensor-rank", f"A value of the graph has more than {limits.tensor_rank} axes.")
            if 0 in shape:
                _refuse("shape", f"What {node.op!r} computes is empty; export the model again.")
            size_bytes = math.prod(shape) * _item_bytes(graph.dtypes[name])
            if size_bytes > limits.tensor_bytes:
                public = f"What {node.op!r} computes takes over {limits.tensor_bytes // _MIB} MiB per image."
                _refuse("tensor-bomb", f"{public} Ship a smaller model.")
            total += size_bytes
    if total > limits.activation_bytes:
        _refuse("activation-limit", f"The graph takes over {limits.activation_bytes // _MIB} MiB per image.")
    return total


def _item_bytes(data_type: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _flops(graph: Graph, limits: Limits) -> int:
    total = sum(_node_flops(node, graph) for node in graph.nodes)
    if total > limits.flops:
        _refuse(
            "flops-limit",
            f"The graph needs over {limits.flops:.0e} operations per image; ship a smaller model.",
        )
    return total


def _node_flops(node: Node, graph: Graph) -> int:
    """Count one node's floating-point operations for one image, from shapes alone (a multiply-add is two)."""
    shapes = [_for_one(graph.shapes[name]) if name else () for name in node.inputs]
    output = math.prod(_for_one(graph.shapes[node.output]))
    match node.op:
        case "Conv":
            return 2 * output * math.prod(shapes[1][1:])
        case "ConvTranspose":
            return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])
        case "Gemm":
            return 2 * output * shapes[0][0 if node.integer("transA") else 1]
        case "MatMul":
            return 2 * output * shapes[0][-1]
        case "Einsum":
            return 2 * _einsum_points(node.text("equation"), shapes)
        case "AveragePool" | "MaxPool":
            return output * math.prod(node.integers("kernel_shape"))
    return max([output, *map(math.prod, shapes)])


def _einsum_points(equation: str, operands: list[Shape]) -> int:
    """Return the number of points an Einsum visits, at most: the product of all its labels' extents."""
    extents: dict[str, int] = {}
    ellipsis = 1
    for term, shape in zip(equation.split("->")[0].replace(" ", "").split(","), operands, strict=False):
        head, dots, tail = term.partition("...")
        ellipsis = max(ellipsis, math.prod(shape[len(head) : len(shape) - len(tail)]) if dots else 1)
        labelled = (*zip(head, shape, strict=False), *zip(reversed(tail), reversed(shape), strict=False))
        for label, extent in labelled:
            extents[label] = max(extent, extents.get(label, 1))
    return ellipsis * math.prod(extents.values())
