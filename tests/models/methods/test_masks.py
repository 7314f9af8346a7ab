"""Which pixels may change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from medveil.models.methods import Settings, masks


@pytest.mark.parametrize("ratio", [1e-6, 0.07, 0.1, 0.3, 1 / 3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("side", [1, 7, 10, 28])
def test_k_is_the_ceiling_of_the_share(ratio: float, side: int) -> None:
    exact = math.ceil(round(ratio * side * side * 1e6) / 1e6)
    assert masks.pixel_count(ratio, side, side) == max(1, exact)


def test_a_share_that_is_whole_is_not_rounded_up_by_binary_fractions() -> None:
    assert 0.07 * 100 > 7
    assert masks.pixel_count(0.07, 10, 10) == 7


@pytest.mark.parametrize("count", [1, 250, 784])
def test_exactly_k_even_when_every_score_is_equal_and_ties_go_by_index(count: int) -> None:
    mask = masks.top_k(np.zeros((2, 1, 28, 28), np.float32), count)
    assert (mask.reshape(2, -1) == (np.arange(784) < count)).all()


def test_among_few_different_scores_ties_go_by_index_too() -> None:
    scores = np.random.default_rng(0).integers(0, 3, (1, 1, 40, 40)).astype(np.float32)
    count = int((scores == 2).sum()) + 100
    expected = (scores == 2).ravel()
    expected[np.flatnonzero(scores.ravel() == 1)[:100]] = True
    assert (masks.top_k(scores, count).ravel() == expected).all()


def test_the_best_scores_are_kept() -> None:
    scores = np.array([[[[0.1, 0.9], [0.5, 0.9]]]], np.float32)
    assert masks.top_k(scores, 2).tolist() == [[[[False, True], [False, True]]]]


def test_pixels_that_are_not_editable_stay_out_and_fewer_than_k_are_all_taken() -> None:
    editable = np.array([[[[True, False], [False, True]]]])
    scores = np.array([[[[1, 9], [9, 2]]]], np.float32)
    assert masks.top_k(scores, 1, editable).tolist() == [[[[False, False], [False, True]]]]
    assert masks.top_k(scores, 3, editable).tolist() == editable.tolist()


@pytest.mark.parametrize("shape", [(6, 6), (3, 17), (17, 3), (1, 9)])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7, 1.0])
def test_a_window_is_one_rectangle_and_still_exactly_k(shape: tuple[int, int], ratio: float) -> None:
    scores = np.random.default_rng(0).random((3, 1, *shape), np.float32)
    count = masks.pixel_count(ratio, *shape)
    window = masks.window_of(scores, count)
    mask = masks.top_k(window, count)
    assert (mask.reshape(3, -1).sum(axis=1) == count).all()
    for one, inside in zip(mask[:, 0], np.isfinite(window[:, 0]), strict=True):
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert inside.sum() == len(rows) * len(columns), "not one rectangle"
        assert not (one & ~inside).any()


def test_the_window_lies_where_the_energy_is() -> None:
    scores = np.zeros((1, 1, 8, 8), np.float32)
    scores[0, 0, 5:7, 2:4] = 1
    assert np.isfinite(masks.window_of(scores, 4))[0, 0, 5:7, 2:4].all()


def test_texture_is_the_local_variance() -> None:
    image = np.zeros((1, 1, 5, 5), np.float32)
    image[0, 0, 2, 2] = 1
    found = masks.texture(image)[0, 0]
    # One of nine pixels is 1: mean 1/9, variance 1/9 - 1/81.
    assert found[2, 2] == pytest.approx(1 / 9 - 1 / 81, rel=1e-5)
    assert found[0, 0] == 0


def test_a_random_mask_belongs_to_the_image_and_not_to_its_place(make_batch: Any) -> None:
    batch = make_batch(4)
    settings = Settings(mask_ratio=0.3, mask_score="random")
    whole = masks.weights(batch, settings, None)
    alone = masks.weights(batch.select(np.array([2])), settings, None)
    assert np.array_equal(whole[2], alone[0])
    assert not np.array_equal(whole[2], whole[3])


def test_lowest_is_the_opposite_of_accumulated(make_batch: Any) -> None:
    batch = make_batch(3)
    scores = np.random.default_rng(1).random((3, 1, 9, 7), np.float32)

    def chosen(kind: Any) -> Any:
        settings = Settings(mask_ratio=10 / 63, mask_score=kind)
        return masks.weights(batch, settings, lambda _steps: scores).astype(bool)

    best, worst = chosen("accumulated"), chosen("lowest")
    assert (scores[best].reshape(3, -1).min(axis=1) > scores[worst].reshape(3, -1).max(axis=1)).all()


def test_soft_amplitude_is_one_at_the_best_pixel_and_zero_outside(make_batch: Any) -> None:
    batch = make_batch(3)
    scores = np.random.default_rng(1).random((3, 1, 9, 7), np.float32)
    weight = masks.weights(batch, Settings(mask_ratio=0.2), lambda _steps: scores, amplitude="soft")
    assert (weight.max(axis=(1, 2, 3)) == 1).all()
    assert ((weight > 0).sum(axis=(1, 2, 3)) == masks.pixel_count(0.2, 9, 7)).all()
    assert len(np.unique(weight[0])) > 5


def test_a_full_mask_asks_for_no_gradient(make_batch: Any) -> None:
    def unasked(_steps: int) -> Any:
        raise AssertionError("a gradient was computed for nothing")

    assert masks.weights(make_batch(2), Settings(mask_ratio=1.0), unasked).all()
