"""Surrogate architectures: small, fast on a CPU, and different enough to stand in for an unknown attacker."""

from __future__ import annotations

from medveil.models.nets.factory import ARCHITECTURES, build

__all__ = ["ARCHITECTURES", "build"]
