"""From a torch net to the ONNX bytes and the golden vector that a bundle carries."""

from __future__ import annotations

from medveil.models.export.golden import golden_vector
from medveil.models.export.onnx import to_onnx

__all__ = ["golden_vector", "to_onnx"]
