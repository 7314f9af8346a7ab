"""A whole training step as one ONNX graph: forward, backward, batch-norm statistics and SGD with momentum.

Everything that changes comes in and goes out, so that the caller holds the state and plain onnxruntime does
the work:

    training = build_training_step(model)
    state = training.initial_state()
    outputs = run(image=..., target=..., learning_rate=..., **state)
    state = training.next_state(outputs)
    trained = fold_parameters(model, training.weights(state))

The forward pass differs from inference in one point, batch normalisation, which uses the batch's own
statistics. Dropout isn't part of an inference graph and stays away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from medveil.models.autodiff.emit import Builder, Value
from medveil.models.autodiff.gradient import LOSS, TARGET, backward, describe
from medveil.models.autodiff.graph import IMAGE, LOGITS, Graph, Node, SourceGraph, parse
from medveil.models.autodiff.losses import emit_loss
from medveil.models.autodiff.rules import Context, Dialect
from medveil.models.autodiff.rules.normalization import normalised, through_statistics
from medveil.models.autodiff.rules.registry import Gradients
from medveil.models.errors import AdmissionError, ConfigurationError

__all__ = ["LEARNING_RATE", "TrainingGraph", "build_training_step", "fold_parameters"]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

LEARNING_RATE = "learning_rate"
_NEXT = "next/"
_MOMENTUM = "momentum/"

_EXPORTERS_OWN = re.compile(r"val_\d+")
"""How torch's exporter names constants that the module lacks, such as the bias of a convolution without one."""


@dataclass(frozen=True, eq=False)
class TrainingGraph:
    """One training step.

    Attributes:
        model: inputs ``image``, ``target`` (as in a gradient graph), ``learning_rate`` (a float32 scalar) and
            the state; outputs ``loss`` (mean over the batch, a scalar), ``logits`` and the next state.
        parameters: received name of each trained weight -> its value in the model given.
        statistics: received name of each running mean and variance -> its value in the model given.
        inputs: received name of each of them -> name of the state input that carries it.
    """

    model: onnx.ModelProto
    parameters: Mapping[str, FloatArray]
    statistics: Mapping[str, FloatArray]
    inputs: Mapping[str, str]

    def initial_state(self) -> dict[str, FloatArray]:
        """Return the state inputs of the first step: the model's own weights, momenta at rest."""
        state = {
            self.inputs[name]: array for name, array in (*self.parameters.items(), *self.statistics.items())
        }
        return state | {
            _MOMENTUM + self.inputs[name]: np.zeros_like(a) for name, a in self.parameters.items()
        }

    def next_state(self, outputs: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Return the state inputs of the next step from this step's outputs by name."""
        return {name.removeprefix(_NEXT): array for name, array in outputs.items() if name.startswith(_NEXT)}

    def weights(self, state: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Return weights and running statistics by received name: what `fold_parameters` takes."""
        return {name: state[ours] for name, ours in self.inputs.items()}


def build_training_step(
    model: SourceGraph | onnx.ModelProto,
    *,
    loss: str = "cross_entropy",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    parameters: Collection[str] | None = None,
    dialect: Dialect = "cpu",
) -> TrainingGraph:
    """Build the graph of one step of stochastic gradient descent on the mean loss of a batch.

    The update is torch's: ``v <- momentum v + g + weight_decay p``, ``p <- p - learning_rate v``; running
    variances are updated with the unbiased estimate, as torch does.

    Args:
        model: a model exported with batch normalisation as nodes of its own.
        loss: as in `build_gradient`.
        momentum: in [0, 1).
        weight_decay: per step, at least 0.
        parameters: received names of the weights to train; by default every floating-point weight of rank 1
            or more that the loss is differentiable in.
        dialect: as in `build_gradient`.

    Raises:
        AdmissionError: as `build_gradient`; ``signature`` where there is nothing to train.
        ConfigurationError: ``loss``, ``momentum``, ``weight-decay``, or ``parameters`` for a name that the
            model lacks.
    """
    if not 0 <= momentum < 1:
        raise ConfigurationError("momentum", "The momentum must be at least 0 and below 1.")
    if weight_decay < 0:
        raise ConfigurationError("weight-decay", "The weight decay must not be negative.")
    graph = parse(model)
    builder = Builder()
    builder.include(graph, lower={"BatchNormalization": _normalise_batch})
    seed = emit_loss(loss, builder, builder.value(LOGITS), builder.value(TARGET), graph.shapes[LOGITS])
    share = 1.0 / _count(builder, 1)
    gradients = backward(
        graph,
        builder,
        {LOGITS: seed.gradient * share},
        _trainable(graph, parameters),
        dialect,
        rules={"BatchNormalization": _batch_norm_rule},
    )
    if not gradients:
        raise AdmissionError("signature", "The graph has no weights to train.")
    inputs = [
        describe(IMAGE, graph.shapes[IMAGE]),
        describe(TARGET, graph.shapes[LOGITS]),
        describe(LEARNING_RATE, ()),
    ]
    builder.bind(LOSS, builder.op("ReduceMean", seed.loss, [0], keepdims=0))
    outputs = [describe(LOSS, ()), describe(LOGITS, graph.shapes[LOGITS])]
    changes: dict[str, Value] = {}
    for name, gradient in gradients.items():
        weight, velocity = builder.value(name), builder.value(_MOMENTUM + name)
        gradient = gradient + weight * weight_decay if weight_decay else gradient
        changes[velocity.name] = velocity * momentum + gradient
        changes[name] = weight - builder.value(LEARNING_RATE) * changes[velocity.name]
    statistics: dict[str, FloatArray] = {}
    for name, value in _running_statistics(graph, builder):
        changes[name] = value
        statistics[graph.parameters[name]] = graph.constants[name]
    for name, value in changes.items():
        shape = graph.shapes[name.removeprefix(_MOMENTUM)]
        builder.bind(_NEXT + name, value)
        inputs.append(describe(name, shape))
        outputs.append(describe(_NEXT + name, shape))
    return TrainingGraph(
        model=builder.build("training", inputs, outputs),
        parameters={graph.parameters[name]: graph.constants[name] for name in gradients},
        statistics=statistics,
        inputs={graph.parameters[n]: n for n in changes if n in graph.parameters},
    )


def fold_parameters(model: onnx.ModelProto, weights: Mapping[str, FloatArray]) -> onnx.ModelProto:
    """Return an inference model with other weights and running statistics, leaving the given one as it is.

    Args:
        model: the model that the training step was built from.
        weights: arrays by received name, as `TrainingGraph.weights` gives them.

    Raises:
        ConfigurationError: ``parameters`` for a name that the model lacks, or an array of another shape.
    """
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for name, array in weights.items():
        if known.get(name) != array.shape:
            raise ConfigurationError("parameters", "The weights do not belong to this model.", private=name)
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    for tensor in folded.graph.initializer:
        if tensor.name in weights:
            array = np.ascontiguousarray(weights[tensor.name], np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return folded


# -- what is trained
# ------------------------------------------------------------------------------------------------


def _trainable(graph: Graph, chosen: Collection[str] | None) -> list[str]:
    statistics = {name for node in graph.nodes if node.op == "BatchNormalization" for name in node.inputs[3:]}
    if chosen is None:
        return [
            name
            for name, received in graph.parameters.items()
            if name not in statistics and len(graph.shapes[name]) and not _EXPORTERS_OWN.fullmatch(received)
        ]
    ours = {received: name for name, received in graph.parameters.items() if name not in statistics}
    if missing := sorted(set(chosen) - ours.keys()):
        raise ConfigurationError("parameters", "The model has no such weight to train.", private=missing[0])
    return [ours[name] for name in sorted(chosen)]


# -- batch normalisation in training mode
# -----------------------------------------------------------------------------
#
# Each function asks the builder for the same statistics again; a node that is already there is not written
# twice.


def _normalise_batch(graph: Graph, builder: Builder, node: Node) -> None:
    n, _ = _normalised(graph, builder, node)
    rank = len(graph.shapes[node.inputs[0]])
    scaled = n * _per_channel(builder, node.inputs[1], rank)
    builder.append(
        Node("Add", (scaled.name, _per_channel(builder, node.inputs[2], rank).name), (node.output,), {})
    )


def _batch_norm_rule(node: Node, ctx: Context, g: Value) -> Gradients:
    """As for every layer with statistics of its own, over the batch too (see `rules.normalization`)."""
    rank, axes = len(ctx.in_shape(node)), _axes(ctx.graph, node)

    def mean(value: Value) -> Value:
        return _mean(ctx.graph, ctx.builder, node, value)

    n, r = _normalised(ctx.graph, ctx.builder, node)
    h = g * _per_channel(ctx.builder, node.inputs[1], rank)
    dx = through_statistics(h, n, r, mean) if ctx.needs(node, 0) else None
    return [
        dx,
        ctx.reduce_sum(g * n, axes, keepdims=False) if ctx.needs(node, 1) else None,
        ctx.reduce_sum(g, axes, keepdims=False) if ctx.needs(node, 2) else None,
        None,
        None,
    ]


def _running_statistics(graph: Graph, builder: Builder) -> list[tuple[str, Value]]:
    changes = []
    for node in graph.nodes:
        if node.op != "BatchNormalization":
            continue
        keep = node.number("momentum")
        mean, centred = _centred(graph, builder, node)
        variance = _mean(graph, builder, node, centred * centred)
        count = _count(builder, math.prod(graph.shapes[node.inputs[0]][2:]))
        unbiased = variance * (count / builder.op("Max", count - 1.0, 1.0))
        for name, seen in ((node.inputs[3], mean), (node.inputs[4], unbiased)):
            flat = builder.op("Reshape", seen, [-1])
            changes.append((name, builder.value(name) * keep + flat * (1 - keep)))
    return changes


def _normalised(graph: Graph, builder: Builder, node: Node) -> tuple[Value, Value]:
    _, centred = _centred(graph, builder, node)
    return normalised(
        builder, centred, lambda value: _mean(graph, builder, node, value), node.number("epsilon")
    )


def _centred(graph: Graph, builder: Builder, node: Node) -> tuple[Value, Value]:
    x = builder.value(node.inputs[0])
    mean = _mean(graph, builder, node, x)
    return mean, x - mean


def _mean(graph: Graph, builder: Builder, node: Node, value: Value) -> Value:
    return builder.op("ReduceMean", value, _axes(graph, node), keepdims=1)


def _axes(graph: Graph, node: Node) -> list[int]:
    return [axis for axis in range(len(graph.shapes[node.inputs[0]])) if axis != 1]


def _per_channel(builder: Builder, name: str, rank: int) -> Value:
    return builder.op("Reshape", builder.value(name), [-1] + [1] * (rank - 2))


def _count(builder: Builder, per_image: int) -> Value:
    """Return how many values the batch holds, as a float32 scalar."""
    batch = builder.op("Squeeze", builder.op("Shape", builder.value(IMAGE), start=0, end=1), [0])
    return builder.op("Cast", batch, to=TensorProto.FLOAT) * float(per_image)
