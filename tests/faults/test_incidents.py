"""The table of incidents names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "deploy/INCIDENTS.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def incidents() -> list[str]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|") and not line.startswith(("| incident", "|---"))]


def functions_of(file: str) -> set[str]:
    path = ROOT / file
    if not path.is_file():
        return set()
    return {node.name for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.FunctionDef)}


def test_every_incident_names_a_test_or_says_why_it_is_no_goal() -> None:
    assert len(incidents()) > 40
    assert [line for line in incidents() if not TEST.search(line) and "not a goal, because" not in line] == []


def test_every_named_test_exists() -> None:
    named = {match.groups() for line in incidents() for match in TEST.finditer(line)}
    missing = {f"{file}::{name}" for file, name in named if name not in functions_of(file)}
    assert missing == set()
    assert all(name.startswith("test_") for _, name in named)
