"""Tiles cover every pixel once and join without a seam, in two and three dimensions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medveil.agent.segmentation import tiling
from medveil.agent.segmentation.tiling import Tiles, padded, spans
from medveil.models.errors import ConfigurationError, ImageError


@given(
    length=st.integers(1, 300),
    side=st.integers(2, 16).map(lambda n: 4 * n),
    halo=st.integers(0, 8),
)
def test_tiles_keep_every_pixel_exactly_once_and_stay_inside(length, side, halo):
    halo = min(halo, (side - 4) // 2)
    whole = padded(length, side, 4)
    found = spans(whole, side, halo, 4)
    assert [pixel for span in found for pixel in range(span.keep, span.stop)] == list(range(whole))
    for span in found:
        assert span.start % 4 == 0
        assert 0 <= span.start <= whole - side
        assert span.start == 0 or span.keep - span.start >= halo
        assert span.stop == whole or span.start + side - span.stop >= halo


@pytest.mark.parametrize("space", [(61, 50), (16, 16), (5, 7), (16, 40), (64, 17)])
def test_an_image_in_tiles_is_answered_as_in_one_piece(space, local_contrast, rng):
    images = rng.random((2, 1, *space), np.float32)
    ask = local_contrast()
    whole = tuple(padded(length, 16, 4) for length in space)
    filled = np.pad(images, [(0, 0), (0, 0), *((0, w - s) for w, s in zip(whole, space, strict=True))])
    expected = ask.perturbation(filled)[:, :, : space[0], : space[1]]
    found = Tiles((16, 16), 2, 4).answered(images, ask.perturbation)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert all(shape[1:] == (1, 16, 16) for shape in ask.shapes[1:])


def test_volumes_are_tiled_as_images_are(local_contrast, rng):
    volume = rng.random((1, 1, 20, 24, 16), np.float32)
    ask = local_contrast()
    found = Tiles((12, 12, 12), 2, 4).answered(volume, ask.perturbation)
    np.testing.assert_allclose(found, ask.perturbation(volume), rtol=0, atol=1e-6)


def test_large_tiles_are_asked_about_a_few_at_a_time(local_contrast, monkeypatch, rng):
    """The memory of a slab must not grow with the number of its tiles."""
    images, ask = rng.random((1, 1, 40, 40), np.float32), local_contrast()
    expected = Tiles((16, 16), 2, 4).answered(images, local_contrast().perturbation)
    monkeypatch.setattr(tiling, "_BYTES_TOGETHER", 4 * 16 * 16 * 4)
    np.testing.assert_array_equal(Tiles((16, 16), 2, 4).answered(images, ask.perturbation), expected)
    assert [shape[0] for shape in ask.shapes] == [4, 4, 1]


def test_tiles_off_their_own_grid_are_refused():
    with pytest.raises(ConfigurationError) as refused:
        Tiles((10, 10), 0, 4)
    assert refused.value.code == "tiles"


def test_an_image_in_several_tiles_of_nothing_but_borders_is_refused_by_name(local_contrast):
    tiles, ask = Tiles((8, 8), 4, 4), local_contrast()
    assert tiles.answered(np.ones((1, 1, 8, 7), np.float32), ask.perturbation).shape == (1, 1, 8, 7)
    with pytest.raises(ImageError) as refused:
        tiles.answered(np.ones((1, 1, 8, 9), np.float32), ask.perturbation)
    assert refused.value.code == "larger-than-tile"
