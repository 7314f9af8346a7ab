"""A bundle with a noise generator beside its surrogates."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medveil.agent.engine import open_generator
from medveil.models.bundle import RecipeSettings, generate_key, open_bundle

torch = pytest.importorskip("torch")
from medveil.coordinator.train import TrainRequest, train  # noqa: E402 (needs torch)
from medveil.models.audit.victims import VictimSettings  # noqa: E402
from medveil.models.training import Member, Plan  # noqa: E402
from medveil.models.training.generator import GeneratorSettings  # noqa: E402

pytestmark = pytest.mark.train

PLAN = Plan(
    members=(Member(name="mlp", architecture="mlp", epochs=6, batch_size=16),),
    recipe=RecipeSettings(steps=2, warmup_steps=1),
    strengthening=(),
    victims=(VictimSettings(architecture="mobilenet", batch_size=16),),
    victim_steps=1,
)


class Silent:
    """Nobody looks on."""

    def __init__(self, seconds: float) -> None:
        pass

    def stage(self, text: str) -> None:
        pass

    def advance(self, seconds: float) -> None:
        pass


@pytest.mark.timeout(1800)  # seconds of work, many minutes on a busy machine: an export by torch
def test_a_distilled_generator_travels_with_its_surrogates_and_runs_at_a_site(
    shapes_npz: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "shapes.bundle"
    request = TrainRequest(
        data=shapes_npz(160),
        out=out,
        created=datetime(2026, 11, 21, 12, tzinfo=UTC),
        seed=3,
        generator=GeneratorSettings(epochs=1, width=4),
    )
    manifest = train(request, generate_key(), Silent, PLAN)
    assert [(g.name, g.role) for g in manifest.graphs] == [("mlp", "surrogate"), ("generator", "generator")]
    assert [g.name for g in manifest.surrogates] == ["mlp"]
    distilled: Any = manifest.entry("generator")
    assert (distilled.hold_out, distilled.golden, distilled.training.epochs) == (None, None, 1)
    session = open_generator(
        open_bundle(out, trusted=None).graph("generator"), threads=1, memory_budget_bytes=1 << 28
    )
    images = np.full((2, *manifest.input.shape), 0.5, np.float32)
    towards = session.perturbation(images, np.eye(2, dtype=np.float32))
    assert towards.shape == images.shape
    assert not np.array_equal(towards[0], towards[1])  # the same image, another target
