"""Arithmetic on constants and shapes, in NumPy.

Exporters compute shapes inside the graph (``Shape -> Gather -> Concat -> Reshape``). Those chains are worked
out while a graph is read, so that no derivative rule ever meets them. Only small values are computed here;
weights aren't.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from medveil.models.autodiff.operators import Attribute

__all__ = ["LARGEST_FOLDED", "evaluate"]

LARGEST_FOLDED = 1 << 16
"""Elements of the largest value that is computed while reading (our choice: above any shape or index table)."""

Array = npt.NDArray[Any]
Attributes = Mapping[str, Attribute]


def evaluate(op: str, attributes: Attributes, inputs: Sequence[Array | None]) -> Array | None:
    """Return the value of an operator on known inputs, or ``None`` where it isn't arithmetic on shapes."""
    function = _FUNCTIONS.get(op)
    if function is None:
        return None
    result: Array = np.asarray(function(attributes, *inputs))
    first = next((array for array in inputs if array is not None), None)
    if op in _KEEPS_TYPE and first is not None:
        result = result.astype(first.dtype, copy=False)
    return result


def _axes(axes: Array | None) -> tuple[int, ...] | None:
    return None if axes is None else tuple(int(a) for a in axes.reshape(-1))


def _divide(_: Attributes, a: Array, b: Array) -> Array:
    if not np.issubdtype(a.dtype, np.integer):
        return np.asarray(a / b)
    return np.asarray(np.trunc(a / b)).astype(a.dtype)  # ONNX divides integers towards zero


def _slice(_: Attributes, x: Array, starts: Array, ends: Array, axes: Any = None, steps: Any = None) -> Array:
    index = [slice(None)] * x.ndim
    chosen = _axes(axes) or tuple(range(len(starts)))
    for axis, start, end, step in zip(
        chosen, starts, ends, steps if steps is not None else [1] * len(starts), strict=True
    ):
        backwards_to_the_start = step < 0 and end < -x.shape[axis]
        index[axis] = slice(int(start), None if backwards_to_the_start else int(end), int(step))
    return x[tuple(index)]


def _reshape(attributes: Attributes, x: Array, shape: Array) -> Array:
    copy_zero = not attributes["allowzero"]
    return x.reshape([x.shape[i] if d == 0 and copy_zero else int(d) for i, d in enumerate(shape)])


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(attributes: Attributes, x: Array, axes: Array | None = None) -> Any:
        return function(x, axis=_axes(axes), keepdims=bool(attributes["keepdims"]))

    return reduce


def _constant(attributes: Attributes) -> Array:
    for name, dtype in (("value_int", np.int64), ("value_ints", np.int64)):
        if attributes[name] is not None:
            return np.asarray(attributes[name], dtype)
    for name in ("value_float", "value_floats"):
        if attributes[name] is not None:
            return np.asarray(attributes[name], np.float32)
    value = attributes["value"]
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.zeros(0, np.float32)


def _constant_of_shape(attributes: Attributes, shape: Array) -> Array:
    value = attributes["value"]
    fill = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.zeros(1, np.float32)
    return np.full(tuple(int(d) for d in shape), fill.reshape(-1)[0])


def _squeeze(_: Attributes, x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, _axes(axes))


def _unsqueeze(_: Attributes, x: Array, axes: Array) -> Array:
    return np.expand_dims(x, _axes(axes) or ())


def _cast(attributes: Attributes, x: Array) -> Array:
    to = attributes["to"]
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(to if isinstance(to, int) else 0))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Abs": lambda _, x: np.abs(x),
    "Add": lambda _, a, b: a + b,
    "And": lambda _, a, b: np.logical_and(a, b),
    "Cast": _cast,
    "CastLike": lambda _, x, like: x.astype(like.dtype),
    "Ceil": lambda _, x: np.ceil(x),
    "Concat": lambda attributes, *xs: np.concatenate(xs, attributes["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Equal": lambda _, a, b: np.equal(a, b),
    "Expand": lambda _, x, shape: x * np.ones([int(d) for d in shape], x.dtype),
    "Floor": lambda _, x: np.floor(x),
    "Gather": lambda attributes, x, i: np.take(x, i, attributes["axis"]),
    "Greater": lambda _, a, b: np.greater(a, b),
    "GreaterOrEqual": lambda _, a, b: np.greater_equal(a, b),
    "Identity": lambda _, x: x,
    "Less": lambda _, a, b: np.less(a, b),
    "LessOrEqual": lambda _, a, b: np.less_equal(a, b),
    "Max": lambda _, *xs: np.maximum.reduce(xs),
    "Min": lambda _, *xs: np.minimum.reduce(xs),
    "Mod": lambda attributes, a, b: np.fmod(a, b) if attributes["fmod"] else np.mod(a, b),
    "Mul": lambda _, a, b: a * b,
    "Neg": lambda _, x: -x,
    "Not": lambda _, x: np.logical_not(x),
    "Or": lambda _, a, b: np.logical_or(a, b),
    "Pow": lambda _, a, b: np.power(a, b),
    "Range": lambda _, start, limit, delta: np.arange(start, limit, delta, dtype=start.dtype),
    "Reciprocal": lambda _, x: 1 / x,
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Sqrt": lambda _, x: np.sqrt(x),
    "Squeeze": _squeeze,
    "Sub": lambda _, a, b: a - b,
    "Tile": lambda _, x, repeats: np.tile(x, [int(r) for r in repeats]),
    "Transpose": lambda attributes, x: np.transpose(x, attributes["perm"]),
    "Trilu": lambda attributes, x, k=0: (np.triu if attributes["upper"] else np.tril)(x, int(k)),
    "Unsqueeze": _unsqueeze,
    "Where": lambda _, c, a, b: np.where(c, a, b),
    "Xor": lambda _, a, b: np.logical_xor(a, b),
}

# NumPy promotes where ONNX keeps the type of the first operand.
_KEEPS_TYPE = frozenset(
    (
        "Abs",
        "Add",
        "Div",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Pow",
        "Reciprocal",
        "ReduceProd",
        "ReduceSum",
        "Sqrt",
        "Sub",
    )
)
