"""Several surrogates asked at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medveil.models.methods import EnsembleOracle


class Scaled:
    """Another oracle, whose loss and gradient are ``scale`` times as large."""

    def __init__(self, oracle: Any, scale: float) -> None:
        self.oracle, self.scale = oracle, np.float32(scale)
        self.input_shape, self.classes = oracle.input_shape, oracle.classes

    def loss_and_gradient(self, images: Any, targets: Any) -> Any:
        losses, gradient = self.oracle.loss_and_gradient(images, targets)
        return self.scale * losses, self.scale * gradient


def test_every_member_has_the_same_say_whatever_its_scale(softmax: Any, make_batch: Any) -> None:
    first, second = softmax(3, (1, 9, 7), seed=1), softmax(3, (1, 9, 7), seed=2)
    images, targets = make_batch(4).images, np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    plain = EnsembleOracle([first, second]).loss_and_gradient(images, targets)[1]
    scaled = EnsembleOracle([first, Scaled(second, 1000)]).loss_and_gradient(images, targets)[1]
    assert scaled == pytest.approx(plain, rel=1e-4)
    alone = EnsembleOracle([second]).loss_and_gradient(images, targets)[1]
    assert not np.allclose(plain, alone)


def test_the_loss_is_the_members_mean(softmax: Any, make_batch: Any) -> None:
    members = [softmax(3, (1, 9, 7), seed=s) for s in range(3)]
    images, targets = make_batch(2).images, np.eye(3, dtype=np.float32)[:2]
    losses = [member.loss_and_gradient(images, targets)[0] for member in members]
    assert EnsembleOracle(members).loss_and_gradient(images, targets)[0] == pytest.approx(
        np.mean(losses, axis=0)
    )


def test_a_member_without_a_gradient_does_not_spoil_the_others(softmax: Any, make_batch: Any) -> None:
    oracle = softmax(3, (1, 9, 7))
    images, targets = make_batch(2).images, np.eye(3, dtype=np.float32)[:2]
    both = EnsembleOracle([oracle, Scaled(oracle, 0)]).loss_and_gradient(images, targets)[1]
    alone = EnsembleOracle([oracle]).loss_and_gradient(images, targets)[1]
    assert both == pytest.approx(alone / 2)


def test_members_of_different_shapes_are_refused(softmax: Any) -> None:
    with pytest.raises(ValueError, match="share input shape"):
        EnsembleOracle([softmax(3, (1, 9, 7)), softmax(3, (1, 9, 8))])
    with pytest.raises(ValueError, match="at least one"):
        EnsembleOracle([])
