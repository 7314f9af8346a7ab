"""How each operator passes a gradient back: one small pure function per operator, by family."""

from __future__ import annotations

from medveil.models.autodiff.rules import (
    convolution,
    elementwise,
    linear,
    normalization,
    pooling,
    reduction,
    resampling,
    shaping,
)
from medveil.models.autodiff.rules.registry import RULES, Context, Dialect, Rule

__all__ = [
    "RULES",
    "Context",
    "Dialect",
    "Rule",
    "convolution",
    "elementwise",
    "linear",
    "normalization",
    "pooling",
    "reduction",
    "resampling",
    "shaping",
]
