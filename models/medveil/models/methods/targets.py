"""What the noise pushes a model towards: labels, permuted labels, and soft versions of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medveil.models.errors import ConfigurationError
from medveil.models.methods.base import Batch, IntArray, Settings
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.randomness import generator_for

__all__ = ["Objective", "TargetKind", "objective_for", "one_hot", "permutation_for", "soften"]

TargetKind = Literal["permuted", "label", "away", "uniform", "random"]


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss that the noise minimises: ``sign`` times the cross-entropy towards ``targets``.

    Attributes:
        targets: ``(N, K)`` float32, rows sum to 1.
        sign: +1 to approach the targets, -1 to leave them.
    """

    targets: FloatArray
    sign: Literal[-1, 1] = 1


def one_hot(labels: IntArray, classes: int) -> FloatArray:
    """Return ``labels`` (N,) as distributions ``(N, classes)``."""
    return np.eye(classes, dtype=np.float32)[labels]


def soften(targets: FloatArray, confidence: float) -> FloatArray:
    """Return ``targets`` with ``confidence`` on them and the rest spread evenly over all classes."""
    classes = targets.shape[1]
    return np.asarray(confidence * targets + (1 - confidence) / classes, np.float32)


def permutation_for(permutation: Sequence[int] | None, classes: int) -> IntArray:
    """Return the class that each class is pushed towards, ``(classes,)``.

    None means the next class, ``(y + 1) mod K`` (TAP: arXiv 2106.10807).

    Raises:
        ConfigurationError: "permutation": not a permutation of the classes, or it leaves a class in place
            (noise towards the true class would help whoever trains on it).
    """
    chosen = (
        np.roll(np.arange(classes), -1) if permutation is None else np.asarray(permutation, dtype=np.int64)
    )
    if sorted(chosen.tolist()) != list(range(classes)) or (chosen == np.arange(classes)).any():
        raise ConfigurationError(
            "permutation", f"The permutation must rearrange the {classes} classes and leave none in place."
        )
    return chosen.astype(np.int64)


def objective_for(
    kind: TargetKind, batch: Batch, classes: int, settings: Settings, confidence: float = 1.0
) -> Objective:
    """Return the objective of every image.

    Args:
        kind: "permuted": towards ``permutation[label]`` (error-maximising with a fixed aim, what protects on
            a frozen model); "label": towards the label (error-minimising, for co-training); "away": away from
            the label; "uniform": towards no class; "random": a wrong class drawn per image (a control:
            without a consistent permutation the noise cancels).
        batch: gives labels and keys.
        classes: K of the surrogate.
        settings: gives permutation and seed.
        confidence: probability put on the aim, in (0, 1]; the rest is spread evenly.
    """
    labels = batch.labels
    if kind == "uniform":
        return Objective(np.full((len(batch), classes), 1 / classes, np.float32))
    if kind == "permuted":
        labels = permutation_for(settings.permutation, classes)[labels]
    elif kind == "random":
        offsets = [generator_for(key, settings.seed, "target").integers(1, classes) for key in batch.keys]
        labels = (labels + np.asarray(offsets, dtype=np.int64)) % classes
    return Objective(soften(one_hot(labels, classes), confidence), -1 if kind == "away" else 1)
