"""EM, class-wise: one error-minimising pattern per class (Huang et al., arXiv 2101.04898, section 3.2).

A baseline, not a product: every image of a class carries the same pattern, and one average removes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from medveil.models.methods import cotraining, masks
from medveil.models.methods.base import (
    Batch,
    CoTraining,
    IntArray,
    Method,
    MethodInfo,
    ProgressCallback,
    Settings,
)
from medveil.models.methods.descent import gradient_at, saliency
from medveil.models.methods.oracle import FloatArray, TrainableOracle
from medveil.models.methods.projection import Budget, at_most, step_direction
from medveil.models.methods.randomness import generator_for
from medveil.models.methods.targets import objective_for

__all__ = ["METHOD", "ClasswiseSettings", "protect_set"]


@dataclass(frozen=True, kw_only=True)
class ClasswiseSettings(Settings):
    """Settings of class-wise EM; the defaults are the authors' configuration.

    Attributes:
        steps: 1 a round.
        subset: share of the set whose gradients move the patterns in one step.
        training: stops at an error of 0.1, and after 12 rounds at the earliest (our choice: at one step a round
            of a tenth of epsilon, eight rounds cannot fill the budget).
    """

    steps: int = 1
    subset: float = 0.2
    training: CoTraining = field(default_factory=lambda: CoTraining(error_target=0.1, rounds_min=12))


def protect_set(
    batch: Batch,
    oracle: TrainableOracle,
    settings: ClasswiseSettings,
    progress: ProgressCallback | None = None,
) -> FloatArray:
    """Algorithm 1 with a noise per class: M steps of the model, then T steps of the patterns."""
    objective = objective_for("label", batch, oracle.classes, settings)
    alpha = at_most(settings.step_size * settings.epsilon)
    rng = generator_for(b"", settings.seed, "em_classwise")
    count = max(1, round(settings.subset * len(batch)))
    budget: Budget | None = None
    patterns = np.zeros((oracle.classes, 1, *batch.images.shape[2:]), np.float32)

    def of_class(steps: int) -> FloatArray:
        """Significance of each pixel for the image's whole class: one mask per class."""
        scores = saliency(batch.images, objective, oracle, settings, steps, room=batch.room)
        return _class_means(scores, batch.labels, oracle.classes)[batch.labels]

    def minimise(delta: FloatArray) -> FloatArray:
        nonlocal budget, patterns
        if budget is None:
            weight = masks.weights(batch, settings, of_class)
            budget = Budget.of(batch.images, settings, weight, room=batch.room)
        for _ in range(settings.steps):
            some = np.sort(rng.choice(len(batch), count, replace=False))
            gradient = gradient_at((batch.images + delta)[some], objective.targets[some], oracle)
            mean = _class_means(budget.pull(gradient), batch.labels[some], oracle.classes)
            patterns = np.clip(patterns - alpha * step_direction(mean), -settings.epsilon, settings.epsilon)
            delta = budget.project(patterns[batch.labels])
        return delta

    return cotraining.alternate(batch, oracle, settings, settings.training, minimise, progress)


def _class_means(values: FloatArray, labels: IntArray, classes: int) -> FloatArray:
    """Return the mean of ``values`` (N, ...) over each class, ``(classes, ...)``; 0 for an empty class."""
    means = np.zeros((classes, *values.shape[1:]), np.float32)
    for label in np.unique(labels):
        means[label] = values[labels == label].mean(axis=0)
    return means


METHOD = Method(
    info=MethodInfo(
        name="em-classwise", title="EM, one pattern per class", source="arXiv 2101.04898, section 3.2"
    ),
    settings=ClasswiseSettings,
    cotrained=protect_set,
)
