"""What every benchmark prints beside its figures, and how its table gets under ``bench/results/``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["RESULTS", "machine", "markdown_table", "spread", "write"]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("medveil", "numpy", "onnx", "onnxruntime", "torch")


def machine() -> dict[str, str]:
    """Return what the figures were measured on, and under what load."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    load = os.getloadavg()
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "load": f"{load[0]:.1f} over 1 min, {load[2]:.1f} over 15 min (this benchmark included)",
        "python": platform.python_version(),
        "packages": ", ".join(versions),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median and, over several values, the range: ``0.51 (0.48-0.55)``."""
    if not len(values):
        return "-"
    middle = f"{np.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table that reads in a terminal as well as on a page."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True))
            + " |"
        )

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def write(name: str, title: str, sections: Sequence[str], data: dict[str, Any]) -> Path:
    """Print a result, and write it as ``results/NAME.md`` with its figures as ``results/NAME.json``."""
    about = machine()
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = "\n\n".join([f"# {title}", *sections, "## Measured on", facts]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.md"
    target.write_text(text)
    target.with_suffix(".json").write_text(
        json.dumps({"machine": about, **data}, indent=1, sort_keys=True) + "\n"
    )
    print(text)
    return target
