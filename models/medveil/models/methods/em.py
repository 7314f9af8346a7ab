"""EM: error-minimising noise, sample-wise (Huang et al., ICLR 2021, arXiv 2101.04898).

    min_theta  E_i  min_{|d_i| <= eps}  L(f_theta(x_i + d_i), y_i)                                    (eq. 2)

Noise that leaves nothing to learn: the model's error is already small, so training on it finds no reason to
change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medveil.models.methods import cotraining
from medveil.models.methods.base import Batch, CoTraining, Method, MethodInfo, ProgressCallback, Settings
from medveil.models.methods.descent import descend, masked_budget
from medveil.models.methods.oracle import FloatArray, GradientOracle, TrainableOracle
from medveil.models.methods.projection import Budget
from medveil.models.methods.targets import objective_for

__all__ = ["METHOD", "EmSettings", "perturb", "protect_set"]


@dataclass(frozen=True, kw_only=True)
class EmSettings(Settings):
    """Settings of EM: 20 steps of eps/10 a round (the authors' sample-wise configuration), no mask."""

    training: CoTraining = field(default_factory=CoTraining)


def perturb(batch: Batch, oracle: GradientOracle, settings: EmSettings) -> FloatArray:
    """Frozen form: the inner minimisation alone, on a finished model. A baseline: it hardly transfers."""
    objective = objective_for("label", batch, oracle.classes, settings)
    budget = masked_budget(batch, objective, oracle, settings)
    return descend(batch.images, objective, oracle, budget, settings)


def protect_set(
    batch: Batch, oracle: TrainableOracle, settings: EmSettings, progress: ProgressCallback | None = None
) -> FloatArray:
    """Algorithm 1: M steps of the model, then T steps of every image's noise, until the error is small."""
    objective = objective_for("label", batch, oracle.classes, settings)
    budget: Budget | None = None

    def minimise(delta: FloatArray) -> FloatArray:
        nonlocal budget
        budget = budget or masked_budget(batch, objective, oracle, settings)
        return descend(batch.images, objective, oracle, budget, settings, start=delta)

    return cotraining.alternate(batch, oracle, settings, settings.training, minimise, progress)


METHOD = Method(
    info=MethodInfo(name="em", title="EM (error-minimising noise)", source="arXiv 2101.04898"),
    settings=EmSettings,
    frozen=perturb,
    cotrained=protect_set,
)
