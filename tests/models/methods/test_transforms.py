"""Steps between the noise and the model: what they compute, and that their adjoints are adjoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medveil.models.errors import ConfigurationError
from medveil.models.methods import (
    AdversarialOracle,
    Blur,
    Channels,
    Compose,
    ExpectationOracle,
    Flip,
    Hardening,
    Resize,
    Shift,
    Transform,
    TransformedOracle,
)

LINEAR: list[tuple[Transform, tuple[int, ...], tuple[int, ...]]] = [
    (Resize((11, 8), (5, 3)), (2, 11, 8), (2, 5, 3)),
    (Resize((5, 3), (11, 8)), (1, 5, 3), (1, 11, 8)),
    (Resize((7, 6), (7, 6)), (1, 7, 6), (1, 7, 6)),
    (Resize((1, 1), (3, 2)), (1, 1, 1), (1, 3, 2)),
    (Blur(0.4), (2, 9, 6), (2, 9, 6)),
    (Blur(3.0), (1, 4, 5), (1, 4, 5)),
    (Shift(2, -1), (1, 6, 5), (1, 6, 5)),
    (Shift(-9, 0), (1, 6, 5), (1, 6, 5)),
    (Flip(), (1, 6, 5), (1, 6, 5)),
    (Channels(1, 3), (1, 4, 4), (3, 4, 4)),
    (Channels(3, 1), (3, 4, 4), (1, 4, 4)),
    (Compose(), (1, 4, 4), (1, 4, 4)),
    (Compose(Channels(3, 1), Resize((9, 9), (4, 5)), Blur(1.0), Shift(0, 1)), (3, 9, 9), (1, 4, 5)),
]
IDS = [type(case[0]).__name__ + str(i) for i, case in enumerate(LINEAR)]


@pytest.mark.parametrize(("transform", "source", "target"), LINEAR, ids=IDS)
def test_the_adjoint_is_exact_and_shapes_are_as_stated(
    transform: Any, source: Any, target: Any, rng: np.random.Generator
) -> None:
    x = rng.random((3, *source), np.float32)
    g = rng.normal(size=(3, *target)).astype(np.float32)
    out, back = transform.apply(x), transform.adjoint(g, x)
    assert (out.shape, back.shape) == (g.shape, x.shape)
    assert out.dtype == back.dtype == np.float32
    assert tuple(transform.source_shape(target)) == source
    forward, backward = np.vdot(out.astype(float), g), np.vdot(x.astype(float), back)
    assert forward == pytest.approx(backward, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("transform", "source", "target"), LINEAR, ids=IDS)
def test_an_image_is_transformed_alike_in_any_company(
    transform: Any, source: Any, target: Any, rng: np.random.Generator
) -> None:
    x = rng.random((5, *source), np.float32)
    whole = transform.apply(x)
    assert all(np.array_equal(transform.apply(x[i : i + 1])[0], whole[i]) for i in range(5))


@pytest.mark.parametrize("to_shape", [(28, 28), (5, 64), (31, 17), (100, 90), (1, 1)])
def test_resize_has_the_weights_of_pillows_bilinear(
    to_shape: tuple[int, int], rng: np.random.Generator
) -> None:
    image = rng.random((47, 39), np.float32)
    ours = Resize((47, 39), to_shape).apply(image[None, None])[0, 0]
    pillow = Image.fromarray(image).resize(to_shape[::-1], Image.Resampling.BILINEAR)
    assert np.abs(ours - np.asarray(pillow)).max() < 1e-6


def test_blur_is_the_gaussian_filter_with_repeated_edges(rng: np.random.Generator) -> None:
    image = rng.random((12, 9), np.float32)
    reference = ndimage.gaussian_filter(image.astype(float), 1.5, mode="nearest", truncate=4.0)
    assert np.abs(Blur(1.5).apply(image[None, None])[0, 0] - reference).max() < 1e-6


def test_shift_moves_down_and_right_and_brings_in_nothing() -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    assert Shift(1, 1).apply(image)[0, 0].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert Shift(0, -2).apply(image)[0, 0].tolist() == [[2, 0, 0], [5, 0, 0]]


def test_grey_as_rgb_and_back_is_grey() -> None:
    grey = np.random.default_rng(0).random((1, 1, 3, 3), np.float32)
    assert np.allclose(Channels(3, 1).apply(Channels(1, 3).apply(grey)), grey, atol=1e-7)


@pytest.mark.parametrize("wrong", [lambda: Channels(3, 3), lambda: Blur(0), lambda: Resize((0, 1), (2, 2))])
def test_an_impossible_transform_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError):
        wrong()


def _finite_difference(oracle: Any, images: Any, targets: Any, direction: Any) -> Any:
    step = 1e-2
    up, _ = oracle.loss_and_gradient((images + step * direction).astype(np.float32), targets)
    down, _ = oracle.loss_and_gradient((images - step * direction).astype(np.float32), targets)
    return (up - down) / (2 * step)


def test_oracles_behind_transforms_give_the_gradient_at_native_resolution(
    softmax: Any, rng: np.random.Generator
) -> None:
    inner = softmax(3, (3, 5, 4))
    resize = Compose(Channels(1, 3), Resize((12, 9), (5, 4)))
    shifted = Compose(Shift(1, 0), resize)
    images = rng.random((4, 1, 12, 9), np.float32)
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    direction = rng.normal(size=images.shape)
    for oracle in (TransformedOracle(inner, resize), ExpectationOracle(inner, [resize, shifted])):
        assert (oracle.input_shape, oracle.classes) == ((1, 12, 9), 3)
        _, gradient = oracle.loss_and_gradient(images, targets)
        slope = (gradient * direction).sum(axis=(1, 2, 3))
        assert slope == pytest.approx(
            _finite_difference(oracle, images, targets, direction), rel=2e-2, abs=1e-3
        )


def test_the_adversary_stays_in_its_radius_and_makes_the_loss_larger(
    softmax: Any, rng: np.random.Generator
) -> None:
    oracle = softmax(2, (1, 6, 6))
    attacker = AdversarialOracle(oracle, radius=0.1, steps=4)
    images = rng.random((5, 1, 6, 6), np.float32)
    targets = np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 0]]
    moved = attacker.attacked(images, targets)
    assert np.abs(moved - images).max() <= 0.1 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    losses, gradient = attacker.loss_and_gradient(images, targets)
    assert (losses > oracle.loss_and_gradient(images, targets)[0]).all()
    assert np.array_equal(gradient, oracle.loss_and_gradient(moved, targets)[1])


def test_hardening_of_nothing_is_the_oracle_itself(softmax: Any) -> None:
    oracle = softmax(2, (1, 6, 6))
    assert Hardening().wrap(oracle) is oracle


def test_hardening_averages_the_image_itself_and_every_view(softmax: Any, rng: np.random.Generator) -> None:
    oracle = softmax(2, (1, 6, 6))
    images, targets = rng.random((2, 1, 6, 6), np.float32), np.eye(2, dtype=np.float32)
    hard = Hardening(blur_sigmas=(1.0,), shifts=((1, 0),), scales=(0.5,), flip=True).wrap(oracle)
    views = [
        Compose(),
        Blur(1.0),
        Shift(1, 0),
        Compose(Resize((6, 6), (3, 3)), Resize((3, 3), (6, 6))),
        Flip(),
    ]
    expected = np.mean(
        [TransformedOracle(oracle, view).loss_and_gradient(images, targets)[1] for view in views], axis=0
    )
    assert hard.loss_and_gradient(images, targets)[1] == pytest.approx(expected, abs=1e-6)


def test_views_of_different_shapes_are_refused(softmax: Any) -> None:
    oracle = softmax(2, (1, 6, 6))
    with pytest.raises(ConfigurationError):
        ExpectationOracle(oracle, [Resize((9, 9), (6, 6)), Flip()])
    with pytest.raises(ConfigurationError):
        ExpectationOracle(oracle, [])
