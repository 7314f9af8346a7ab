"""Untrained U-Nets as ONNX graphs, drawn on the spot: the victims of a site's check on images with masks.

Neither is a surrogate (those enlarge by repeating pixels, `medveil.models.nets.segmentation`). One has batch norm,
the other is nnU-Net's: instance norm, leaky ReLU, strided convolutions; what holds against the first one seldom
holds against the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from medveil.models.autodiff.admission import AdmittedGraph, admit
from medveil.models.autodiff.graph import IMAGE, IR_VERSION, LOGITS
from medveil.models.autodiff.operators import OPSET
from medveil.models.errors import ConfigurationError

__all__ = ["ALIGNMENT", "ARCHITECTURES", "draw_segmenter"]

ALIGNMENT: Final = 4
"""Sides of an image must be multiples: two halvings."""

_WIDTHS: Final = (10, 20, 40)
"""Channels at each resolution: what trains in half a minute on one thread at 64 pixels. Our choice."""

_EPSILON: Final = 1e-5
_KEEP: Final = 0.9
"""Batch norm's two constants: torch's defaults, in ONNX's words."""

_SLOPE: Final = 0.01
"""Of the leaky ReLU beside an instance norm, as nnU-Net's."""

_INSTANCE_NORM: Final[Mapping[str, bool]] = {"unet-bn": False, "unet-in": True}
ARCHITECTURES: Final = tuple(_INSTANCE_NORM)
"""Every victim, in the order of the tables."""


def draw_segmenter(
    architecture: str, *, shape: tuple[int, int, int], classes: int, rng: np.random.Generator
) -> AdmittedGraph:
    """Return a victim with fresh weights: images ``(N, *shape)`` in [0, 1] to logits ``(N, classes, rows, columns)``.

    Args:
        architecture: one of `ARCHITECTURES`.
        shape: of one image, ``(channels, rows, columns)``.
        classes: number of classes, background included.
        rng: draws the weights.

    Raises:
        ConfigurationError: ``architecture``: there is none of that name.
    """
    if architecture not in _INSTANCE_NORM:
        known = ", ".join(ARCHITECTURES)
        raise ConfigurationError("architecture", f"No victim is called {architecture!r}; there are: {known}.")
    net = _UNet(rng, instance_norm=_INSTANCE_NORM[architecture])
    return admit(net.model(shape, classes).SerializeToString(deterministic=True))


class _UNet:
    """A U-Net (Ronneberger et al., arXiv 1505.04597) under construction: nodes in order."""

    def __init__(self, rng: np.random.Generator, *, instance_norm: bool) -> None:
        self._rng = rng
        self._instance_norm = instance_norm
        self._nodes: list[NodeProto] = []
        self._weights: list[TensorProto] = []

    def model(self, shape: tuple[int, int, int], classes: int) -> ModelProto:
        """Return the graph."""
        self._logits(self._features(shape[0]), classes)
        image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, ["batch", *shape])
        logits = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", classes, *shape[1:]])
        graph = helper.make_graph(self._nodes, "victim", [image], [logits], self._weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _features(self, channels: int) -> str:
        fine, middle, coarse = _WIDTHS
        skip = self._block(IMAGE, channels, fine)
        deeper = self._block(self._halved(skip), fine, middle, halve=self._instance_norm)
        bottom = self._block(self._halved(deeper), middle, coarse, halve=self._instance_norm)
        x = self._joined(self._enlarged(bottom, coarse, middle), deeper)
        x = self._joined(self._enlarged(self._block(x, 2 * middle, middle), middle, fine), skip)
        return self._block(x, 2 * fine, fine)

    def _block(self, x: str, inputs: int, outputs: int, *, halve: bool = False) -> str:
        """Two convolutions, each with its norm and activation."""
        return self._convolution(self._convolution(x, inputs, outputs, 2 if halve else 1), outputs, outputs)

    def _convolution(self, x: str, inputs: int, outputs: int, stride: int = 1) -> str:
        kernel = self._drawn(9 * inputs, (outputs, inputs, 3, 3))
        sizes = {"kernel_shape": [3, 3], "strides": [stride] * 2, "pads": [1] * 4}
        y = self._node("Conv", x, kernel, **sizes)
        one, nil = np.ones(outputs), np.zeros(outputs)
        if self._instance_norm:
            norm = [self._weight(array) for array in (one, nil)]
            return self._node(
                "LeakyRelu", self._node("InstanceNormalization", y, *norm, epsilon=_EPSILON), alpha=_SLOPE
            )
        norm = [self._weight(array) for array in (one, nil, nil, one)]
        normal = self._node("BatchNormalization", y, *norm, epsilon=_EPSILON, momentum=_KEEP)
        return self._node("Relu", normal)

    def _halved(self, x: str) -> str:
        """Max pooling; beside an instance norm the next convolution strides instead."""
        return x if self._instance_norm else self._node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])

    def _enlarged(self, x: str, inputs: int, outputs: int) -> str:
        kernel = self._drawn(inputs, (inputs, outputs, 2, 2))
        return self._node("ConvTranspose", x, kernel, kernel_shape=[2, 2], strides=[2, 2])

    def _joined(self, x: str, skip: str) -> str:
        return self._node("Concat", x, skip, axis=1)

    def _logits(self, x: str, classes: int) -> None:
        kernel, bias = self._drawn(_WIDTHS[0], (classes, _WIDTHS[0], 1, 1)), self._weight(np.zeros(classes))
        self._node("Conv", x, kernel, bias, kernel_shape=[1, 1])
        self._nodes[-1].output[0] = LOGITS

    def _node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def _drawn(self, fan_in: int, shape: tuple[int, ...]) -> str:
        # He et al. 2015 (arXiv 1502.01852): keeps the variance through ReLU layers.
        return self._weight(self._rng.normal(0, math.sqrt(2 / fan_in), shape))

    def _weight(self, values: npt.NDArray[np.float64]) -> str:
        name = f"weight{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name
