"""The one place that touches onnxruntime: which device, which options, what it may say and to whom."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from medveil.models.errors import ConfigurationError, SelfTestError

__all__ = ["Device", "DeviceChoice", "DeviceProbe", "Resources", "open_session", "probe", "resolve_device"]

Device = Literal["cpu", "cuda"]
"""Where a session runs."""

DeviceChoice = Literal["auto", "cpu", "cuda"]
"""What a caller may ask for; ``auto`` takes CUDA where onnxruntime has it, else the CPU."""

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"

_FATAL_ONLY: Final = 4
"""onnxruntime's highest log level: its warnings name paths and devices and belong on no steward's screen. What goes
wrong reaches us as an exception."""


@dataclass(frozen=True)
class Resources:
    """What one session may use; no result depends on ``threads`` or ``memory_budget_bytes``.

    Attributes:
        device: where it runs.
        threads: processor threads to keep busy.
        memory_budget_bytes: for the weights and the images in work.
    """

    device: Device
    threads: int
    memory_budget_bytes: int


@dataclass(frozen=True)
class DeviceProbe:
    """What this machine offers, for ``doctor``.

    Attributes:
        runtime_version: of onnxruntime.
        providers: execution providers of the installed onnxruntime, in its own order.
        device: what ``auto`` means here.
        threads: processor threads this process may use.
        memory_bytes: main memory that is free for use now, 0 where the system does not say.
    """

    runtime_version: str
    providers: tuple[str, ...]
    device: Device
    threads: int
    memory_bytes: int


def probe() -> DeviceProbe:
    """Look at the machine; starts no session."""
    runtime = _runtime()
    return DeviceProbe(
        runtime_version=str(runtime.__version__),
        providers=tuple(runtime.get_available_providers()),
        device=resolve_device("auto"),
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_available_memory_bytes(),
    )


def resolve_device(choice: DeviceChoice) -> Device:
    """Turn a choice into a device.

    Raises:
        ConfigurationError: ``no-cuda`` when CUDA is asked for and the installed onnxruntime lacks it, ``device`` for
            an unknown name.
    """
    if choice not in ("auto", "cpu", "cuda"):
        raise ConfigurationError("device", "The device must be auto, cpu or cuda.")
    has_cuda = _CUDA in _runtime().get_available_providers()
    if choice == "cuda" and not has_cuda:
        raise ConfigurationError(
            "no-cuda",
            "onnxruntime has no CUDA here: install medveil with the extra [gpu] in place of onnxruntime, "
            "or use --device cpu.",
        )
    return "cuda" if has_cuda and choice != "cpu" else "cpu"


def open_session(model: bytes, resources: Resources) -> Any:
    """Open a session that computes one call on one thread.

    One thread per call, because a result must not depend on the number of threads: onnxruntime splits work by it,
    and where it splits a sum it rounds differently. :class:`medveil.agent.engine.batching.BatchRunner` keeps the
    other threads busy with other images.

    Args:
        model: a graph that medveil emitted; never received bytes.
        resources: where it runs; on a GPU the budget is enforced, on the CPU the caller's batches keep it.

    Raises:
        ConfigurationError: ``no-cuda`` when CUDA is there but cannot be used (driver, cuDNN).
        SelfTestError: ``runtime-failure`` when onnxruntime refuses the graph.
    """
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    # Memory patterns double what a session takes (ViT: 45 against 21 MiB) and gained no speed in any net measured.
    options.enable_mem_pattern = False
    options.log_severity_level = _FATAL_ONLY
    try:
        session = runtime.InferenceSession(model, options, providers=_providers(resources), enable_fallback=0)
    except Exception as exc:  # onnxruntime's error classes share no root but Exception
        if resources.device == "cuda":
            raise _unusable_cuda(str(exc)) from exc
        public = (
            "onnxruntime cannot run a gradient graph on this machine; update onnxruntime or report the model."
        )
        raise SelfTestError("runtime-failure", public, private=str(exc)) from exc
    if resources.device == "cuda" and session.get_providers()[0] != _CUDA:
        raise _unusable_cuda("the session fell back to " + session.get_providers()[0])
    return session


def _unusable_cuda(detail: str) -> ConfigurationError:
    public = "CUDA cannot be used here: check the NVIDIA driver, CUDA and cuDNN, or use --device cpu."
    return ConfigurationError("no-cuda", public, private=detail)


def _providers(resources: Resources) -> list[str | tuple[str, Mapping[str, str]]]:
    if resources.device == "cpu":
        return [_CPU]
    cuda = {
        # A fixed convolution algorithm: the other choices time several and take the fastest of the day.
        "cudnn_conv_algo_search": "DEFAULT",
        "use_tf32": "0",  # ten bits of mantissa: its gradients fail the golden vector
        "gpu_mem_limit": str(resources.memory_budget_bytes),
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [(_CUDA, cuda), _CPU]  # shape arithmetic runs on the CPU in every CUDA session


@functools.cache
def _runtime() -> Any:
    """Import onnxruntime on first use (it takes longer than all else together) and make it keep to itself."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL_ONLY)
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _available_memory_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
