"""The real command, with a small signed bundle built here (no torch, no training)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as PillowImage

from medveil.agent.cli import app
from medveil.models.bundle import (
    ManifestDraft,
    fingerprint,
    write_bundle,
)
from medveil.models.cli_support import run_command

SIDE = 12


def _net(seed: int) -> bytes:
    """Return a small convolutional classifier with random weights as ONNX: (batch, 1, 12, 12) -> two logits."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1)
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Flatten", ["r1"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [weight("w1", 4, 1, 3, 3), weight("b1", 4), weight("w2", 2, 4 * SIDE * SIDE), weight("b2", 2)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


@dataclass(frozen=True)
class SmallBundle:
    """A bundle on the disk and who signed it."""

    path: Path
    signer: str


@pytest.fixture(scope="session")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, small_draft: Callable[..., ManifestDraft]
) -> SmallBundle:
    """One surrogate of 12x12 grey images, classes NORMAL (0) and PNEUMONIA (1), epsilon 8, mask 0.3."""
    graphs = {"net-1": _net(1)}
    key = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
    path = tmp_path_factory.mktemp("bundle") / "small.medveil"
    write_bundle(path, small_draft(graphs, SIDE), graphs, {}, key)
    return SmallBundle(path, fingerprint(key.public_key()))


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site's own folder: never the developer's."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MEDVEIL_HOME", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture
def agent(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a `medveil-agent` command line in this process, all of it: parsing, errors, exit code."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        code = run_command(app, "medveil-agent", [str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return run


COMMAND = (sys.executable, "-c", "import sys; from medveil.agent.cli import main; sys.exit(main())")


@pytest.fixture
def agent_process(home: Path) -> Callable[..., Answer]:
    """Run `medveil-agent` in a process of its own: where limits, signals or start-up matter."""

    def run(*arguments: object, **options: Any) -> Answer:
        command = [*COMMAND, *(str(argument) for argument in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
        return Answer(done.returncode, done.stdout, done.stderr)

    return run


def _heed_interrupts() -> None:
    """Undo what a shell does to programs that it starts in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start_agent(home: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start `medveil-agent` in a process of its own and return it, to be interrupted.

    It yields to the test: whoever watches a process on a busy machine must not come too late for it.
    """

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = ["nice", "-n", "15", *COMMAND, *(str(argument) for argument in arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
        )

    return start


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two class folders; sizes, depths and formats that a hospital has."""
    root = tmp_path / "source"
    for name in ("NORMAL", "PNEUMONIA"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            PillowImage.fromarray(rng.integers(30, 220, (12, 12), np.uint8)).save(root / name / f"{i}.png")
        PillowImage.fromarray(rng.integers(30, 220, (30, 20, 3), np.uint8)).save(root / name / "photo.jpg")
    return root
