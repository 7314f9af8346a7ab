from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest


class Silent:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.seconds = 0.0

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def silent() -> Silent:
    return Silent()


@pytest.fixture
def examples() -> Callable[..., object]:
    """Draw labelled images: a bright square whose half of the image, upper or lower, is its class."""
    pytest.importorskip("torch")
    from medveil.models.training import Examples

    def draw(count: int = 96, seed: int = 0, noise: float = 0.1) -> Examples:
        rng = np.random.default_rng(seed)
        labels = np.arange(count, dtype=np.int64) % 2
        images = (noise * rng.random((count, 1, 16, 16))).astype(np.float32)
        for image, label in zip(images, labels, strict=True):
            row, column = rng.integers(0, 4) + 8 * label, rng.integers(0, 11)
            image[0, row : row + 4, column : column + 4] = 0.8
        return Examples(images, labels, 2)

    return draw
