"""An image is a frozen value that knows how far each stored value may move."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from medveil.agent.imageio import FullRange, Image, pixel_digest
from medveil.agent.imageio.limits import MAX_PIXELS, check_size, occupied_maximum
from medveil.models.errors import ImageError

HERE = PurePosixPath("a/x.png")


@given(stn.arrays(np.uint16, (4, 4), elements=st.integers(0, 4095)), st.floats(0.01, 300))
def test_every_stored_value_lies_within_its_own_bounds(stored, epsilon):
    low, high = FullRange(4095).bounds(stored, epsilon)
    assert (low <= stored).all()
    assert (stored <= high).all()
    assert high.max() <= 4095


@pytest.mark.parametrize("inverted", [False, True])
def test_no_wish_leaves_the_stored_values_alone(inverted):
    stored = np.arange(4096, dtype=np.uint16)
    window = FullRange(4095, inverted)
    assert np.array_equal(window.shifted(stored, np.zeros(4096, np.float32)), stored)


@pytest.mark.parametrize("inverted", [False, True])
def test_a_shift_shows_as_asked(inverted):
    stored = np.full(3, 2000, np.uint16)
    window = FullRange(4095, inverted)
    wish = np.array([0.1, -0.1, 0.01], np.float32)
    shown = window.display(window.shifted(stored, wish)) - window.display(stored)
    assert np.allclose(shown, wish, atol=0.6 / 4095)


def test_the_digest_covers_values_shape_and_type_but_no_name_or_label():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    same = Image(pixels.copy(), FullRange(255), PurePosixPath("b"), 3, "other")
    assert Image(pixels, FullRange(255), HERE).digest == same.digest
    digests = {
        pixel_digest(pixels),
        pixel_digest(pixels.reshape(3, 2)),
        pixel_digest(pixels.astype(np.uint16)),
        pixel_digest(pixels + 1),
    }
    assert len(digests) == 4


def test_byte_order_does_not_change_the_digest():
    pixels = np.arange(6, dtype="<u2").reshape(2, 3)
    assert pixel_digest(pixels) == pixel_digest(pixels.astype(">u2"))


def test_the_pixels_given_stay_writable_for_their_owner():
    pixels = np.zeros((2, 2), np.uint8)
    Image(pixels, FullRange(255), HERE)
    pixels[0, 0] = 1


@pytest.mark.parametrize("shape", [(2,), (2, 2, 4), (2, 2, 2, 3), (0, 2)])
def test_what_is_neither_grey_nor_rgb_is_refused(shape):
    with pytest.raises(ImageError):
        Image(np.zeros(shape, np.uint8), FullRange(255), HERE)


@pytest.mark.parametrize(
    ("largest", "bits", "maximum"),
    [(0, 8, 255), (200, 16, 255), (700, 16, 1023), (4095, 16, 4095), (4096, 16, 8191)],
)
def test_the_range_is_the_bits_that_are_really_used(largest, bits, maximum):
    assert occupied_maximum(largest, bits) == maximum


def test_a_claimed_size_is_refused_before_memory_is_taken():
    with pytest.raises(ImageError) as caught:
        check_size(2, MAX_PIXELS)
    assert caught.value.code == "too-large"
