"""CI passes no run in which a test was skipped for a reason that nobody decided."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPED = """
import pytest
{module}
@pytest.mark.skipif({condition}, reason="not installed here")
def test_one(): pass
def test_two(): pass
"""


@pytest.mark.parametrize(
    ("module", "condition", "asked", "code"),
    [
        ("", "True", True, 1),
        ("", "False", True, 0),
        ("", "True", False, 0),
        ("pytest.importorskip('no_such_module')", "False", True, 1),
        ("pytest.importorskip('torch_that_is_not_there')", "False", True, 1),
    ],
)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_skip_fails_the_run_that_forbids_it(
    tmp_path: Path, module: str, condition: str, asked: bool, code: int, workers: str
) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(SKIPPED.format(module=module, condition=condition))
    (tmp_path / "test_other.py").write_text("def test_three(): pass")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MEDVEIL_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", str(tmp_path)],
        env=environment | ({"MEDVEIL_NO_SKIPS": "1"} if asked else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("this run allows no such skip" in done.stdout) == (code == 1)
