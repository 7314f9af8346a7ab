"""onnxruntime sessions that answer a method's question: how does the loss change when the pixels change?"""

from __future__ import annotations

from medveil.agent.engine.forward import OnnxClassifier, OnnxGenerator
from medveil.agent.engine.opening import open_generator, open_oracle, open_trainable, prove
from medveil.agent.engine.oracles import OnnxOracle, OnnxTrainableOracle, TrainingSettings
from medveil.agent.engine.runtime import DeviceChoice, DeviceProbe, Resources, probe, resolve_device

__all__ = [
    "DeviceChoice",
    "DeviceProbe",
    "OnnxClassifier",
    "OnnxGenerator",
    "OnnxOracle",
    "OnnxTrainableOracle",
    "Resources",
    "TrainingSettings",
    "open_generator",
    "open_oracle",
    "open_trainable",
    "probe",
    "prove",
    "resolve_device",
]
