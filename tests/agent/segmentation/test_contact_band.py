"""The contact sheet shows where the contour band lies, beside the original that shines through it."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pytest

from medveil.agent.contact_sheet import Example, draw
from medveil.agent.imageio import FullRange, Image
from medveil.agent.segmentation import LabelMap


def orange(sheet: np.ndarray) -> np.ndarray:
    """Return which pixels are clearly more red than blue: no grey image and no text is."""
    return sheet[:, :, 0].astype(int) - sheet[:, :, 2] > 60


@pytest.mark.parametrize("colour", [False, True])
def test_the_band_has_a_column_of_its_own(colour, picture, disc, perturber):
    pixels = np.full((40, 36, 3) if colour else (40, 36), 100, np.uint8)
    image = Image(pixels, FullRange(255), PurePosixPath("a.png"))
    band = perturber(band_radius=3).band(LabelMap(disc()))
    plain, banded = (np.asarray(draw([Example("lesion", image, pixels + 1, b)])) for b in (None, band))
    assert banded.shape[1] > plain.shape[1]
    assert not orange(plain).any()
    rows, columns = np.nonzero(orange(banded))
    assert columns.min() > plain.shape[1] - 20
    share = len(rows) / (176 * 176 * 36 / 40)
    assert share == pytest.approx(band.mean(), abs=0.03)
