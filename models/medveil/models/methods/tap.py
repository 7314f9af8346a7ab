"""TAP: targeted adversarial poisoning (Fowl et al., NeurIPS 2021, arXiv 2106.10807).

    min_{|d_i| <= eps}  L(f*(x_i + d_i), pi(y_i)),     f* trained on clean images, pi(y) = (y + 1) mod K

Images that carry another class's features under their own label: who learns from them learns the wrong thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medveil.models.errors import ConfigurationError
from medveil.models.methods.base import Batch, Method, MethodInfo, Settings
from medveil.models.methods.descent import descend, masked_budget
from medveil.models.methods.oracle import FloatArray, GradientOracle
from medveil.models.methods.projection import Budget
from medveil.models.methods.randomness import generator_for
from medveil.models.methods.targets import objective_for

__all__ = ["METHOD", "TapSettings", "perturb"]


@dataclass(frozen=True, kw_only=True)
class TapSettings(Settings):
    """Settings of TAP.

    Attributes:
        steps: 250, as published; ``step_size`` 0.064/8 of epsilon, as in the REM authors' port.
        restarts: descents per image, the best kept: the first from 0, the others from a point that the
            image's key draws. The authors make 8; 1 here, our choice for the cost.
    """

    steps: int = 250
    step_size: float = 0.008
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts < 1:
            raise ConfigurationError("setting", "The setting `restarts` must be at least 1.")


def perturb(batch: Batch, oracle: GradientOracle, settings: TapSettings) -> FloatArray:
    """PGD towards the permuted label on a finished model; of several restarts the least loss per image."""
    objective = objective_for("permuted", batch, oracle.classes, settings)
    budget = masked_budget(batch, objective, oracle, settings)
    best = descend(batch.images, objective, oracle, budget, settings)
    if settings.restarts == 1:
        return best
    least, _ = oracle.loss_and_gradient(batch.images + best, objective.targets)
    for restart in range(1, settings.restarts):
        start = _drawn(batch, budget, settings.seed, restart)
        delta = descend(batch.images, objective, oracle, budget, settings, start=start)
        losses, _ = oracle.loss_and_gradient(batch.images + delta, objective.targets)
        better = losses < least
        best[better], least = delta[better], np.minimum(least, losses)
    return best


def _drawn(batch: Batch, budget: Budget, seed: int, restart: int) -> FloatArray:
    """Return a point of the budget, drawn evenly by each image's key."""
    shape = budget.low.shape[1:]
    share = [generator_for(k, seed, f"tap-{restart}").random(shape, np.float32) for k in batch.keys]
    return budget.project(budget.low + np.stack(share) * (budget.high - budget.low))


METHOD = Method(
    info=MethodInfo(name="tap", title="TAP (targeted adversarial poisoning)", source="arXiv 2106.10807"),
    settings=TapSettings,
    frozen=perturb,
)
