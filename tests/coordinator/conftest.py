from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def shapes(rng: np.random.Generator, count: int, classes: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw grey images with one bright square each; the class is the quarter of the image that it lies in."""
    labels = np.arange(count) % classes
    images = rng.integers(0, 60, size=(count, size, size)).astype(np.uint8)
    half, side = size // 2, size // 4
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(0, half - side, size=2) + half * np.array([label // 2, label % 2])
        image[row : row + side, column : column + side] = rng.integers(160, 255)
    return images, labels


@pytest.fixture
def shapes_npz(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """Write a small MedMNIST-layout NPZ of drawn shapes and return its path."""

    def write(count: int = 160, classes: int = 2, size: int = 16, **replaced: np.ndarray) -> Path:
        images, labels = shapes(rng, count, classes, size)
        arrays = {"train_images": images, "train_labels": labels[:, None].astype(np.uint8)} | replaced
        path = tmp_path / "shapes.npz"
        np.savez(path, **arrays)
        return path

    return write
