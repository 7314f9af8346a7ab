"""A hostile file costs a bounded child process, and its death is a refusal with a name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from medveil.models.autodiff import sandbox
from medveil.models.autodiff.admission import Limits, admit
from medveil.models.autodiff.sandbox import admit_in_child
from medveil.models.errors import AdmissionError

MIB = 1 << 20


def sound() -> bytes:
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["": 20]>
        surrogate (float[batch, 1, 8, 8] image) => (float[batch, 2] logits)
        { flat = Flatten (image)  logits = Gemm (flat, weight) }
        """
    )
    weight = np.random.default_rng(7).standard_normal((64, 2)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    return model.SerializeToString()


def refusal(data: bytes, **settings: object) -> AdmissionError:
    with pytest.raises(AdmissionError) as caught:
        admit_in_child(data, **settings)  # type: ignore[arg-type]
    return caught.value


def many_empty_nodes(count: int) -> bytes:
    """Two bytes per node in the file, over a hundred in memory: a zip bomb without the zip."""
    nodes = b"\x0a\x00" * count
    length, rest = b"", len(nodes)
    while rest > 127:
        length, rest = length + bytes([rest & 127 | 128]), rest >> 7
    return b"\x3a" + length + bytes([rest]) + nodes


@pytest.fixture
def child_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the child run other code after it has limited itself."""

    def replace(code: str) -> None:
        limited = (
            "import json, sys; from medveil.models.autodiff import sandbox as s; task = json.loads(sys.argv[1]); "
            "s._limit_myself(s._address_space_bytes('VmSize') + task['memory_bytes'], task['cpu_s']); "
        )
        monkeypatch.setattr(sandbox, "_SERVE", limited + code)

    return replace


def test_the_child_answers_as_admission_does() -> None:
    ours, theirs = admit(sound()), admit_in_child(sound())
    assert theirs.model.SerializeToString(deterministic=True) == ours.model.SerializeToString(
        deterministic=True
    )
    for field in (
        "input_shape",
        "output_shape",
        "operators",
        "parameters",
        "flops",
        "activation_bytes",
        "target_shape",
    ):
        assert getattr(theirs, field) == getattr(ours, field)


def test_a_refusal_comes_back_with_code_and_sentences() -> None:
    for data in (b"", sound()[:50], b"\x18\x00\x00\x00ORTM" + bytes(64)):
        with pytest.raises(AdmissionError) as inside:
            admit(data)
        assert (refusal(data).code, refusal(data).public) == (inside.value.code, inside.value.public)


def test_the_callers_limits_hold_in_the_child() -> None:
    assert refusal(sound(), limits=Limits(flops=10)).code == "flops-limit"
    assert refusal(sound(), limits=Limits(file_bytes=10)).code == "file-size"
    assert refusal(sound(), role="generator").code == "signature"


def test_a_file_too_large_for_the_childs_memory_never_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a child was started"))
    assert refusal(bytes(20 * MIB), memory_bytes=128 * MIB).code == "memory"


def test_a_file_that_swells_in_memory_is_refused() -> None:
    assert refusal(many_empty_nodes(2_000_000), memory_bytes=128 * MIB).code == "memory"


@pytest.mark.parametrize(
    ("code", "child"),
    [
        ("memory", "bytearray(1 << 40)"),
        ("memory", "import numpy; numpy.ones(1 << 40)"),
        ("memory", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"),
        ("timeout", f"import os; os.kill(os.getpid(), {int(signal.SIGXCPU)})"),
        ("crash", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"),
        ("crash", "import os; os.abort()"),
        ("crash", "raise SystemExit(3)"),
        ("crash", "pass"),  # an exit in good order, without an answer
    ],
)
def test_the_way_a_child_dies_names_the_refusal(
    child_runs: Callable[[str], None], code: str, child: str
) -> None:
    child_runs(child)
    assert refusal(sound(), memory_bytes=128 * MIB).code == code


@pytest.mark.parametrize("child", ["import time; time.sleep(60)", "\nwhile True: pass"])
def test_a_child_that_does_not_end_is_ended(child_runs: Callable[[str], None], child: str) -> None:
    child_runs(child)
    started = time.monotonic()
    assert refusal(sound(), timeout_s=1).code == "timeout"
    assert time.monotonic() - started < 50


def test_a_child_out_of_processor_time_is_out_of_time_and_not_of_memory(
    child_runs: Callable[[str], None],
) -> None:
    child_runs("s._limit_myself(1 << 40, 1)\nwhile True: pass")
    assert refusal(sound(), timeout_s=50).code == "timeout"


def test_the_child_sees_no_environment_no_folder_and_can_write_no_file(
    child_runs: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEDVEIL_SECRET", "canary")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "written"
    child_runs(
        "import os, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); seen = dict(os.environ); \n"
        f"try: open({str(kept)!r}, 'wb', 0).write(b'x'); wrote = True\n"
        "except OSError: wrote = False\n"
        "raise SystemExit(repr((os.listdir('.'), 'canary' in str(seen), wrote)))"
    )
    assert refusal(sound()).private.strip() == repr(([], False, False))
    assert kept.read_bytes() == b""


def test_no_child_and_no_folder_stay_behind(
    child_runs: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = _children()
    child_runs("import time; time.sleep(60)")
    refusal(sound(), timeout_s=0.5)
    assert list(tmp_path.iterdir()) == []
    assert _children() <= before


def test_the_child_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, medveil.models.autodiff.sandbox; "
        "print(sorted({'torch', 'onnxruntime', 'scipy', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def _children() -> set[str]:
    """Return the process ids of this process's children, dead ones that nobody waited for included."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
