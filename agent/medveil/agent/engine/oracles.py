"""Oracles over onnxruntime: a frozen surrogate, and one that can still be trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medveil.agent.engine.batching import aligned_copy, open_runner
from medveil.agent.engine.runtime import Resources, open_session
from medveil.models.autodiff import build_gradient
from medveil.models.autodiff.admission import AdmittedGraph
from medveil.models.autodiff.gradient import GRADIENT, LOSS, TARGET
from medveil.models.autodiff.graph import IMAGE
from medveil.models.autodiff.rules import Dialect
from medveil.models.autodiff.training import LEARNING_RATE, build_training_step, fold_parameters
from medveil.models.errors import ConfigurationError, SelfTestError
from medveil.models.methods.oracle import FloatArray

__all__ = ["OnnxOracle", "OnnxTrainableOracle", "TrainingSettings"]


class OnnxOracle:
    """A frozen surrogate that answers with onnxruntime; implements ``GradientOracle``.

    Args:
        name: the surrogate's name, for messages.
        graph: an admitted forward graph.
        resources: what its session may use.
        loss: which loss it is asked about, a name of :data:`medveil.models.autodiff.losses.LOSSES`.

    Raises:
        AdmissionError: the graph holds a use of an operator that cannot be differentiated.
        ConfigurationError: the memory budget or the device does not suffice.
        SelfTestError: ``runtime-failure``.
    """

    def __init__(
        self, name: str, graph: AdmittedGraph, resources: Resources, *, loss: str = "cross_entropy"
    ) -> None:
        self.name = name
        self._shape = graph.input_shape
        self._target_shape = graph.output_shape
        self._runner = open_runner(
            build_gradient(graph, loss=loss, dialect=_dialect(resources)),
            resources,
            inputs={IMAGE: graph.input_shape, TARGET: graph.output_shape},
            outputs=(LOSS, GRADIENT),
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(C, ...)``."""
        return self._shape

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of one image's target: ``(K,)``, or ``(K, rows, columns)`` for segmentation."""
        return self._target_shape

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self._target_shape[0]

    @property
    def micro_batch(self) -> int:
        """Images per call of the session."""
        return self._runner.micro_batch

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return each image's loss and gradient; see ``GradientOracle``.

        Raises:
            ConfigurationError: ``oracle-input`` for arrays of the wrong shape or type.
            SelfTestError: ``non-finite`` when a gradient is not a number, ``runtime-failure``.
        """
        _check_batch(images, self._shape)
        _check_batch(targets, self._target_shape, count=len(images))
        losses, gradient = self._runner.run({IMAGE: images, TARGET: targets}, (LOSS, GRADIENT))
        if not (np.isfinite(losses).all() and np.isfinite(gradient).all()):
            public = f"Surrogate {self.name!r} answered with a gradient that is not a number; do not use it."
            raise SelfTestError("non-finite", public)
        return losses, gradient


def _dialect(resources: Resources) -> Dialect:
    return "cpu" if resources.device == "cpu" else "portable"


def _check_batch(batch: FloatArray, shape: tuple[int, ...], *, count: int | None = None) -> None:
    if batch.dtype != np.float32 or batch.shape[1:] != shape or (count is not None and len(batch) != count):
        raise ConfigurationError(
            "oracle-input",
            f"The surrogate takes float32 batches of shape {shape}; this batch has {batch.shape[1:]}.",
        )


# --- Training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSettings:
    """How a surrogate is trained between perturbation rounds.

    Attributes:
        learning_rate: of plain SGD.
        momentum: in [0, 1).
        weight_decay: per step.
        calibration_batches: most recent training batches whose statistics replace the running averages before
            gradients are asked for. Young averages made evaluation-mode losses explode (512 nats after 12 steps at
            learning rate 0.05, measured); eight batches are our choice.
    """

    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    calibration_batches: int = 8


class OnnxTrainableOracle:
    """A surrogate that answers and learns with onnxruntime; implements ``TrainableOracle``.

    Gradients are asked of a session with constant weights (weights as inputs cost a quarter of its speed), which is
    built again after training, when the first gradient is asked for.

    Args:
        name: the surrogate's name, for messages.
        graph: an admitted forward graph with batch normalisation as nodes of its own.
        resources: what each of its two sessions may use.
        training: how it learns.
        loss: as :class:`OnnxOracle`.

    Raises:
        AdmissionError: the graph cannot be differentiated or has nothing to train.
        ConfigurationError, SelfTestError: as :class:`OnnxOracle`.
    """

    def __init__(
        self,
        name: str,
        graph: AdmittedGraph,
        resources: Resources,
        training: TrainingSettings | None = None,
        *,
        loss: str = "cross_entropy",
    ) -> None:
        self.name = name
        self._graph = graph
        self._resources = resources
        self._loss = loss
        self._training = training or TrainingSettings()
        self._step = build_training_step(
            graph,
            loss=loss,
            momentum=self._training.momentum,
            weight_decay=self._training.weight_decay,
            dialect=_dialect(resources),
        )
        self._state = self._step.initial_state()
        self._session: Any = open_session(self._step.model.SerializeToString(deterministic=True), resources)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._recent: deque[tuple[FloatArray, FloatArray]] = deque(maxlen=self._training.calibration_batches)
        self._frozen: OnnxOracle | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(C, ...)``."""
        return self._graph.input_shape

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of one image's target."""
        return self._graph.output_shape

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self._graph.output_shape[0]

    def train_step(self, images: FloatArray, targets: FloatArray) -> float:
        """Take one SGD step on the mean loss of the batch, on one thread, and return that loss in nats.

        Raises:
            ConfigurationError: ``oracle-input``.
            SelfTestError: ``non-finite`` when training diverged, ``runtime-failure``.
        """
        _check_batch(images, self.input_shape)
        _check_batch(targets, self.target_shape, count=len(images))
        outputs = self._run(images, targets, self._training.learning_rate)
        loss = float(outputs[LOSS])
        if not np.isfinite(loss):
            public = f"Training surrogate {self.name!r} diverged; lower its learning rate."
            raise SelfTestError("non-finite", public)
        self._state = self._step.next_state(outputs)
        self._recent.append((images.copy(), targets.copy()))
        self._frozen = None
        return loss

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return each image's loss and gradient at the present weights; see ``GradientOracle``."""
        return self.freeze().loss_and_gradient(images, targets)

    def freeze(self) -> OnnxOracle:
        """Return the surrogate with its present weights, statistics calibrated on the latest training batches."""
        if self._frozen is None:
            self._frozen = OnnxOracle(self.name, self.trained(), self._resources, loss=self._loss)
        return self._frozen

    def trained(self) -> AdmittedGraph:
        """Return the graph that `freeze` opens: present weights, calibrated statistics."""
        weights = {**self._step.weights(self._state), **self._calibrated_statistics()}
        return replace(self._graph, model=fold_parameters(self._graph.model, weights))

    def _calibrated_statistics(self) -> Mapping[str, FloatArray]:
        """Average the batch statistics of the latest batches at the present weights (no step is taken)."""
        if not self._recent or not self._step.statistics:
            return {}
        seen = [self._statistics_of(*batch) for batch in self._recent]
        return {
            name: np.mean([s[name] for s in seen], axis=0, dtype=np.float32) for name in self._step.statistics
        }

    def _statistics_of(self, images: FloatArray, targets: FloatArray) -> dict[str, FloatArray]:
        """Return one batch's mean and variance in every layer.

        The step returns ``keep * running + (1 - keep) * seen``; asked at two running values, it gives ``seen`` away
        without anybody knowing ``keep``.
        """
        names = [self._step.inputs[name] for name in self._step.statistics]
        low = self._run(images, targets, 0.0, {name: np.zeros_like(self._state[name]) for name in names})
        high = self._run(images, targets, 0.0, {name: np.ones_like(self._state[name]) for name in names})
        seen = {}
        for received, name in self._step.inputs.items():
            if received in self._step.statistics:
                at_zero, at_one = self._step.next_state(low)[name], self._step.next_state(high)[name]
                seen[received] = at_zero / (1 - (at_one - at_zero))
        return seen

    def _run(
        self,
        images: FloatArray,
        targets: FloatArray,
        learning_rate: float,
        state: Mapping[str, FloatArray] | None = None,
    ) -> dict[str, FloatArray]:
        feeds = self._state | dict(state or {})
        feeds |= {IMAGE: images, TARGET: targets, LEARNING_RATE: np.array(learning_rate, np.float32)}
        try:
            answers = self._session.run(self._outputs, {name: aligned_copy(a) for name, a in feeds.items()})
        except Exception as exc:  # onnxruntime's error classes share no root but Exception
            public = "onnxruntime failed in a training step; update it or report the model."
            raise SelfTestError("runtime-failure", public, private=str(exc)) from exc
        return {name: np.array(answer) for name, answer in zip(self._outputs, answers, strict=True)}
