"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from medveil.models.bundle import (
    GraphStatement,
    InputContract,
    ManifestDraft,
    MemberTraining,
    RecipeSettings,
    Scores,
    Taxonomy,
    TaxonomyClass,
    TrainingData,
)

os.environ["COLUMNS"] = "200"  # tables as on a wide terminal, whatever runs the tests

_REPOSITORY = Path(__file__).resolve().parents[1]

_MAY_SKIP = ("onnxruntime has no CUDA provider on this machine",)
"""What CI's machine can't have."""
_MAY_SKIP_WITHOUT_TORCH = tuple(f"could not import {name!r}" for name in ("torch", "importlinter", "onnx_ad"))
"""What the site's environment leaves to the other suite: whole files of tests marked train or dev."""
_skipped: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down why a test was skipped."""
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write down why a whole file was skipped."""
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        file, line, reason = report.longrepr
        _skipped.add(f"{Path(file).name}:{line}: {reason.removeprefix('Skipped: ')}")


def _undecided() -> list[str]:
    """Skips that nobody decided, where CI asks: a skipped test is no passed test."""
    if "MEDVEIL_NO_SKIPS" not in os.environ:
        return []
    decided = (*_MAY_SKIP, *(_MAY_SKIP_WITHOUT_TORCH if "MEDVEIL_EXPECT_NO_TORCH" in os.environ else ()))
    return sorted(skip for skip in _skipped if not any(reason in skip for reason in decided))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run whose tests passed but hid some."""
    if session.exitstatus == pytest.ExitCode.OK and _undecided():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name them."""
    for skip in _undecided():
        terminalreporter.write_line(f"skipped, and this run allows no such skip: {skip}", red=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real medical images beside the checkout; skips without it, fails where CI requires it.

    ``MEDVEIL_SHARED_DATA`` names another folder; ``MEDVEIL_REQUIRE_DATA=1`` turns the skip into a failure.
    """
    folder = Path(os.environ.get("MEDVEIL_SHARED_DATA", _REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        reason = "the shared medical images are not beside this checkout (set MEDVEIL_SHARED_DATA)"
        if os.environ.get("MEDVEIL_REQUIRE_DATA"):
            pytest.fail(f"{reason}, and this run requires them")
        pytest.skip(reason)
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed: a test that needs luck is not a test."""
    return np.random.default_rng(20261121)


@pytest.fixture(scope="session")
def small_draft() -> Callable[..., ManifestDraft]:
    """What a small bundle says of itself: grey images, two classes, graphs of one role, nothing measured.

    Anything else of a `ManifestDraft` can be given by name.
    """

    def draft(
        graphs: Iterable[str],
        side: int,
        *,
        classes: tuple[str, str] = ("NORMAL", "PNEUMONIA"),
        role: Literal["surrogate", "generator"] = "surrogate",
        **others: Any,
    ) -> ManifestDraft:
        half = Scores(accuracy=0.5, balanced_accuracy=0.5, auc=0.5)
        fields: dict[str, Any] = {
            "task": "classification",
            "created": datetime(2026, 1, 1, tzinfo=UTC),
            "tool_version": "test",
            "seed": 0,
            "taxonomy": Taxonomy(
                classes=tuple(TaxonomyClass(name=name, stored_value=i) for i, name in enumerate(classes))
            ),
            "input": InputContract(channels=1, rows=side, columns=side, channel_meaning="grey"),
            "recipe": RecipeSettings(steps=4, step_size=0.5, warmup_steps=2),
            "training_data": TrainingData(
                name="drawn",
                source_statement="random weights",
                sha256="00" * 32,
                train_counts=(1, 1),
                hold_out_counts=(1, 1),
            ),
            "graphs": tuple(
                GraphStatement(
                    name=name,
                    role=role,
                    architecture="tiny",
                    parameters=1000,
                    hold_out=half if role == "surrogate" else None,
                    training=MemberTraining(seed=0, epochs=1, attempts=1),
                )
                for name in graphs
            ),
        }
        return ManifestDraft(**fields | others)

    return draft
