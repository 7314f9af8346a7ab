"""Untrained victims as ONNX graphs, drawn on the spot: the designs that the coordinator's own check uses, too.

None of the convolutional designs is a surrogate (`medveil.models.nets`): noise that only holds against the
architectures it was made on is worth nothing. The MLP stands beside them because noise made with convolutional
surrogates is known to be weak against it, and a site should see that in its own figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from medveil.models.autodiff.admission import AdmittedGraph, admit
from medveil.models.autodiff.graph import IMAGE, IR_VERSION, LOGITS
from medveil.models.autodiff.operators import OPSET
from medveil.models.errors import ConfigurationError

__all__ = ["ARCHITECTURES", "draw_network"]

_LARGE: Final = 64
"""Pixels of a side above which a convolutional victim halves the image first, as `medveil.models.audit` does."""

_EPSILON: Final = 1e-5
_KEEP: Final = 0.9
"""Batch norm's two constants: torch's defaults, in ONNX's words."""


def draw_network(
    architecture: str, *, shape: tuple[int, int, int], classes: int, rng: np.random.Generator
) -> AdmittedGraph:
    """Return a victim with fresh weights: images ``(N, *shape)`` in [0, 1] to logits ``(N, classes)``.

    Args:
        architecture: one of `ARCHITECTURES`.
        shape: of one image, ``(channels, rows, columns)``.
        classes: number of classes.
        rng: draws the weights.

    Raises:
        ConfigurationError: ``architecture``: there is none of that name.
    """
    if architecture not in _DESIGNS:
        known = ", ".join(ARCHITECTURES)
        raise ConfigurationError("architecture", f"No victim is called {architecture!r}; there are: {known}.")
    layers = _Layers(rng)
    _DESIGNS[architecture](layers, shape, classes)
    model = layers.model(shape, classes)
    return admit(model.SerializeToString(deterministic=True))


class _Layers:
    """A network under construction: nodes in order, each value named after the node that gives it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._nodes: list[NodeProto] = []
        self._weights: list[TensorProto] = []

    def convolution(
        self, x: str, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> str:
        """Convolution, batch norm, ReLU."""
        # He et al. 2015 (arXiv 1502.01852): keeps the variance through ReLU layers.
        fan_in = inputs // groups * kernel**2
        weights = self._rng.normal(0, math.sqrt(2 / fan_in), (outputs, inputs // groups, kernel, kernel))
        sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        y = self._node("Conv", x, self._weight(weights), group=groups, **sizes)
        one, nil = np.ones(outputs), np.zeros(outputs)
        norm = [self._weight(array) for array in (one, nil, nil, one)]
        return self._node(
            "Relu", self._node("BatchNormalization", y, *norm, epsilon=_EPSILON, momentum=_KEEP)
        )

    def largest(self, x: str, kernel: int, stride: int, pad: int = 0) -> str:
        """Max pooling."""
        return self._node("MaxPool", x, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)

    def joined(self, *values: str) -> str:
        """Channels of several branches, one after another."""
        return self._node("Concat", *values, axis=1)

    def linear(self, x: str, inputs: int, outputs: int, *, relu: bool = False) -> str:
        """Fully connected layer; torch's own initialisation."""
        bound = 1 / math.sqrt(inputs)
        weights = self._weight(self._rng.uniform(-bound, bound, (inputs, outputs)))
        y = self._node("Gemm", x, weights, self._weight(self._rng.uniform(-bound, bound, outputs)))
        return self._node("Relu", y) if relu else y

    def flattened(self, x: str) -> str:
        """All values of an image in one row."""
        return self._node("Flatten", x)

    def averaged_head(self, x: str, width: int, classes: int) -> str:
        """Global average and a linear layer on it."""
        return self.linear(self.flattened(self._node("GlobalAveragePool", x)), width, classes)

    def model(self, shape: tuple[int, int, int], classes: int) -> ModelProto:
        """Return the graph; the last node gives the logits."""
        self._nodes[-1].output[0] = LOGITS
        image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, ["batch", *shape])
        logits = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", classes])
        graph = helper.make_graph(self._nodes, "victim", [image], [logits], self._weights)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def _node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def _weight(self, values: npt.NDArray[np.float64]) -> str:
        name = f"weight{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name


def _mobilenet(net: _Layers, shape: tuple[int, int, int], classes: int) -> None:
    """Depthwise-separable convolutions (Howard et al. 2017, arXiv 1704.04861), at a tenth of the width."""
    width = 16
    x = net.convolution(IMAGE, shape[0], width, stride=_first_stride(shape))
    for inputs, outputs, stride in ((1, 2, 1), (2, 2, 2), (2, 4, 1), (4, 4, 2), (4, 4, 1)):
        x = net.convolution(x, inputs * width, inputs * width, 3, stride, groups=inputs * width)
        x = net.convolution(x, inputs * width, outputs * width, 1)
    net.averaged_head(x, 4 * width, classes)


def _inception(net: _Layers, shape: tuple[int, int, int], classes: int) -> None:
    """Four parallel branches per block (Szegedy et al. 2014, arXiv 1409.4842)."""

    def block(x: str, inputs: int, width: int) -> str:
        small = net.convolution(net.convolution(x, inputs, width, 1), width, width, 3)
        large = net.convolution(net.convolution(x, inputs, width, 1), width, width, 5)
        pooled = net.convolution(net.largest(x, 3, 1, pad=1), inputs, width, 1)
        return net.joined(net.convolution(x, inputs, width, 1), small, large, pooled)

    width = 8
    x = net.convolution(IMAGE, shape[0], 2 * width, stride=_first_stride(shape))
    x = net.largest(block(net.largest(x, 2, 2), 2 * width, width), 2, 2)
    x = block(block(x, 4 * width, 2 * width), 8 * width, 2 * width)
    net.averaged_head(x, 8 * width, classes)


def _mlp(net: _Layers, shape: tuple[int, int, int], classes: int) -> None:
    """Two hidden layers on the pixels."""
    pixels = math.prod(shape)
    hidden = net.linear(net.flattened(IMAGE), pixels, 256, relu=True)
    net.linear(net.linear(hidden, 256, 128, relu=True), 128, classes)


def _first_stride(shape: tuple[int, int, int]) -> int:
    return 2 if max(shape[1:]) > _LARGE else 1


_DESIGNS: Final[dict[str, Callable[[_Layers, tuple[int, int, int], int], None]]] = {
    "mobilenet": _mobilenet,
    "inception": _inception,
    "mlp": _mlp,
}
ARCHITECTURES: Final = tuple(_DESIGNS)
"""Every victim, in the order of the tables."""
