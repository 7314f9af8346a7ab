"""Overlap and surface distance, against figures counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medveil.models.errors import InputError
from medveil.models.quality import constant_mask_dice, dice, hd95, iou, recoverable_dice, score_classes
from medveil.models.quality.segmentation import share_lost


def box(shape: tuple[int, ...], *sides: slice) -> Any:
    mask = np.zeros((1, *shape), bool)
    mask[(0, *sides)] = True
    return mask


A = box((8, 10), np.s_[2:6], np.s_[1:5])  # 16 pixels
B = box((8, 10), np.s_[2:6], np.s_[3:7])  # moved right by 2: 8 shared, 24 in either
NONE = np.zeros((1, 8, 10), bool)


def test_overlap_of_two_boxes() -> None:
    assert dice(A, B) == pytest.approx(2 * 8 / 32)
    assert iou(A, B) == pytest.approx(8 / 24)


@pytest.mark.parametrize("measure", [dice, iou, hd95])
def test_the_order_of_the_two_does_not_matter(measure: Any) -> None:
    assert measure(A, B) == measure(B, A)


def test_dice_and_iou_say_the_same_in_two_scales() -> None:
    rng = np.random.default_rng(0)
    p, r = rng.random((2, 6, 9, 9)) > 0.6
    assert dice(p, r) == pytest.approx(2 * iou(p, r) / (1 + iou(p, r)))


def test_a_perfect_prediction() -> None:
    assert (dice(A, A), iou(A, A), hd95(A, A)) == (1, 1, 0)


def test_empty_masks_are_defined() -> None:
    diagonal = np.hypot(7, 9)
    assert (dice(NONE, NONE), iou(NONE, NONE), hd95(NONE, NONE)) == (1, 1, 0)
    for p, r in [(NONE, A), (A, NONE)]:
        assert (dice(p, r), iou(p, r)) == (0, 0)
        assert hd95(p, r) == pytest.approx(diagonal)


def test_hd95_of_single_pixels_is_their_distance_in_the_units_of_the_spacing() -> None:
    p, r = box((8, 10), np.s_[1], np.s_[2]), box((8, 10), np.s_[4], np.s_[6])
    assert hd95(p, r) == pytest.approx(5)
    assert hd95(p, r, spacing=(2.0, 0.5)) == pytest.approx(np.hypot(6, 2))


def test_hd95_forgives_the_farthest_twentieth_and_no_more() -> None:
    line = box((4, 100), np.s_[0], np.s_[:])
    spike = line.copy()
    spike[0, 3, 50] = True  # one surface pixel of 101, 3 away
    assert hd95(spike, line) == 0
    spike[0, 3, :10] = True  # 11 of 111: a tenth
    assert hd95(spike, line) == 3


def test_the_inside_of_a_mask_is_no_surface_and_the_image_edge_is() -> None:
    full = box((9, 9), np.s_[:], np.s_[:])
    centre = box((9, 9), np.s_[4], np.s_[4])
    # From the rim of a 9x9 square to its centre 4 to sqrt(32); from the centre to the rim 4.
    rim = [np.hypot(i - 4, j - 4) for i in range(9) for j in range(9) if {i, j} & {0, 8}]
    assert hd95(full, centre) == pytest.approx(np.percentile(rim, 95))


def test_volumes_are_measured_in_three_dimensions() -> None:
    p, r = box((3, 4, 5), np.s_[0], np.s_[0], np.s_[0]), box((3, 4, 5), np.s_[2], np.s_[2], np.s_[1])
    assert hd95(p, r) == pytest.approx(3)
    assert hd95(p, r, spacing=(5.0, 1.0, 1.0)) == pytest.approx(np.sqrt(100 + 4 + 1))


def test_classes_are_scored_apart_and_collapse_is_counted() -> None:
    reference = np.zeros((3, 6, 6), np.int64)
    reference[0, :3, :3], reference[0, 4:, 4:] = 1, 2
    reference[1, :3, :3] = 1
    prediction = reference.copy()
    prediction[0][reference[0] == 2] = 0  # class 2 not found
    prediction[1] = 0  # class 1 not found
    prediction[2, 0, 0] = 2  # found where there is none
    scores = score_classes(prediction, reference, classes=3)
    assert scores.dice.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert scores.iou.tolist() == scores.dice.tolist()
    diagonal = np.hypot(5, 5)
    assert scores.hd95 == pytest.approx(np.array([[0, diagonal], [diagonal, 0], [0, diagonal]]))
    assert scores.empty_predictions.tolist() == [1, 1]
    assert scores.empty_references.tolist() == [1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: dice(A, A[:, 1:]),
        lambda: iou(A[0], A[0]),
        lambda: dice(A.astype(int), A),
        lambda: hd95(A, B, spacing=(1.0,)),
        lambda: hd95(A, B, spacing=(1.0, 0.0)),
    ],
)
def test_masks_that_do_not_fit_are_refused(wrong: Any) -> None:
    with pytest.raises(InputError) as refused:
        wrong()
    assert refused.value.code == "shape"


# --- what a mask finds that is the same for every image -----------------------------------------------------


def maps(*marked: set[int], label: int = 1, pixels: int = 4) -> Any:
    """Label maps of one row each, with the label at the named places."""
    return np.array([[[label if place in map_ else 0 for place in range(pixels)]] for map_ in marked])


def test_an_organ_that_never_moves_is_found_without_a_look_at_any_image() -> None:
    flat = np.tile(A.astype(np.int64), (3, 1, 1))
    deep = np.tile(box((3, 4, 5), np.s_[1:], np.s_[:2], np.s_[1:4]).astype(np.int64), (3, 1, 1, 1))
    for same in (flat, deep):
        assert constant_mask_dice(same[:2], same, classes=2).tolist() == [[1], [1], [1]]


def test_one_that_lies_everywhere_alike_leaves_the_whole_image_as_the_best_guess() -> None:
    moving = maps({0}, {1}, {2}, {3})
    # All four pixels for the one that is right: 2 x 1 / (4 + 1).
    np.testing.assert_allclose(constant_mask_dice(moving, moving, classes=2), 0.4)


def test_the_share_of_the_maps_is_the_one_that_serves_them_best() -> None:
    # Of three maps, pixels 0 to 3 are in 3, 2, 0 and 1. {0}: 2/3; {0, 1}: 5/6; {0, 1, 3}: 4/5; all: 2/3.
    learned = maps({0, 1}, {0, 1}, {0, 3})
    found = constant_mask_dice(learned, maps({0, 1}, {1, 2}, {3}, set()), classes=2)
    np.testing.assert_allclose(found, [[1], [0.5], [0], [0]])


def test_a_class_that_is_hardly_ever_there_is_best_never_found() -> None:
    found = constant_mask_dice(maps(set(), set(), {0}), maps(set(), {0}), classes=3)
    # The second class was in no map at all.
    assert found.tolist() == [[1, 1], [0, 1]]


def test_no_other_share_would_have_served_the_learned_maps_better() -> None:
    rng = np.random.default_rng(0)
    for shape in ((7, 5, 6), (5, 3, 4, 4)):
        learned = (rng.random(shape) < rng.random(shape[1:])) * rng.integers(1, 3, shape)
        reached = constant_mask_dice(learned, learned, classes=3).mean(axis=0)
        for label in (1, 2):
            masks = learned == label
            tried = [
                dice(np.broadcast_to(masks.sum(axis=0) >= least, shape), masks).mean()
                for least in range(len(masks) + 2)
            ]
            assert reached[label - 1] == pytest.approx(max(tried))


@pytest.mark.parametrize(
    ("learned", "test"),
    [(maps({0}), maps({0}, pixels=5)), (maps({0})[:0], maps({0})), (maps({0})[0], maps({0})[0])],
    ids=["another size", "nothing to learn from", "no images"],
)
def test_maps_that_do_not_fit_teach_no_constant_mask(learned: Any, test: Any) -> None:
    with pytest.raises(InputError) as refused:
        constant_mask_dice(learned, test, classes=2)
    assert refused.value.code == "shape"


# --- what somebody finds who moves the threshold ------------------------------------------------------------


def of_two(foreground: Any) -> Any:
    """Probabilities of two classes, ``(N, 2, 1, pixels)``, from those of the foreground."""
    foreground = np.asarray(foreground, np.float64)[:, None]
    return np.stack([1 - foreground, foreground], axis=1)


def test_a_model_that_answers_too_seldom_is_brought_to_answer() -> None:
    probabilities = of_two([[0.3, 0.2, 0.1, 0.0], [0.1, 0.3, 0.0, 0.1]])
    test = maps({0, 1}, {1})
    assert dice(probabilities[:, 1] > 0.5, test == 1).tolist() == [0, 0]
    # From 0.2 on: all of the first and all of the second; from 0.3 on the first would lose a pixel.
    assert recoverable_dice(probabilities, test).tolist() == [[1], [1]]


def test_one_threshold_serves_all_images() -> None:
    probabilities = of_two([[0.9, 0.8, 0.0, 0.0], [0.6, 0.4, 0.4, 0.4]])
    test = maps({0, 1}, {0})
    # From 0.6 on.
    assert recoverable_dice(probabilities, test).tolist() == [[1], [1]]
    # From 0.9 on serves the first: 1 and 0. From 0.4 on the second: 2/3 and 1, which is the better mean.
    found = recoverable_dice(probabilities, maps({0}, {0, 1, 2, 3}))
    np.testing.assert_allclose(found, [[2 / 3], [1]])


def test_answers_the_wrong_way_round_are_recovered() -> None:
    rng = np.random.default_rng(0)
    test = rng.integers(0, 2, (5, 6, 7))
    right = np.stack([test == 0, test == 1], axis=1) * 0.8 + 0.1
    assert recoverable_dice(right, test).tolist() == recoverable_dice(1 - right, test).tolist() == [[1]] * 5


def test_who_says_the_same_everywhere_has_everything_or_nothing_left() -> None:
    blank = of_two(np.full((3, 4), 0.5))
    # Everything: 2 x 1 / (4 + 1), against nothing in images that all have one pixel; and the other way round.
    np.testing.assert_allclose(recoverable_dice(blank, maps({0}, {1}, {2})), 0.4)
    np.testing.assert_allclose(recoverable_dice(blank, maps({0}, set(), set())), [[0], [1], [1]])


def test_each_class_has_its_own_threshold() -> None:
    # Background has the largest share everywhere; the classes are best found from 0.3 and from 0.2 on.
    shares = np.array([[[0.6, 0.5, 0.9, 0.8]], [[0.1, 0.3, 0.1, 0.0]], [[0.3, 0.2, 0.0, 0.2]]])[None]
    found = recoverable_dice(shares, np.array([[[2, 1, 0, 2]]]))
    # {0, 1, 3} against {0, 3}: 2 x 2 / (3 + 2); {0} alone: 2/3.
    np.testing.assert_allclose(found, [[1, 0.8]])


@pytest.mark.parametrize("shape", [(6, 5, 7), (4, 3, 4, 5)])
def test_no_threshold_of_all_that_differ_serves_better(shape: tuple[int, ...]) -> None:
    """Of nine different values the grid meets every one."""
    rng = np.random.default_rng(1)
    test = rng.integers(0, 2, shape)
    for foreground in (
        (rng.integers(0, 7, shape) + 2 * test) / 8,
        (rng.integers(0, 7, shape) + 2 - 2 * test) / 8,
    ):
        found = recoverable_dice(np.stack([1 - foreground, foreground], axis=1), test)
        assert found.shape == (shape[0], 1)
        cuts = np.arange(10) / 8
        sides = [foreground >= cut for cut in cuts] + [foreground < cut for cut in cuts]
        assert found.mean() == pytest.approx(max(dice(side, test == 1).mean() for side in sides))


def test_of_two_classes_the_answers_themselves_are_a_threshold_but_for_the_grid() -> None:
    """Forty-eight thresholds from each side of 10,000 different values: at most 0.02 of Dice lie between two."""
    rng = np.random.default_rng(2)
    for share in (0.02, 0.2, 0.6):
        test = (rng.random((4, 50, 50)) < share).astype(np.int64)
        foreground = 1 / (1 + np.exp(-rng.normal(3 * test - 1.5)))
        probabilities = np.stack([1 - foreground, foreground], axis=1).astype(np.float32)
        answered = dice(probabilities.argmax(axis=1) == 1, test == 1)
        assert recoverable_dice(probabilities, test).mean() > answered.mean() - 0.02


@pytest.mark.parametrize(
    ("probabilities", "test"),
    [
        (of_two([[0.5] * 5]), maps({0})),
        (of_two([[0.5] * 4] * 2), maps({0})),
        (of_two([[0.5] * 4])[:0], maps({0})[:0]),
        (of_two([[0.5] * 4])[:, 1], maps({0})),
    ],
    ids=["another size", "another number", "no images", "no classes"],
)
def test_probabilities_that_do_not_fit_are_refused(probabilities: Any, test: Any) -> None:
    with pytest.raises(InputError) as refused:
        recoverable_dice(probabilities, test)
    assert refused.value.code == "shape"


def test_structures_smaller_than_the_finest_threshold_are_found_as_answered() -> None:
    """Four pixels of 20,000, every one answered rightly."""
    rng = np.random.default_rng(0)
    test = np.zeros((2, 100, 100), np.int64)
    test[:, 5, 5:7] = 1
    foreground = 0.4 * rng.random(test.shape) + 0.6 * test
    assert recoverable_dice(np.stack([1 - foreground, foreground], axis=1), test).tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("clean", "recoverable", "left", "lost"),
    [
        (0.7, 0.8, 0.5, 0.5),
        (0.7, 0.8, 0.1, 1.0),
        (0.7, 0.8, 0.8, 0.0),
        (0.1, 0.8, 0.2, None),
        (0.7, 0.22, 0.2, None),
    ],
    ids=["half", "below the constant mask", "nothing lost", "learned nothing", "learned positions only"],
)
def test_what_is_lost_counts_above_the_constant_mask(
    clean: float, recoverable: float, left: float, lost: float | None
) -> None:
    found = share_lost(clean, recoverable, left, 0.2)
    assert found == (lost if lost is None else pytest.approx(lost))
