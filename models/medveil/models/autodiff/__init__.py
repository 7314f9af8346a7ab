"""Reverse-mode differentiation of ONNX graphs, in ONNX.

A received forward graph is read into our own values (`graph`), followed backwards with one small rule per
operator (`rules`) and written as a new graph (`emit`) that plain onnxruntime runs: loss and input gradient
(`gradient`) or a whole training step (`training`). Needs onnx and NumPy only.
"""

from __future__ import annotations

from medveil.models.autodiff.gradient import build_gradient
from medveil.models.autodiff.graph import Graph, Node, parse, to_opset20
from medveil.models.autodiff.operators import OPERATORS
from medveil.models.autodiff.training import TrainingGraph, build_training_step, fold_parameters

__all__ = [
    "OPERATORS",
    "Graph",
    "Node",
    "TrainingGraph",
    "build_gradient",
    "build_training_step",
    "fold_parameters",
    "parse",
    "to_opset20",
]
