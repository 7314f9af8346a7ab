"""Overlap and surface distance, against figures counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medveil.models.errors import InputError
from medveil.models.quality import dice, hd95, iou, score_classes


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
