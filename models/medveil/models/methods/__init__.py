"""How a perturbation is made: pure functions over arrays that ask a ``GradientOracle``.

``get("salm").perturb(batch, oracle, SalmSettings(...))`` returns the signed noise of a batch.
"""

from __future__ import annotations

from medveil.models.methods.base import (
    Batch,
    BoolArray,
    CoTraining,
    IntArray,
    Method,
    MethodInfo,
    Need,
    Progress,
    ProgressCallback,
    Settings,
)
from medveil.models.methods.hardening import AdversarialOracle, ExpectationOracle, Hardening
from medveil.models.methods.oracle import EnsembleOracle, FloatArray, GradientOracle, TrainableOracle
from medveil.models.methods.registry import REGISTRY, get
from medveil.models.methods.salm import SalmSettings
from medveil.models.methods.transforms import (
    Blur,
    Channels,
    Compose,
    Flip,
    Resize,
    Shift,
    Transform,
    TransformedOracle,
)

__all__ = [
    "REGISTRY",
    "AdversarialOracle",
    "Batch",
    "Blur",
    "BoolArray",
    "Channels",
    "CoTraining",
    "Compose",
    "EnsembleOracle",
    "ExpectationOracle",
    "Flip",
    "FloatArray",
    "GradientOracle",
    "Hardening",
    "IntArray",
    "Method",
    "MethodInfo",
    "Need",
    "Progress",
    "ProgressCallback",
    "Resize",
    "SalmSettings",
    "Settings",
    "Shift",
    "TrainableOracle",
    "Transform",
    "TransformedOracle",
    "get",
]
