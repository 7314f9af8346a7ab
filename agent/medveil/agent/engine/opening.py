"""From received bytes to an oracle that has proved itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from medveil.agent.engine.forward import OnnxGenerator
from medveil.agent.engine.oracles import OnnxOracle, OnnxTrainableOracle, TrainingSettings
from medveil.agent.engine.runtime import DeviceChoice, Resources, resolve_device
from medveil.models.autodiff.admission import Limits
from medveil.models.autodiff.sandbox import admit_in_child
from medveil.models.autodiff.selfcheck import (
    GoldenVector,
    check_golden,
    directional_check,
    independence_check,
)
from medveil.models.errors import ConfigurationError
from medveil.models.methods.oracle import EnsembleOracle, GradientOracle

__all__ = ["open_generator", "open_oracle", "open_trainable", "prove"]

_PROOF_SEED: Final = 20_240_310  # of the self-check's images and directions: the same proof on every machine


def open_oracle(
    graphs: Sequence[tuple[str, bytes, GoldenVector | None]],
    *,
    device: DeviceChoice = "auto",
    threads: int,
    memory_budget_bytes: int,
    loss: str = "cross_entropy",
    limits: Limits | None = None,
) -> GradientOracle:
    """Open a bundle's surrogates as one oracle: admitted in a child process, differentiated, run, and proved.

    The answer has the same bits whatever ``threads``, ``memory_budget_bytes`` and the batches it is asked in.

    Args:
        graphs: name, received bytes and golden vector (``None``: the bundle has none) of each surrogate.
        device: ``auto`` takes CUDA where there is one; ``cuda`` never falls back.
        threads: processor threads to keep busy.
        memory_budget_bytes: memory for all sessions together.
        loss: ``"cross_entropy"``, or ``"cross_entropy_dice"`` for segmentation.
        limits: the largest graph to admit.

    Returns:
        The ensemble of all surrogates (of one too, so that every campaign scales gradients alike).

    Raises:
        AdmissionError: a graph breaks an admission rule.
        SelfTestError: a session does not reproduce its golden vector, or its gradient is wrong.
        ConfigurationError: ``no-surrogates``, ``no-cuda``, ``memory-budget``, ``threads`` or ``loss``.
    """
    if not graphs:
        raise ConfigurationError("no-surrogates", "The bundle holds no surrogate; choose another bundle.")
    resources = Resources(resolve_device(device), threads, memory_budget_bytes // len(graphs))
    members = []
    for name, data, golden in graphs:
        oracle = OnnxOracle(name, admit_in_child(data, limits), resources, loss=loss)
        prove(oracle, golden)
        members.append(oracle)
    return EnsembleOracle(members)


def open_trainable(
    name: str,
    data: bytes,
    golden: GoldenVector | None,
    *,
    device: DeviceChoice = "auto",
    threads: int,
    memory_budget_bytes: int,
    loss: str = "cross_entropy",
    training: TrainingSettings | None = None,
    limits: Limits | None = None,
) -> OnnxTrainableOracle:
    """Open one surrogate that will be trained on; admitted and proved, at its received weights, as by `open_oracle`.

    Raises:
        AdmissionError, SelfTestError, ConfigurationError: as :func:`open_oracle`.
    """
    resources = Resources(
        resolve_device(device), threads, memory_budget_bytes // 2
    )  # two sessions: step and gradient
    oracle = OnnxTrainableOracle(name, admit_in_child(data, limits), resources, training, loss=loss)
    prove(oracle.freeze(), golden)
    return oracle


def open_generator(
    data: bytes,
    *,
    device: DeviceChoice = "auto",
    threads: int,
    memory_budget_bytes: int,
    limits: Limits | None = None,
) -> OnnxGenerator:
    """Open a bundle's noise generator: admitted in a child process, run from a graph of our own.

    Nothing about it needs proof: what it answers is only a proposal, and the site enforces the budget on it.

    Raises:
        AdmissionError: the graph breaks an admission rule.
        ConfigurationError: ``no-cuda``, ``memory-budget`` or ``threads``.
    """
    resources = Resources(resolve_device(device), threads, memory_budget_bytes)
    return OnnxGenerator(admit_in_child(data, limits, role="generator"), resources)


def prove(oracle: OnnxOracle, golden: GoldenVector | None) -> None:
    """Let a session prove itself: golden vector, directional derivative, independence of the batch.

    Raises:
        SelfTestError: whatever it fails first.
    """
    rng = np.random.default_rng(_PROOF_SEED)
    if golden is not None:
        check_golden(oracle, golden, name=oracle.name)
    directional_check(oracle, rng, name=oracle.name, target_shape=oracle.target_shape)
    independence_check(oracle, rng, name=oracle.name, target_shape=oracle.target_shape)
