"""Write the Python code of ``v1/*.proto``: ``python -m medveil.protos.generate`` (extra [dev]).

The code is committed and never edited. A test writes it again and compares, so it cannot drift.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from medveil.models.errors import ConfigurationError

__all__ = ["generated", "main"]

_ROOT: Final = Path(__file__).resolve().parents[2]
"""The source root: a proto's path below it holds the product's name, because descriptor names are global."""

_HEADER: Final = "# ruff: noqa\n# fmt: off\n# mypy: ignore-errors\n"
"""Generated code is taken as it is: no checker and no formatter looks at it."""


def generated() -> dict[Path, str]:
    """Return the generated files: where they belong, and what they hold.

    Raises:
        ConfigurationError: ``protoc``: a proto does not compile, or grpcio-tools is not installed.
    """
    protos = sorted((_ROOT / "medveil" / "protos" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--{kind}_out={folder}" for kind in ("python", "pyi")]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={_ROOT}", *options]
        done = subprocess.run([*command, *map(str, protos)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigurationError(
                "protoc",
                "A proto does not compile, or grpcio-tools (extra [dev]) is missing.",
                private=done.stderr,
            )
        written = sorted(Path(folder).rglob("*.py*"))
        return {_ROOT / path.relative_to(folder): _tidy(path.read_text(encoding="utf-8")) for path in written}


def _tidy(code: str) -> str:
    return _HEADER + re.sub(r"[ \t]+$", "", code, flags=re.MULTILINE)


def main() -> int:
    """Write the files beside their protos."""
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
