"""Train one segmentation victim in onnxruntime: what somebody would do who got hold of a release with masks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from medveil.agent.engine import OnnxClassifier, Resources
from medveil.agent.engine.runtime import open_session
from medveil.agent.victim_check.runs import OutOfTime
from medveil.agent.victim_check.training import Labels, Schedule, run_step
from medveil.models.autodiff.admission import AdmittedGraph
from medveil.models.autodiff.gradient import TARGET
from medveil.models.autodiff.graph import IMAGE
from medveil.models.autodiff.training import LEARNING_RATE, build_training_step, fold_parameters
from medveil.models.methods.oracle import FloatArray
from medveil.models.quality.segmentation import dice, recoverable_dice

__all__ = ["SCHEDULE", "DiceArray", "Scoring", "train_segmenter"]

DiceArray = npt.NDArray[np.float64]
"""Dice of every scored patch, ``(N,)``: the mean over the structures."""

SCHEDULE: Final = Schedule(
    steps=300, batch_size=16, scored=5, peak_rate=2e-3, momentum=0.9, weight_decay=1e-4, shift=0
)
"""How a victim trains: warm-up and cosine as for classification, mirrors and turns instead of shifts, and AdamW as
in `medveil.models.audit.segmentation_victims`. On hippocampus slices plain SGD left these nets at a Dice of 0.39 to
0.55, AdamW brings both to 0.61 (measured); a victim that learned little would seem protected against."""

_SECOND_MOMENT, _TINY = 0.999, 1e-8
"""AdamW's other two constants: those of its authors (arXiv 1711.05101)."""

_VELOCITY: Final = "momentum/"
"""How a training step names what it keeps for a weight; with a momentum of 0 that is the gradient itself."""

_LOSS: Final = "cross_entropy_dice"
"""Cross-entropy plus soft Dice, the customary pair (nnU-Net, arXiv 1809.10486)."""


@dataclass(frozen=True, eq=False, slots=True)
class Scoring:
    """What one victim finds in the clean patches of the hold-out, at one point of its training.

    Attributes:
        dice: of its answers.
        recoverable: of its probabilities, under the thresholds that serve best on these very patches.
    """

    dice: DiceArray
    recoverable: DiceArray


def train_segmenter(
    graph: AdmittedGraph,
    images: FloatArray,
    labels: Labels,
    hold_out: tuple[FloatArray, Labels],
    schedule: Schedule,
    *,
    resources: Resources,
    rng: np.random.Generator,
    until: float = math.inf,
) -> tuple[Scoring, ...]:
    """Train one victim and return what it finds in clean patches, from the first scoring to the last step.

    Args:
        graph: the untrained victim.
        images: ``(N, C, side, side)`` float32 in [0, 1]: what the attacker holds.
        labels: ``(N, side, side)`` class index, 0 for background.
        hold_out: clean patches that it never trains on, and their label maps.
        schedule: how it trains.
        resources: what its session may use.
        rng: order of the patches, mirrors and turns.
        until: reading of `time.monotonic` at which it gives up.

    Raises:
        OutOfTime: ``until`` came first.
        SelfTestError: ``non-finite`` when it diverged, ``runtime-failure``.
    """
    classes = graph.output_shape[0]
    step_graph = build_training_step(graph, loss=_LOSS, momentum=0.0)
    session = open_session(step_graph.model.SerializeToString(deterministic=True), resources)
    names = [output.name for output in session.get_outputs() if output.name != "logits"]
    state, optimiser = step_graph.initial_state(), _AdamW(schedule)
    history = []
    for step, (seen, wanted) in enumerate(_batches(images, labels, schedule, rng)):
        if time.monotonic() > until:
            raise OutOfTime
        feeds = state | {
            IMAGE: seen,
            TARGET: _one_hot(wanted, classes),
            LEARNING_RATE: np.array(0, np.float32),
        }
        outputs = run_step(session, names, feeds)
        state = optimiser.moved(step_graph.next_state(outputs), schedule.learning_rate(step))
        if schedule.scores_after(step):
            trained = replace(graph, model=fold_parameters(graph.model, step_graph.weights(state)))
            history.append(_scored(OnnxClassifier(trained, resources), *hold_out))
    return tuple(history)


class _AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), on the state of a training step."""

    def __init__(self, schedule: Schedule) -> None:
        self._keep, self._decay = schedule.momentum, schedule.weight_decay
        self._first: dict[str, FloatArray] = {}
        self._second: dict[str, FloatArray] = {}
        self._steps = 0

    def moved(self, state: Mapping[str, FloatArray], rate: float) -> dict[str, FloatArray]:
        """Return the state with every weight a step further down its gradient; statistics stay as they came."""
        self._steps += 1
        moved = dict(state)
        for velocity in (name for name in state if name.startswith(_VELOCITY)):
            name, gradient = velocity.removeprefix(_VELOCITY), state[velocity]
            first = _averaged(self._first.get(name), gradient, self._keep)
            second = _averaged(self._second.get(name), np.square(gradient), _SECOND_MOMENT)
            self._first[name], self._second[name] = first, second
            step = first / (1 - self._keep**self._steps)
            step /= np.sqrt(second / (1 - _SECOND_MOMENT**self._steps)) + _TINY
            moved[name] = np.asarray(state[name] - rate * (step + self._decay * state[name]), np.float32)
        return moved


def _averaged(before: FloatArray | None, now: FloatArray, keep: float) -> FloatArray:
    return np.asarray((0 if before is None else keep * before) + (1 - keep) * now, np.float32)


def _batches(
    images: FloatArray, labels: Labels, schedule: Schedule, rng: np.random.Generator
) -> Iterator[tuple[FloatArray, Labels]]:
    """Yield a batch per step, every patch once before any comes again; mirrored and turned at random."""
    left: list[int] = []
    for _ in range(schedule.steps):
        while len(left) < schedule.batch_size:
            left += rng.permutation(len(images)).tolist()
        chosen, left = left[: schedule.batch_size], left[schedule.batch_size :]
        turns, mirrored = int(rng.integers(4)), int(rng.choice((-1, 1)))
        yield (
            np.rot90(images[chosen][..., ::mirrored], turns, (-2, -1)),
            np.rot90(labels[chosen][..., ::mirrored], turns, (-2, -1)),
        )


def _one_hot(labels: Labels, classes: int) -> FloatArray:
    """Return ``(N, K, rows, columns)``."""
    return np.stack([labels == index for index in range(classes)], axis=1).astype(np.float32)


def _scored(victim: OnnxClassifier, images: FloatArray, labels: Labels) -> Scoring:
    """Return what it finds in every patch; a structure that is absent and not found counts 1."""
    logits = victim.logits(images)
    found, structures = logits.argmax(axis=1), range(1, logits.shape[1])
    return Scoring(
        dice=np.mean([dice(found == index, labels == index) for index in structures], axis=0),
        recoverable=recoverable_dice(softmax(logits, axis=1), labels).mean(axis=1),
    )
