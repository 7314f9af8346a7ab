"""Where a perturbation may go."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medveil.models.methods import Settings
from medveil.models.methods.projection import Budget, at_most, step_direction, stored_steps


@given(st.floats(1e-6, 0.999))
def test_the_budget_in_float32_is_never_wider_than_asked(epsilon: float) -> None:
    assert Fraction(float(at_most(epsilon))) <= Fraction(epsilon)
    assert float(at_most(epsilon)) == pytest.approx(epsilon, rel=1e-6)


@given(st.floats(0, 1, width=32), st.floats(1e-3, 0.5), st.floats(-2, 2, width=32))
def test_image_plus_projected_noise_lies_in_the_range_exactly(
    value: float, epsilon: float, wish: float
) -> None:
    image = np.full((1, 1, 1, 1), value, np.float32)
    delta = Budget.of(image, Settings(epsilon=epsilon)).project(np.full_like(image, wish))
    assert 0 <= (image + delta).item() <= 1
    assert abs(float(delta.item())) <= epsilon


def test_projection_is_idempotent() -> None:
    rng = np.random.default_rng(0)
    images = rng.random((4, 3, 5, 5), np.float32)
    budget = Budget.of(images, Settings(colour="channels"))
    once = budget.project(rng.normal(0, 1, images.shape).astype(np.float32))
    assert np.array_equal(budget.project(once), once)


def test_in_luma_the_tightest_channel_decides() -> None:
    images = np.array([1.0, 0.5, 0.01], np.float32).reshape(1, 3, 1, 1)
    budget = Budget.of(images, Settings(epsilon=0.1, colour="luma"))
    assert budget.high.item() == 0  # red is full: no channel may rise
    assert budget.low.item() == pytest.approx(-0.01)  # blue is nearly empty
    assert budget.pull(np.ones((1, 3, 1, 1), np.float32)).item() == 3


def test_room_narrows_the_budget_and_never_widens_it() -> None:
    images = np.full((1, 1, 1, 2), 0.5, np.float32)
    room = (np.array([-0.01, -1], np.float32), np.array([0, 1], np.float32))
    low, high = (side.reshape(images.shape) for side in room)
    budget = Budget.of(images, Settings(epsilon=0.1), room=(low, high))
    assert budget.low.ravel() == pytest.approx([-0.01, -0.1])
    assert budget.high.ravel() == pytest.approx([0, 0.1])
    assert budget.room_towards(np.ones_like(images)).ravel() == pytest.approx([0, 0.1])
    assert budget.room_towards(-np.ones_like(images)).ravel() == pytest.approx([0.01, 0.1])


def test_a_pixel_whose_channels_block_each_other_cannot_move_in_luma() -> None:
    images = np.array([1.0, 0.5, 0.0], np.float32).reshape(1, 3, 1, 1)
    assert not Budget.of(images, Settings(colour="luma")).movable().any()
    assert Budget.of(images, Settings(colour="channels")).movable().all()


def test_a_weight_is_a_share_of_epsilon() -> None:
    images = np.full((1, 1, 1, 3), 0.5, np.float32)
    weight = np.array([0, 0.25, 1], np.float32).reshape(1, 1, 1, 3)
    high = Budget.of(images, Settings(epsilon=0.1), weight).high
    assert high.ravel() == pytest.approx([0, 0.025, 0.1])


@pytest.mark.parametrize("floor_db", [10.0, 30.0, 40.0, 60.0])
def test_no_image_ends_below_the_psnr_floor_and_none_is_shrunk_needlessly(floor_db: float) -> None:
    images = np.full((2, 1, 8, 8), 0.5, np.float32)
    wish = np.zeros_like(images)
    loud_db = 20.0
    wish[0], wish[1, 0, 0, 0] = 0.1, 1e-3  # 20 dB, and quieter than any floor here
    delta = Budget.of(images, Settings(epsilon=0.2), psnr_floor_db=floor_db).project(wish)
    psnr = -10 * np.log10(np.square(delta, dtype=np.float64).mean(axis=(1, 2, 3)))
    assert psnr[0] == pytest.approx(max(loud_db, floor_db), abs=1e-4)
    assert np.array_equal(delta[1], wish[1])


def test_a_step_is_the_sign_or_the_gradient_over_its_largest_value() -> None:
    gradient = np.array([[-2.0, 0.0, 0.5]], np.float32).reshape(1, 1, 1, 3)
    assert step_direction(gradient).ravel().tolist() == [-1, 0, 1]
    assert step_direction(gradient, "gradient").ravel().tolist() == [-1, 0, 0.25]
    assert not step_direction(np.zeros_like(gradient), "gradient").any()


def test_stored_steps_round_to_nearest_and_stop_at_the_budget() -> None:
    images = np.array([0, 100, 255], np.float32) / np.float32(255)
    delta = np.array([3.6, -9, 2], np.float32) / np.float32(255)
    stored = np.rint(stored_steps(images, delta, 4 / 255) * 255)
    assert stored.tolist() == [4, 96, 255]
