"""The closed set of operators, and every attribute medveil knows of each.

A received node is never copied: its attributes are read against this table and written again from it. Types
and default values are those of the ONNX standard at opset 20; the table only says which attributes exist for
us and which of their values we can work with. What isn't here is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx

from medveil.models.errors import AdmissionError

__all__ = [
    "FOLDED",
    "OPERATORS",
    "OPSET",
    "ZERO_DERIVATIVE",
    "Attribute",
    "Operator",
    "read_attributes",
    "shown",
]

OPSET = 20
"""The opset every graph is converted to and emitted in: the newest whose adapters reach down to 13 without loss."""

Attribute: TypeAlias = int | float | str | tuple[int, ...] | tuple[float, ...] | onnx.TensorProto | None
"""An attribute's value; ``None`` where the standard has no default and the node doesn't say."""

_SHOWN_CHARACTERS = 40  # our choice: longer than any operator's name, too short to carry a text


def shown(name: str) -> str:
    """Return a received name fit for a public sentence: printable ASCII without spaces, cut to 40 characters."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._:/-") else "?" for c in name)[
        :_SHOWN_CHARACTERS
    ]


@dataclass(frozen=True, slots=True)
class Operator:
    """What medveil knows of one operator.

    Attributes:
        defaults: every known attribute and its default.
        required: attributes that a node must carry.
        allowed: for some attributes, the only values we can work with.
    """

    defaults: Mapping[str, Attribute]
    required: frozenset[str] = frozenset()
    allowed: Mapping[str, tuple[Attribute, ...]] = field(default_factory=dict)


_DIFFERENTIABLE = """
    Abs Add Clip Cos Div Erf Exp HardSwish Identity Log Max Mean Min Mish Mul Neg Pow PRelu Reciprocal Relu
    Sigmoid
        Sin Softplus Softsign Sqrt Sub Sum Tanh Where:
    Celu Elu LeakyRelu: alpha
    Cast: saturate to
    CastLike: saturate
    Dropout: seed
    Gelu: approximate
    HardSigmoid: alpha beta
    Selu: alpha gamma

    Einsum: equation
    Gemm: alpha beta transA transB
    MatMul:

    Conv: auto_pad dilations group kernel_shape pads strides
    ConvTranspose: auto_pad dilations group kernel_shape output_padding output_shape pads strides
    AveragePool: auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides
    MaxPool: auto_pad ceil_mode dilations kernel_shape pads storage_order strides
    GlobalAveragePool GlobalMaxPool:
    Resize: antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside extrapolation_value
        keep_aspect_ratio_policy mode nearest_mode

    BatchNormalization: epsilon momentum training_mode
    GroupNormalization: epsilon num_groups stash_type
    InstanceNormalization: epsilon
    LayerNormalization: axis epsilon stash_type
    LogSoftmax Softmax: axis
    LpNormalization: axis p

    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare:
        keepdims noop_with_empty_axes
    CumSum: exclusive reverse

    Expand Slice Squeeze Tile Unsqueeze:
    Concat Flatten Gather GatherElements: axis
    DepthToSpace: blocksize mode
    GatherND: batch_dims
    Pad: mode
    Reshape: allowzero
    SpaceToDepth: blocksize
    Split: axis num_outputs
    Transpose: perm
    Trilu: upper
"""

_ZERO_DERIVATIVE = """
    And Ceil Equal Floor Greater GreaterOrEqual IsNaN Less LessOrEqual Not Or Range Round Sign Size Xor:
    ArgMax ArgMin: axis keepdims select_last_index
    Constant: value value_float value_floats value_int value_ints
    ConstantOfShape: value
    IsInf: detect_negative detect_positive
    Shape: end start
"""

_SHAPE_ARITHMETIC = """
    Mod: fmod
    ReduceProd: keepdims noop_with_empty_axes
"""


def _rows(table: str) -> dict[str, list[str]]:
    """Read a table ``operators: attributes``; deeper lines continue the one above."""
    rows: dict[str, list[str]] = {}
    for line in re.sub(r"\n {8,}", " ", table).strip().splitlines():
        names, _, attributes = line.partition(":")
        rows |= {name: attributes.split() for name in names.split()}
    return rows


ZERO_DERIVATIVE = frozenset(_rows(_ZERO_DERIVATIVE))
"""Operators that pass nothing back: piecewise constant, or about shapes."""

FOLDED = frozenset(_rows(_SHAPE_ARITHMETIC))
"""Operators known only in arithmetic on constants and shapes, where they are computed once and disappear."""

_ALLOWED: dict[str, dict[str, tuple[Attribute, ...]]] = {
    "MaxPool": {"storage_order": (0,)},  # column-major indices: written by no exporter
    "Resize": {
        "antialias": (0,),
        "exclude_outside": (0,),
        "keep_aspect_ratio_policy": ("stretch",),
        "coordinate_transformation_mode": (
            "align_corners",
            "asymmetric",
            "half_pixel",
            "half_pixel_symmetric",
            "pytorch_half_pixel",
        ),
        "mode": ("nearest", "linear", "cubic"),
    },
    "BatchNormalization": {"training_mode": (0,)},  # a surrogate is shipped in evaluation mode
    "GatherND": {"batch_dims": (0,)},
    "LayerNormalization": {"stash_type": (onnx.TensorProto.FLOAT,)},
    "GroupNormalization": {"stash_type": (onnx.TensorProto.FLOAT,)},
    "LpNormalization": {"p": (1, 2)},
    "Pad": {"mode": ("constant", "edge", "reflect", "wrap")},
    "Gelu": {"approximate": ("none", "tanh")},
    "DepthToSpace": {"mode": ("DCR", "CRD")},
}

# Attributes that opset 20 doesn't have yet; they mean the same in the opset they come from.
_NEWER: dict[tuple[str, str], Attribute] = {("GroupNormalization", "stash_type"): onnx.TensorProto.FLOAT}


def _operator(name: str, attributes: Iterable[str]) -> Operator:
    schema = onnx.defs.get_schema(name, OPSET, "")
    defaults: dict[str, Attribute] = {}
    required = set()
    for attribute in attributes:
        if (name, attribute) in _NEWER:
            defaults[attribute] = _NEWER[name, attribute]
            continue
        known = schema.attributes[attribute]
        defaults[attribute] = _value(known.default_value) if known.default_value.name else None
        if known.required:
            required.add(attribute)
    return Operator(defaults, frozenset(required), _ALLOWED.get(name, {}))


def _value(attribute: onnx.AttributeProto) -> Attribute:
    kind = onnx.AttributeProto
    match attribute.type:
        case kind.INT:
            return attribute.i
        case kind.FLOAT:
            return attribute.f
        case kind.STRING:
            return attribute.s.decode("ascii", errors="replace")
        case kind.INTS:
            return tuple(attribute.ints)
        case kind.FLOATS:
            return tuple(attribute.floats)
        case kind.TENSOR:
            return attribute.t
    raise AdmissionError(
        "attribute", f"An operator's attribute {shown(attribute.name)!r} has a type medveil doesn't read."
    )


OPERATORS: Mapping[str, Operator] = {
    name: _operator(name, attributes)
    for name, attributes in sorted(_rows(_DIFFERENTIABLE + _ZERO_DERIVATIVE + _SHAPE_ARITHMETIC).items())
}
"""Every operator a graph may hold, by name (domain ``ai.onnx``)."""


def read_attributes(node: onnx.NodeProto) -> dict[str, Attribute]:
    """Read a received node's attributes against the table, defaults filled in.

    Raises:
        AdmissionError: ``operator`` for an operator that isn't in the table, ``attribute`` for an unknown,
            missing, repeated or wrongly typed attribute, or a value that we can't work with.
    """
    name = shown(node.op_type)
    operator = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if operator is None:
        raise AdmissionError("operator", f"medveil has no derivative for the operator {name!r}.")
    values = dict(operator.defaults)
    seen: set[str] = set()
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    for attribute in node.attribute:
        label = f"attribute {shown(attribute.name)!r} of operator {name!r}"
        if attribute.name not in values or attribute.ref_attr_name:
            raise AdmissionError("attribute", f"The {label} is not one that medveil knows.")
        known = schema.attributes.get(attribute.name)
        expected = known.type if known is not None else onnx.AttributeProto.INT
        if attribute.name in seen or attribute.type != expected:
            raise AdmissionError("attribute", f"The {label} is repeated or of the wrong type.")
        seen.add(attribute.name)
        value = _value(attribute)
        if attribute.name in operator.allowed and value not in operator.allowed[attribute.name]:
            raise AdmissionError("attribute", f"The {label} has a value that medveil can't differentiate.")
        values[attribute.name] = value
    if missing := operator.required - seen:
        raise AdmissionError("attribute", f"The operator {name!r} lacks its attribute {min(missing)!r}.")
    return values
