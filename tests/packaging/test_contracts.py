"""The import contracts hold, and each of them can fail: a gate that can't is worse than none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = ("agent", "coordinator", "models", "protos")

# A module, the import that is planted in it, and the contract that must name it.
VIOLATIONS = [
    ("agent/medveil/agent/restore.py", "import medveil.coordinator", "The two sides never import each other"),
    (
        "coordinator/medveil/coordinator/cli.py",
        "import medveil.agent",
        "The two sides never import each other",
    ),
    ("models/medveil/models/errors.py", "import medveil.agent", "The two sides never import each other"),
    (
        "agent/medveil/agent/ledger/store.py",
        "import medveil.agent.protect",
        "Inside the agent imports point inwards",
    ),
    ("models/medveil/models/methods/salm.py", "import onnx", "Methods and quality are pure"),
    (
        "models/medveil/models/quality/fidelity.py",
        "import medveil.models.bundle",
        "Methods and quality are pure",
    ),
    ("agent/medveil/agent/perturb.py", "import torch", "The site side never imports torch"),
    ("agent/medveil/agent/imageio/npz.py", "import urllib.request", "Only egress and flower_app may open"),
]


def _lint(tree: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(tree / root) for root in ROOTS)
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for root in ROOTS:
        shutil.copytree(REPOSITORY / root, tmp_path / root, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.dev
def test_the_contracts_hold(tree: Path) -> None:
    done = _lint(tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.dev
@pytest.mark.parametrize(("module", "planted", "contract"), VIOLATIONS)
def test_a_planted_import_breaks_its_contract(tree: Path, module: str, planted: str, contract: str) -> None:
    target = tree / module
    target.write_text(f"{target.read_text()}\n{planted}\n")
    done = _lint(tree)
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert [line for line in broken if line.startswith(contract)], done.stdout
