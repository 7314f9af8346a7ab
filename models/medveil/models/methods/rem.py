"""REM: robust error-minimising noise (Fu et al., ICLR 2022, arXiv 2203.14533).

    min_theta  E_i  min_{|d| <= rho_u}  E_{t ~ T}  max_{|a| <= rho_a}  L(f_theta(t(x_i + d) + a), y_i)
    (eq. 5)

EM whose surrogate is trained adversarially, and whose noise is made for images that are cropped, mirrored and
attacked after it. The authors take one noise step per mini-batch; here model and noise take turns as in EM,
and one drawn view serves the whole set (both our choice: a site's set is small, and the loop is shared).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from medveil.models.errors import ConfigurationError
from medveil.models.methods import cotraining
from medveil.models.methods.base import Batch, CoTraining, Method, MethodInfo, ProgressCallback, Settings
from medveil.models.methods.descent import descend, masked_budget
from medveil.models.methods.hardening import AdversarialOracle, ExpectationOracle
from medveil.models.methods.oracle import FloatArray, TrainableOracle
from medveil.models.methods.projection import Budget
from medveil.models.methods.randomness import generator_for
from medveil.models.methods.targets import objective_for
from medveil.models.methods.transforms import Compose, Flip, Shift, Transform

__all__ = ["METHOD", "RemSettings", "protect_set"]


@dataclass(frozen=True, kw_only=True)
class RemSettings(Settings):
    """Settings of REM; the defaults are the authors' for 32-pixel images.

    Attributes:
        steps: 10 a round, of ``step_size`` 1.6/8 of epsilon.
        adversary_radius: rho_a, half of epsilon.
        adversary_steps: steps of the inner attack.
        samples: views t averaged in one step of the noise.
        crop_padding: largest shift of a view, in pixels (a crop after padding).
    """

    steps: int = 10
    step_size: float = 0.2
    adversary_radius: float = 4 / 255
    adversary_steps: int = 10
    samples: int = 5
    crop_padding: int = 4
    training: CoTraining = field(default_factory=CoTraining)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.crop_padding < 0:
            raise ConfigurationError("setting", "REM needs at least one sample and no negative padding.")


def protect_set(
    batch: Batch, oracle: TrainableOracle, settings: RemSettings, progress: ProgressCallback | None = None
) -> FloatArray:
    """EM's turns, with the adversary between noise and model in both of them."""
    objective = objective_for("label", batch, oracle.classes, settings)
    adversary = AdversarialOracle(oracle, settings.adversary_radius, settings.adversary_steps)
    rng = generator_for(b"", settings.seed, "rem")
    one_step = replace(settings, steps=1)
    budget: Budget | None = None

    def attack(images: FloatArray, targets: FloatArray) -> FloatArray:
        return adversary.attacked(_draw_view(rng, settings.crop_padding).apply(images), targets)

    def minimise(delta: FloatArray) -> FloatArray:
        nonlocal budget
        budget = budget or masked_budget(batch, objective, adversary, settings)
        for _ in range(settings.steps):
            views = [_draw_view(rng, settings.crop_padding) for _ in range(settings.samples)]
            expectation = ExpectationOracle(adversary, views)
            delta = descend(batch.images, objective, expectation, budget, one_step, start=delta)
        return delta

    return cotraining.alternate(batch, oracle, settings, settings.training, minimise, progress, view=attack)


def _draw_view(rng: np.random.Generator, padding: int) -> Transform:
    down, right = (int(move) for move in rng.integers(-padding, padding, size=2, endpoint=True))
    shift = Shift(down, right)
    return Compose(shift, Flip()) if rng.random() < 0.5 else shift


METHOD = Method(
    info=MethodInfo(name="rem", title="REM (robust error-minimising noise)", source="arXiv 2203.14533"),
    settings=RemSettings,
    cotrained=protect_set,
)
