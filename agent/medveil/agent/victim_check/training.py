"""Train one victim in onnxruntime: what somebody who got hold of a release would do with it, without torch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from medveil.agent.engine import OnnxClassifier, Resources
from medveil.agent.engine.batching import aligned_copy
from medveil.agent.engine.runtime import open_session
from medveil.agent.victim_check.runs import OutOfTime
from medveil.models.autodiff.admission import AdmittedGraph
from medveil.models.autodiff.gradient import LOSS, TARGET
from medveil.models.autodiff.graph import IMAGE
from medveil.models.autodiff.training import (
    LEARNING_RATE,
    TrainingGraph,
    build_training_step,
    fold_parameters,
)
from medveil.models.errors import SelfTestError
from medveil.models.methods.oracle import FloatArray
from medveil.models.quality.classification import Scores, evaluate

__all__ = ["MEMORY_PER_VICTIM_BYTES", "Labels", "Schedule", "run_step", "train_victim"]

Labels = npt.NDArray[np.int64]

MEMORY_PER_VICTIM_BYTES: Final = 2**29

_WARM_UP: Final = 0.15
"""Share of the steps in which the learning rate rises to its peak, as in `medveil.models.audit.victims`."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a victim trains; learning rate, momentum, decay and shift are those of `medveil.models.audit.victims`.

    Attributes:
        steps: optimiser steps, whatever the number of images: a victim that was stopped early would seem
            protected against. 300 bring each of them to an AUC of 0.94 to 0.96 on 400 clean pneumonia images.
        batch_size: images per step.
        scored: how often it is scored on the clean hold-out, evenly over the steps, last after the last one.
        peak_rate: of plain SGD, reached after the warm-up; it ends at 0 along a cosine.
        shift: augmentation: every batch moves by up to so many pixels, both ways.
    """

    steps: int = 300
    batch_size: int = 32
    scored: int = 6
    peak_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 2

    def learning_rate(self, step: int) -> float:
        """Return the rate of one step, counted from 0."""
        warm_up = max(1, round(_WARM_UP * self.steps))
        if step < warm_up:
            return self.peak_rate * (step + 1) / warm_up
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (self.steps - warm_up)))

    def scores_after(self, step: int) -> bool:
        """Return whether the victim is scored after one step, counted from 0."""
        return step in np.linspace(0, self.steps, self.scored + 1).round().astype(int)[1:] - 1


def train_victim(
    graph: AdmittedGraph,
    images: FloatArray,
    labels: Labels,
    hold_out: tuple[FloatArray, Labels],
    schedule: Schedule,
    *,
    resources: Resources,
    rng: np.random.Generator,
    until: float = math.inf,
) -> tuple[Scores, ...]:
    """Train one victim and return its scores on clean images, from the first scoring to the last step.

    Args:
        graph: the untrained victim.
        images: ``(N, C, rows, columns)`` float32 in [0, 1]: what the attacker holds.
        labels: ``(N,)`` class index.
        hold_out: clean images that it never trains on, and their labels.
        schedule: how it trains.
        resources: what its session may use.
        rng: order of the images, augmentation, and calibration draws of the scores.
        until: reading of `time.monotonic` at which it gives up.

    Raises:
        OutOfTime: ``until`` came first.
        SelfTestError: ``non-finite`` when it diverged, ``runtime-failure``.
    """
    step_graph = build_training_step(graph, momentum=schedule.momentum, weight_decay=schedule.weight_decay)
    session: Any = open_session(step_graph.model.SerializeToString(deterministic=True), resources)
    names = [output.name for output in session.get_outputs()]
    state = step_graph.initial_state()
    targets = np.eye(graph.output_shape[0], dtype=np.float32)[labels]
    history = []
    order = _Order(len(images), schedule.batch_size, rng)
    for step in range(schedule.steps):
        if time.monotonic() > until:
            raise OutOfTime
        chosen = order.next_batch()
        feeds = state | {
            IMAGE: _shifted(images[chosen], schedule.shift, rng),
            TARGET: targets[chosen],
            LEARNING_RATE: np.array(schedule.learning_rate(step), np.float32),
        }
        outputs = run_step(session, names, feeds)
        state = step_graph.next_state(outputs)
        if schedule.scores_after(step):
            history.append(_scored(graph, step_graph, state, hold_out, resources, rng))
    return tuple(history)


class _Order:
    """Batches of one size, every image once before any comes again."""

    def __init__(self, count: int, batch_size: int, rng: np.random.Generator) -> None:
        self._count, self._rng = count, rng
        self._size = min(batch_size, count)
        self._left = np.empty(0, np.int64)

    def next_batch(self) -> npt.NDArray[np.int64]:
        """Return indices of the next images; what doesn't fill a last batch waits for the next round's chance."""
        if len(self._left) < self._size:
            self._left = self._rng.permutation(self._count)
        batch, self._left = self._left[: self._size], self._left[self._size :]
        return batch


def _shifted(images: FloatArray, pixels: int, rng: np.random.Generator) -> FloatArray:
    """Return the batch moved by a random number of whole pixels; what comes in repeats the edge."""
    top, left = rng.integers(0, 2 * pixels + 1, 2)
    rows, columns = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels)), mode="edge")
    return padded[:, :, top : top + rows, left : left + columns]


def run_step(session: Any, names: list[str], feeds: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Do one training step and return its outputs by name.

    Raises:
        SelfTestError: ``runtime-failure``; ``non-finite`` when the victim diverged.
    """
    try:
        answers = session.run(names, {name: aligned_copy(array) for name, array in feeds.items()})
    except Exception as exc:  # onnxruntime's error classes share no root but Exception
        public = "onnxruntime failed in a training step; update it or report this."
        raise SelfTestError("runtime-failure", public, private=str(exc)) from exc
    # Copies: what onnxruntime hands out may be its own memory, gone with the next call.
    outputs = {name: np.array(answer) for name, answer in zip(names, answers, strict=True)}
    if not np.isfinite(outputs[LOSS]):
        raise SelfTestError("non-finite", "A victim of the check diverged; nothing can be said with it.")
    return outputs


def _scored(
    graph: AdmittedGraph,
    step_graph: TrainingGraph,
    state: Mapping[str, FloatArray],
    hold_out: tuple[FloatArray, Labels],
    resources: Resources,
    rng: np.random.Generator,
) -> Scores:
    """Return what the victim knows by now; batch norm answers with its running statistics, as torch's does."""
    trained = replace(graph, model=fold_parameters(graph.model, step_graph.weights(state)))
    images, labels = hold_out
    return evaluate(OnnxClassifier(trained, resources).logits(images), labels, rng)
