"""Devices are chosen in the open: what is asked for is what runs, or the call is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from medveil.agent.engine import OnnxOracle, Resources, open_oracle, probe, resolve_device
from medveil.models.autodiff.admission import AdmittedGraph
from medveil.models.errors import ConfigurationError

HAS_CUDA = "CUDAExecutionProvider" in probe().providers
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="onnxruntime has no CUDA provider on this machine")


def test_the_probe_says_what_the_machine_offers() -> None:
    seen = probe()
    assert "CPUExecutionProvider" in seen.providers
    assert seen.threads >= 1
    assert seen.memory_bytes >= 0
    assert seen.device == ("cuda" if HAS_CUDA else "cpu")


def test_the_cpu_can_always_be_asked_for() -> None:
    assert resolve_device("cpu") == "cpu"


@pytest.mark.skipif(HAS_CUDA, reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none_and_never_replaced(net: Callable[..., bytes]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_oracle([("cnn", net("cnn"), None)], device="cuda", threads=1, memory_budget_bytes=1 << 30)
    assert caught.value.code == "no-cuda"
    assert "--device cpu" in caught.value.public
    assert resolve_device("auto") == "cpu"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="device"):
        resolve_device("tpu")  # type: ignore[arg-type]


def test_importing_the_engine_loads_no_runtime_and_no_torch() -> None:
    code = "import sys, medveil.agent.engine; print({'onnxruntime', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@needs_cuda
@pytest.mark.parametrize("name", ["cnn", "mlp", "vit", "segmenter"])
def test_cuda_agrees_with_the_cpu_and_repeats_itself(
    net: Callable[..., bytes], admitted: Callable[..., AdmittedGraph], name: str
) -> None:
    graph = admitted(name)
    rng = np.random.default_rng(0)
    images = rng.random((40, *graph.input_shape), np.float32)
    targets = np.zeros((40, *graph.output_shape), np.float32)
    targets[:, 0] = 1
    oracle = open_oracle([(name, net(name), None)], device="cuda", threads=1, memory_budget_bytes=1 << 30)
    first, again = (oracle.loss_and_gradient(images, targets)[1] for _ in range(2))
    assert first.tobytes() == again.tobytes()
    _, on_gpu = OnnxOracle(name, graph, Resources("cuda", 1, 1 << 30)).loss_and_gradient(images, targets)
    _, on_cpu = OnnxOracle(name, graph, Resources("cpu", 1, 1 << 30)).loss_and_gradient(images, targets)
    assert np.linalg.norm(on_gpu - on_cpu) < 1e-3 * np.linalg.norm(on_cpu)
