"""The contact sheet shows what was taken for the mask, or its contour band; the original shines through."""

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
@pytest.mark.parametrize(("radius", "title"), [(3, "contour band"), (0, "marked structures")])
def test_what_is_marked_has_a_column_of_its_own(colour, radius, title, picture, disc, perturber):
    pixels = np.full((40, 36, 3) if colour else (40, 36), 100, np.uint8)
    image = Image(pixels, FullRange(255), PurePosixPath("a.png"))
    made = perturber(band_radius=radius)
    assert made.marks == title
    mask = disc()
    marked = made.marked_in(LabelMap(mask))
    assert np.array_equal(marked, mask > 0) is (radius == 0)
    example = Example("lesion", image, pixels + 1, marked)
    plain, coloured = (np.asarray(draw([example], marks)) for marks in ("", title))
    assert coloured.shape[1] > plain.shape[1]
    assert not orange(plain).any()
    rows, columns = np.nonzero(orange(coloured))
    assert columns.min() > plain.shape[1] - 20
    share = len(rows) / (176 * 176 * 36 / 40)
    assert share == pytest.approx(marked.mean(), abs=0.03)
