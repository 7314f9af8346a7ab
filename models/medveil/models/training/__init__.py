"""Train the surrogates of a bundle with torch, and measure the noise that they make."""

from __future__ import annotations

from medveil.models.training.fit import Examples, seconds_per_epoch
from medveil.models.training.oracle import TorchOracle, TrainableTorchOracle
from medveil.models.training.plan import DEFAULT_PLAN, Augmentation, Member, Plan
from medveil.models.training.proxy import check_noise, protect
from medveil.models.training.state import TrainingState, state_folder, training_identity
from medveil.models.training.surrogates import Reporter, Surrogate, parameters, plan_epochs, train_ensemble

__all__ = [
    "DEFAULT_PLAN",
    "Augmentation",
    "Examples",
    "Member",
    "Plan",
    "Reporter",
    "Surrogate",
    "TorchOracle",
    "TrainableTorchOracle",
    "TrainingState",
    "check_noise",
    "parameters",
    "plan_epochs",
    "protect",
    "seconds_per_epoch",
    "state_folder",
    "train_ensemble",
    "training_identity",
]
