"""SALM: sparsity-aware local masking (Sun, Liu, Yan, Xu, Sun, arXiv 2403.10573).

Medical images are sparse: few pixels carry what a model learns. SALM spends the budget there only.

Of the paper its abstract could be read: perturb significant pixel regions instead of the whole image, and so
narrow the search. Mask rule, ratio, budget and steps are our reconstruction, settled by measurement
(``bench/results``):

    S_i = sum over warm-up steps of |dL/dx_i|, each step normalised    significance
    M_i = the k = ceil(r*H*W) pixels of largest S_i                    fixed once, shared by the channels
    co-trained:  min_theta sum_i min_{|d_i| <= eps} L(f_theta(x_i + M_i d_i), y_i)    as EM, 2101.04898
    frozen:      min_{|d_i| <= eps} L(f*(x_i + M_i d_i), pi(y_i))                     as TAP, 2106.10807

The frozen form is the recipe of a federated campaign: f* is a shared ensemble trained on clean public data,
pi one permutation of the labels for every site. Error-minimising noise hardly transfers from a finished
model; noise with a target does, to images and models never seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medveil.models.errors import ConfigurationError
from medveil.models.methods import cotraining, masks
from medveil.models.methods.base import Batch, CoTraining, Method, MethodInfo, ProgressCallback, Settings
from medveil.models.methods.descent import descend, masked_budget
from medveil.models.methods.hardening import Hardening
from medveil.models.methods.oracle import FloatArray, GradientOracle, TrainableOracle
from medveil.models.methods.projection import Budget, StepRule
from medveil.models.methods.targets import Objective, TargetKind, objective_for

__all__ = ["METHOD", "SalmSettings", "perturb", "protect_set"]


@dataclass(frozen=True, kw_only=True)
class SalmSettings(Settings):
    """Settings of SALM.

    Attributes:
        mask_ratio: 0.3 kept the effect of a full mask with a third of the pixels; 0.1 lost it.
        target: what the frozen form pushes towards (``targets.objective_for``).
        confidence: probability that the target puts on its class.
        amplitude: "even": all of epsilon inside the mask; "soft": in proportion to a pixel's significance.
        step_rule: "sign" of the gradient, or the "gradient" itself over its largest value.
        psnr_floor_db: lowest PSNR an image may end with; None: no floor.
        hardening: what the frozen form's noise is made to survive.
        training: turns of model and noise in the co-trained form.
    """

    mask_ratio: float = 0.3
    target: TargetKind = "permuted"
    confidence: float = 1.0
    amplitude: masks.Amplitude = "even"
    step_rule: StepRule = "sign"
    psnr_floor_db: float | None = None
    hardening: Hardening = field(default_factory=Hardening)
    training: CoTraining = field(default_factory=CoTraining)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.confidence <= 1:
            raise ConfigurationError("setting", "The setting `confidence` must be in (0, 1].")
        if self.target == "away" and self.hardening.adversary_radius:
            raise ConfigurationError("setting", "An adversary needs a target that it can push away from.")


def perturb(batch: Batch, oracle: GradientOracle, settings: SalmSettings) -> FloatArray:
    """Frozen form: targeted noise under a fixed mask, on a finished (ensemble of) model(s)."""
    oracle = settings.hardening.wrap(oracle)
    objective = objective_for(settings.target, batch, oracle.classes, settings, settings.confidence)
    budget = _significant(batch, objective, oracle, settings)
    return descend(batch.images, objective, oracle, budget, settings, rule=settings.step_rule)


def protect_set(
    batch: Batch, oracle: TrainableOracle, settings: SalmSettings, progress: ProgressCallback | None = None
) -> FloatArray:
    """Co-trained form: EM's min-min under a mask that is chosen once, after the first round of training."""
    objective = objective_for("label", batch, oracle.classes, settings)
    budget: Budget | None = None

    def minimise(delta: FloatArray) -> FloatArray:
        nonlocal budget
        budget = budget or _significant(batch, objective, oracle, settings)
        return descend(
            batch.images, objective, oracle, budget, settings, start=delta, rule=settings.step_rule
        )

    return cotraining.alternate(batch, oracle, settings, settings.training, minimise, progress)


def _significant(
    batch: Batch, objective: Objective, oracle: GradientOracle, settings: SalmSettings
) -> Budget:
    """Return the budget inside the mask M: where, and how much of epsilon, each image may change."""
    return masked_budget(
        batch,
        objective,
        oracle,
        settings,
        amplitude=settings.amplitude,
        psnr_floor_db=settings.psnr_floor_db,
    )


METHOD = Method(
    info=MethodInfo(
        name="salm",
        title="SALM (sparsity-aware local masking)",
        source="arXiv 2403.10573; reconstructed from its abstract, choices settled by our measurements",
    ),
    settings=SalmSettings,
    frozen=perturb,
    cotrained=protect_set,
)
