"""Whatever the method asks for, what is written keeps to the budget in stored integers."""

from __future__ import annotations

import math
from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from medveil.agent.budget import Budget, enforce, measure, room
from medveil.agent.imageio import FullRange, Image
from medveil.agent.imageio.window import Mapping, Rescale, StoredRange, StoredWindow, Window
from medveil.models.errors import ImageError

WISHES = stn.arrays(np.float32, (1, 5, 4), elements=st.floats(-2, 2, width=32))
COLOUR_WISHES = stn.arrays(np.float32, (3, 5, 4), elements=st.floats(-2, 2, width=32))
PIXELS = stn.arrays(np.uint8, (5, 4))
COLOURS = stn.arrays(np.uint8, (5, 4, 3))


def image(pixels: np.ndarray, maximum: int = 255, *, inverted: bool = False) -> Image:
    return Image(pixels, FullRange(maximum, inverted), PurePosixPath("x.png"))


@given(PIXELS, WISHES, st.floats(0.1, 40), st.floats(0.01, 1))
def test_no_wish_exceeds_epsilon_or_mask(pixels, wish, epsilon, mask):
    budget = Budget(epsilon, mask)
    written = enforce(image(pixels), wish, budget)
    change = written.astype(int) - pixels
    assert np.abs(change).max() <= epsilon
    assert np.count_nonzero(change) <= math.ceil(mask * pixels.size)
    measure(image(pixels), written, budget)


@given(COLOURS, COLOUR_WISHES, st.floats(0.1, 40))
def test_in_colour_the_channels_of_a_pixel_move_together(pixels, wish, epsilon):
    written = enforce(image(pixels), wish, Budget(epsilon, 1.0))
    change = written.astype(int) - pixels
    assert np.abs(change).max() <= epsilon
    assert (change == change[:, :, :1]).all()


@given(COLOURS, COLOUR_WISHES)
def test_in_colour_channels_may_move_apart_when_asked(pixels, wish):
    written = enforce(image(pixels), wish, Budget(8, 1.0), together=False)
    assert np.abs(written.astype(int) - pixels).max() <= 8


def test_both_signs_of_the_noise_are_kept():
    pixels = np.full((2, 2), 100, np.uint8)
    wish = np.array([[[8, -8], [0, 3]]], np.float32) / 255
    assert enforce(image(pixels), wish, Budget(8, 1.0)).tolist() == [[108, 92], [100, 103]]


def test_a_wish_is_rounded_to_nearest_not_cut():
    pixels = np.full((1, 2), 100, np.uint8)
    wish = np.array([[[2.6, -2.6]]], np.float32) / 255
    assert enforce(image(pixels), wish, Budget(8, 1.0)).tolist() == [[103, 97]]


def test_where_the_wish_is_zero_the_stored_value_stays():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(enforce(image(pixels), np.zeros((1, 16, 16), np.float32), Budget(8, 1.0)), pixels)


def test_of_too_many_changes_the_largest_stay_and_ties_go_to_the_lower_index():
    pixels = np.full((1, 4), 100, np.uint8)
    wish = np.array([[[1, 5, 5, 5]]], np.float32) / 255
    assert enforce(image(pixels), wish, Budget(8, 0.5)).tolist() == [[100, 105, 105, 100]]


@pytest.mark.parametrize(
    ("maximum", "dtype", "units"), [(255, "uint8", 8), (4095, "uint16", 128), (65535, "uint16", 2056)]
)
def test_epsilon_is_floored_to_whole_stored_units(maximum, dtype, units):
    pixels = np.full((1, 2), maximum // 2, dtype)
    wish = np.array([[[1.0, -1.0]]], np.float32)
    change = enforce(image(pixels, maximum), wish, Budget(8, 1.0)).astype(int) - pixels
    assert change.tolist() == [[units, -units]]


def test_an_epsilon_below_one_stored_unit_changes_nothing():
    pixels = np.full((4, 4), 100, np.uint8)
    wish = np.ones((1, 4, 4), np.float32)
    assert np.array_equal(enforce(image(pixels), wish, Budget(0.9, 1.0)), pixels)
    assert not any(side.any() for side in room(image(pixels), Budget(0.9, 1.0)))


def test_room_is_what_the_stored_values_can_really_do_on_the_screen():
    down, up = room(image(np.array([[0, 100, 253, 255]], np.uint8)), Budget(8.9, 1.0))
    assert (down[0] * 255).round(3).tolist() == [[0, -8, -8, -8]]
    assert (up[0] * 255).round(3).tolist() == [[8, 8, 2, 0]]


def test_a_change_that_no_window_shows_counts_as_no_room():
    air, edge, tissue = -1000, -158, 40
    window = StoredWindow(StoredRange(-2048, 2047), (Mapping(Rescale(), Window(40, 401)),))
    pixels = np.array([[air, edge, tissue]], np.int16)
    down, up = room(Image(pixels, window, PurePosixPath("ct")), Budget(8, 1.0))
    assert (down[0] * 400).round(3).tolist() == [[0, -2.5, -12]]
    assert (up[0] * 400).round(3).tolist() == [[0, 12, 12]]


def test_where_0_is_white_a_smaller_stored_value_is_room_upwards():
    down, up = room(image(np.array([[0, 4]], np.uint8), inverted=True), Budget(8, 1.0))
    assert (up[0] * 255).round(3).tolist() == [[0, 4]]
    assert (down[0] * 255).round(3).tolist() == [[-8, -8]]


def test_in_an_inverted_range_brighter_means_a_smaller_stored_value():
    pixels = np.full((1, 1), 100, np.uint8)
    wish = np.full((1, 1, 1), 4 / 255, np.float32)
    assert enforce(image(pixels, inverted=True), wish, Budget(8, 1.0)).item() == 96


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_refused(bad):
    with pytest.raises(ImageError) as caught:
        enforce(image(np.zeros((2, 2), np.uint8)), np.full((1, 2, 2), bad, np.float32), Budget(8, 1.0))
    assert caught.value.code == "not-finite"


def test_a_change_of_another_shape_is_refused():
    with pytest.raises(ImageError):
        enforce(image(np.zeros((2, 2), np.uint8)), np.zeros((1, 3, 2), np.float32), Budget(8, 1.0))


def test_measuring_what_was_written_catches_one_value_too_far():
    pixels = np.full((4, 4), 100, np.uint8)
    written = pixels.copy()
    written[2, 2] = 109
    with pytest.raises(ImageError) as caught:
        measure(image(pixels), written, Budget(8, 1.0))
    assert caught.value.code == "budget-exceeded"


def test_psnr_of_one_changed_pixel_is_the_closed_form():
    pixels = np.full((10, 10), 100, np.uint8)
    written = pixels.copy()
    written[0, 0] = 108
    change = measure(image(pixels), written, Budget(8, 1.0))
    assert change.psnr_db == pytest.approx(10 * math.log10(255**2 * 100 / 64), abs=1e-4)
    assert change.epsilon_max == 8.0
    assert change.changed == 0.01
