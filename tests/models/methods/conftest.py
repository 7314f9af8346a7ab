"""Oracles with a known answer, and tiny images to ask them about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from medveil.models.methods import Batch, FloatArray


class QuadraticOracle:
    """Loss ``0.5 * |x - c|^2``, c the class's centre (mixed by the targets): the gradient is ``x - c``."""

    def __init__(self, centres: FloatArray) -> None:
        self.centres = centres
        self.asked = 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.centres.shape[1:]

    @property
    def classes(self) -> int:
        return len(self.centres)

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        self.asked += 1
        gradient = images - (targets[:, :, None, None, None] * self.centres).sum(axis=1)
        return 0.5 * np.square(gradient).reshape(len(images), -1).sum(axis=1), gradient


class SoftmaxOracle:
    """A linear classifier with cross-entropy, in NumPy; ``train_step`` is plain gradient descent.

    Its evaluation never mixes images (no GEMM over the batch), as the protocol asks.
    """

    def __init__(self, classes: int, shape: tuple[int, ...], seed: int = 0, rate: float = 0.5) -> None:
        self._shape = shape
        self.weight = np.random.default_rng(seed).normal(0, 0.1, (classes, *shape)).astype(np.float32)
        self.rate = np.float32(rate)
        self.calls: list[str] = []
        self.trained_on: list[FloatArray] = []

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def classes(self) -> int:
        return len(self.weight)

    def _probabilities(self, images: FloatArray) -> FloatArray:
        axes = (2, 3, 4)
        logits = (images[:, None] * self.weight).sum(axis=axes, dtype=np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        self.calls.append("ask")
        p = self._probabilities(images)
        losses = -(targets * np.log(np.maximum(p, 1e-30))).sum(axis=1)
        gradient = ((p - targets)[:, :, None, None, None] * self.weight).sum(axis=1)
        return losses.astype(np.float32), gradient.astype(np.float32)

    def train_step(self, images: FloatArray, targets: FloatArray) -> float:
        self.calls.append("train")
        self.trained_on.append(images)
        losses, _ = self.loss_and_gradient(images, targets)
        self.calls.pop()
        error = (self._probabilities(images) - targets) / len(images)
        self.weight = self.weight - self.rate * np.einsum("nk,nchw->kchw", error, images)
        return float(losses.mean())


@pytest.fixture
def quadratic() -> type[QuadraticOracle]:
    return QuadraticOracle


@pytest.fixture
def softmax() -> type[SoftmaxOracle]:
    return SoftmaxOracle


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Return images full of 0s, 1s and values between, keyed by their own bytes."""

    def make(count: int, shape: tuple[int, int, int] = (1, 9, 7), classes: int = 3, seed: int = 5) -> Batch:
        rng = np.random.default_rng(seed)
        images = np.clip(rng.normal(0.5, 0.4, (count, *shape)), 0, 1).astype(np.float32)
        labels = (np.arange(count) % classes).astype(np.int64)
        return Batch(images, labels, tuple(hashlib.sha256(image.tobytes()).digest() for image in images))

    return make
