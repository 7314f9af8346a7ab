"""Admission in a child process that may be killed: bytes from elsewhere meet onnx's C++ code here and nowhere else.

The child is this interpreter in isolated mode, in an empty folder, with an empty environment, no file it could
write, and limits on memory and time that it sets on itself before it reads the first foreign byte. It bounds what a
hostile file can consume, and it turns a crash into a refusal; it is not a jail against code that has taken over the
child, which would still run as the same user.

Wire format, child to parent: eight bytes with the length of a JSON object, that object, the admitted graph.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

import onnx

from medveil.models.autodiff.admission import AdmittedGraph, Limits, Role, admit
from medveil.models.errors import AdmissionError, ConfigurationError

__all__ = ["MEMORY_BYTES", "TIMEOUT_S", "admit_in_child"]

MEMORY_BYTES: Final = 5 << 30
"""Default memory of the child: enough for the largest file that is admitted by default."""

_BYTES_PER_FILE_BYTE: Final = 8
_BASE_BYTES: Final = 64 << 20
"""What checking a sound graph takes: measured under 6 times its size (ResNet-18: 256 MiB for 43) and 20 MiB; rounded
up, because protobuf's allocator crashes rather than fails when memory runs out in the wrong moment."""

TIMEOUT_S: Final = 60.0
"""Default time of the child, our choice: ResNet-18 was measured at 0.7 s on an idle core, 1.5 s on a busy one."""

_HEADER_BYTES: Final = 8
_DETAIL_CHARACTERS: Final = 2000  # of a dead child's last words, for the site's own log
_SERVE: Final = "from medveil.models.autodiff.sandbox import _serve; _serve()"


def admit_in_child(
    data: bytes,
    limits: Limits | None = None,
    *,
    role: Role = "surrogate",
    memory_bytes: int = MEMORY_BYTES,
    timeout_s: float = TIMEOUT_S,
) -> AdmittedGraph:
    """Run :func:`medveil.models.autodiff.admission.admit` in a child process with limits, and return its result.

    Args:
        data: the bytes of an ONNX ``ModelProto``, from anywhere.
        limits: the largest graph to admit.
        role: which inputs and outputs the graph must have.
        memory_bytes: what the child may take beyond its interpreter and libraries.
        timeout_s: processor time and wall-clock time of the child, each.

    Raises:
        AdmissionError: the graph breaks a rule (``code`` names it), or the child went beyond its ``memory`` or
            ``timeout``, or died in a ``crash``.
        ConfigurationError: ``sandbox-unavailable`` where the system has no resource limits.
    """
    limits = limits or Limits()
    if len(data) > limits.file_bytes:  # what is refused anyway need not travel
        admit(data, limits, role=role)
    if _BYTES_PER_FILE_BYTE * len(data) + _BASE_BYTES > memory_bytes:
        raise _memory(memory_bytes)
    task = json.dumps(
        {"limits": asdict(limits), "role": role, "memory_bytes": memory_bytes, "cpu_s": math.ceil(timeout_s)}
    )
    with tempfile.TemporaryDirectory(prefix="medveil-admission-") as empty_folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _SERVE, task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=empty_folder,
            env=_environment(),
            start_new_session=True,
        )
        try:
            answer, last_words = child.communicate(data, timeout=timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise _timeout(timeout_s) from exc
        finally:
            _end(child)
    if child.returncode != 0 or not answer:
        _raise_for_death(child.returncode, last_words, memory_bytes, timeout_s)
    return _unpack(answer)


def _environment() -> dict[str, str]:
    """Return the child's whole environment: nothing of ours, and one thread per library (threads cost memory)."""
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if root := os.environ.get("SYSTEMROOT"):  # Windows starts no process without it
        environment["SYSTEMROOT"] = root
    return environment


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
        child.communicate()


def _timeout(timeout_s: float) -> AdmissionError:
    return AdmissionError(
        "timeout", f"The graph could not be checked within {timeout_s:g} s; ship a smaller model."
    )


def _raise_for_death(returncode: int, last_words: bytes, memory_bytes: int, timeout_s: float) -> NoReturn:
    """Say why a child died that could not say it itself."""
    detail = last_words.decode("utf-8", errors="replace")[-_DETAIL_CHARACTERS:]
    if returncode in (-signal.SIGXCPU, -signal.SIGALRM):
        raise _timeout(timeout_s)
    # SIGKILL that is not ours comes from the kernel when memory runs out.
    if returncode == -signal.SIGKILL or "bad_alloc" in detail or "MemoryError" in detail:
        raise _memory(memory_bytes, detail)
    if "sandbox-unavailable" in detail:
        raise ConfigurationError(
            "sandbox-unavailable", "This system cannot limit a process; run medveil on Linux.", private=detail
        )
    public = "The graph crashed the program that checks it, or took all its memory; do not use it."
    raise AdmissionError("crash", public, private=detail)


def _memory(memory_bytes: int, detail: str = "") -> AdmissionError:
    public = (
        f"The graph could not be checked within {memory_bytes >> 20} MiB of memory; ship a smaller model."
    )
    return AdmissionError("memory", public, private=detail)


# --- In the child ---------------------------------------------------------------------------------------------


def _serve() -> None:
    """Admit the graph on standard input under the limits in the first argument; answer on standard output."""
    task = json.loads(sys.argv[1])
    faulthandler.enable()  # a crash names the place where it happened, for the site's log
    beyond = _address_space_bytes("VmSize") + task["memory_bytes"]
    _limit_myself(beyond, task["cpu_s"])
    data = sys.stdin.buffer.read()
    try:
        admitted = admit(data, Limits(**task["limits"]), role=task["role"])
        summary = {
            "input_shape": admitted.input_shape,
            "output_shape": admitted.output_shape,
            "operators": admitted.operators,
            "parameters": admitted.parameters,
            "flops": admitted.flops,
            "activation_bytes": admitted.activation_bytes,
            "target_shape": admitted.target_shape,
        }
        graph = admitted.model.SerializeToString(deterministic=True)
    except AdmissionError as exc:
        # Libraries translate a failed allocation into errors of their own (protobuf: "error parsing message").
        exhausted = _address_space_bytes("VmPeak") > beyond - task["memory_bytes"] // 2
        if exc.code == "unparsable" and exhausted:
            exc = _memory(task["memory_bytes"])
        summary, graph = {"refused": [exc.code, exc.public, exc.private[:_DETAIL_CHARACTERS]]}, b""
    except MemoryError:
        refusal = _memory(task["memory_bytes"])
        summary, graph = {"refused": [refusal.code, refusal.public, refusal.private]}, b""
    _write(sys.stdout.buffer, summary, graph)


def _limit_myself(address_space_bytes: int, cpu_s: int) -> None:
    try:
        import resource
    except ImportError:
        sys.exit("sandbox-unavailable")
    for limit, value, margin in (
        (resource.RLIMIT_AS, address_space_bytes, 0),
        # At the hard limit the kernel sends SIGKILL, as it does when memory runs out; a second before, SIGXCPU.
        (resource.RLIMIT_CPU, cpu_s, 1),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        soft, hard = value, value + margin
        inherited = resource.getrlimit(limit)[1]
        if inherited != resource.RLIM_INFINITY:
            soft, hard = min(soft, inherited), min(hard, inherited)
        resource.setrlimit(limit, (soft, hard))


def _address_space_bytes(field: str) -> int:
    """Return the address space this process holds (``VmSize``) or held at most (``VmPeak``); Linux only."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        sys.exit("sandbox-unavailable")
    return int(status.partition(f"{field}:")[2].split()[0]) << 10


def _write(stream: BinaryIO, summary: dict[str, object], graph: bytes) -> None:
    text = json.dumps(summary, sort_keys=True).encode()
    stream.write(len(text).to_bytes(_HEADER_BYTES, "little"))
    stream.write(text)
    stream.write(graph)
    stream.flush()


# --- Back in the parent ---------------------------------------------------------------------------------------


def _unpack(answer: bytes) -> AdmittedGraph:
    end = _HEADER_BYTES + int.from_bytes(answer[:_HEADER_BYTES], "little")
    summary = json.loads(answer[_HEADER_BYTES:end])
    if "refused" in summary:
        code, public, private = summary["refused"]
        raise AdmissionError(code, public, private=private)
    target = summary["target_shape"]
    return AdmittedGraph(
        model=onnx.ModelProto.FromString(memoryview(answer)[end:].tobytes()),
        input_shape=_shape(summary["input_shape"]),
        output_shape=_shape(summary["output_shape"]),
        operators=tuple(summary["operators"]),
        parameters=summary["parameters"],
        flops=summary["flops"],
        activation_bytes=summary["activation_bytes"],
        target_shape=None if target is None else _shape(target),
    )


def _shape(extents: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(extent) for extent in extents)
