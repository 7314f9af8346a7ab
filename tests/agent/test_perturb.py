"""Images of any size and colour reach surrogates of another, and get the same wish in any company."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pytest

from medveil.agent.budget import Budget, enforce
from medveil.agent.imageio import FullRange, Image
from medveil.agent.perturb import Perturber, fitted
from medveil.models.methods import SalmSettings, get

BUDGET = Budget(8.0, 0.3)
SETTINGS = SalmSettings(epsilon=8 / 255, mask_ratio=0.3, steps=3, step_size=0.5, warmup_steps=2)


def images(rng, count: int, *shape: int) -> list[Image]:
    pixels = rng.integers(30, 220, (count, *shape), np.uint8)
    return [Image(array, FullRange(255), PurePosixPath(f"{i}.png")) for i, array in enumerate(pixels)]


@pytest.mark.parametrize("surrogate", [(1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (20, 13), (20, 13, 3), (5, 6)])
def test_any_image_reaches_any_surrogate(surrogate, shape, analytic, rng):
    perturber = Perturber(get("salm"), SETTINGS, analytic.LinearOracle(surrogate))
    wishes = perturber.wanted(images(rng, 2, *shape), [0, 1], BUDGET)
    assert wishes.shape == (2, *((1,) if len(shape) == 2 else (3,)), *shape[:2])
    assert np.abs(wishes).max() > 0
    assert np.abs(wishes).max() <= np.float32(8 / 255)


def test_a_wish_does_not_depend_on_the_rest_of_the_batch(analytic, rng):
    perturber = Perturber(get("salm"), SETTINGS, analytic.LinearOracle())
    three = images(rng, 3, 12, 9)
    together = perturber.wanted(three, [0, 1, 0], BUDGET)
    assert np.array_equal(perturber.wanted(three[1:2], [1], BUDGET)[0], together[1])
    assert np.array_equal(perturber.wanted(three[::-1], [0, 1, 0], BUDGET)[::-1], together)


def test_where_nothing_may_move_nothing_is_wished_for(analytic, rng):
    class Padded(FullRange):
        def bounds(self, stored, epsilon):
            low, high = super().bounds(stored, epsilon)
            low[:4], high[:4] = stored[:4], stored[:4]
            return low, high

    image = Image(rng.integers(30, 220, (8, 8), np.uint8), Padded(255), PurePosixPath("x"))
    perturber = Perturber(get("salm"), SETTINGS, analytic.LinearOracle())
    wish = perturber.wanted([image], [0], BUDGET)[0, 0]
    assert not wish[:4].any()
    assert wish[4:].any()


class WhiteWantsUp:
    """A surrogate for which white would have to become whiter, and the last rows are a side issue."""

    input_shape = (1, 8, 8)
    classes = 2

    def loss_and_gradient(self, images, targets):
        gradient = np.full_like(images, -1.0)
        gradient[:, :, 6:] = 0.01
        return np.zeros(len(images), np.float32), gradient


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_a_mask_is_not_spent_on_pixels_that_cannot_move_the_way_they_should(shape):
    slide = np.full(shape, 255, np.uint8)
    slide[0, 0] = 250
    image = Image(slide, FullRange(255), PurePosixPath("tile"))
    wish = Perturber(get("salm"), SETTINGS, WhiteWantsUp()).wanted([image], [0], BUDGET)[0]
    written = enforce(image, wish, BUDGET).astype(int) - slide
    assert (written[6:] == -8).all()
    assert (written[0, 0] == 5).all()


def test_a_colour_that_can_move_neither_way_takes_no_place_in_the_mask():
    slide = np.zeros((8, 8, 3), np.uint8)
    slide[:, :, 0] = 255  # pure red: no step up, none down, when the channels move together
    slide[6:] = 200
    image = Image(slide, FullRange(255), PurePosixPath("tile"))
    wish = Perturber(get("salm"), SETTINGS, WhiteWantsUp()).wanted([image], [0], BUDGET)[0]
    written = enforce(image, wish, BUDGET).astype(int) - slide
    assert (written[6:] == -8).all()
    assert not written[:6].any()


def test_a_surrogate_that_fits_is_asked_directly(analytic):
    oracle = analytic.LinearOracle()
    assert fitted(oracle, (1, 8, 8)) is oracle


def test_the_gradient_through_the_resize_is_the_derivative(analytic, rng):
    oracle = fitted(analytic.LinearOracle((3, 8, 8)), (1, 17, 11))
    x = rng.uniform(0.2, 0.8, (1, 1, 17, 11)).astype(np.float32)
    v = rng.normal(size=x.shape).astype(np.float32)
    target = np.array([[1.0, 0.0]], np.float32)
    _, gradient = oracle.loss_and_gradient(x, target)
    step = np.float32(1e-2)
    above, below = (oracle.loss_and_gradient(x + s * v, target)[0][0] for s in (step, -step))
    assert (above - below) / (2 * step) == pytest.approx(float((gradient * v).sum()), rel=2e-2, abs=1e-3)
