"""Measures of change, against closed forms and a window-by-window SSIM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medveil.models.errors import InputError
from medveil.models.quality import (
    changed_share,
    max_change,
    mean_shift,
    measure,
    median_or_none,
    psnr_db,
    ssim,
)


def flat(value: float, *, count: int = 1, side: int = 16, dtype: Any = np.float64) -> Any:
    return np.full((count, 1, side, side), value, dtype)


@pytest.mark.parametrize("step", [1, 2, 8, 255])
def test_psnr_of_one_even_step_is_its_closed_form(step: int) -> None:
    assert psnr_db(flat(0), flat(step), peak=255) == pytest.approx(20 * np.log10(255 / step))


def test_psnr_at_epsilon_8_on_a_share_of_the_pixels() -> None:
    # All pixels at 8/255: 30.07 dB; a quarter of them: 10 log10(4) = 6.02 dB more.
    protected = flat(0.5)
    protected[:, :, :8, :8] += 8 / 255
    assert psnr_db(flat(0.5), protected) == pytest.approx(20 * np.log10(255 / 8) + 10 * np.log10(4))


def test_an_unchanged_image_has_infinite_psnr_and_perfect_similarity() -> None:
    images = np.random.default_rng(0).random((2, 3, 16, 16))
    found = measure(images, images)
    assert np.isposinf(found.psnr_db).all()
    assert found.ssim == pytest.approx(1)
    assert not found.changed_share.any()
    assert not found.max_change.any()
    assert not found.mean_shift.any()


def test_unsigned_integers_do_not_wrap_around() -> None:
    original, protected = flat(3, dtype=np.uint8), flat(1, dtype=np.uint8)
    assert max_change(original, protected) == 2
    assert mean_shift(original, protected) == -2
    assert psnr_db(original, protected, peak=255) == pytest.approx(20 * np.log10(255 / 2))


@pytest.mark.parametrize("peak", [1.0, 255.0, 4095.0])
def test_measures_do_not_depend_on_the_unit(peak: float) -> None:
    rng = np.random.default_rng(1)
    x = rng.random((2, 1, 20, 20))
    y = np.clip(x + rng.normal(0, 0.05, x.shape), 0, 1)
    assert psnr_db(x * peak, y * peak, peak=peak) == pytest.approx(psnr_db(x, y))
    assert ssim(x * peak, y * peak, peak=peak) == pytest.approx(ssim(x, y))


def ssim_by_windows(x: Any, y: Any, peak: float) -> float:
    """Wang et al. 2004, eq. 13 and 14, one window after another."""
    ij = np.arange(11) - 5
    weights = np.exp(-(ij[:, None] ** 2 + ij[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
            found.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("shape", [(11, 11), (14, 19)])
def test_ssim_is_the_mean_over_windows(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    x = rng.random(shape)
    y = np.clip(x + rng.normal(0, 0.1, shape), 0, 1)
    assert ssim(x[None, None], y[None, None])[0] == pytest.approx(ssim_by_windows(x, y, 1.0), rel=1e-9)


def test_ssim_of_two_flat_images_is_the_luminance_term() -> None:
    a, b, c1 = 0.2, 0.6, 0.01**2
    assert ssim(flat(a), flat(b)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_of_inverted_contrast_is_negative() -> None:
    x = np.random.default_rng(0).random((1, 1, 16, 16))
    assert ssim(x, 1 - x) < 0


def test_channels_are_averaged_in_ssim() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.random((2, 1, 3, 16, 16))
    each = [ssim(x[:, c : c + 1], y[:, c : c + 1])[0] for c in range(3)]
    assert ssim(x, y)[0] == pytest.approx(np.mean(each))


def test_images_smaller_than_a_window_have_no_ssim() -> None:
    assert np.isnan(ssim(flat(0.1, side=10), flat(0.1, side=10))).all()


def test_every_image_is_measured_alone() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.random((2, 5, 2, 13, 12))
    whole = measure(x, y)
    for i in range(5):
        one = measure(x[i : i + 1], y[i : i + 1])
        for name in ("psnr_db", "ssim", "changed_share", "max_change", "mean_shift"):
            assert getattr(one, name)[0] == pytest.approx(getattr(whole, name)[i], rel=1e-12)


def test_a_pixel_with_one_changed_channel_is_one_changed_pixel() -> None:
    x = np.zeros((1, 3, 2, 2))
    y = x.copy()
    y[0, 1, 0, 0] = 0.1
    y[0, :, 1, 1] = -0.2
    assert changed_share(x, y) == 0.5
    assert max_change(x, y) == pytest.approx(0.2)


def test_a_region_of_interest_measures_its_own_pixels_only() -> None:
    x = flat(0.5, side=24)
    y = x.copy()
    y[..., :12] += 0.1
    left = np.zeros((1, 1, 24, 24), bool)
    left[..., :12] = True
    inside, outside = measure(x, y, roi=left), measure(x, y, roi=~left)
    assert inside.psnr_db == pytest.approx(20)
    assert (inside.changed_share, inside.mean_shift) == (1, pytest.approx(0.1))
    assert (outside.changed_share, outside.max_change, outside.mean_shift) == (0, 0, 0)
    assert np.isposinf(outside.psnr_db)
    assert inside.ssim < ssim(x, y) < outside.ssim


def test_the_region_of_one_image_does_not_touch_another() -> None:
    x, y = flat(0.5, count=2), flat(0.6, count=2)
    roi = np.zeros((2, 1, 16, 16), bool)
    roi[0] = True
    found = measure(x, y, roi=roi)
    assert found.psnr_db[0] == pytest.approx(20)
    for values in (found.psnr_db, found.ssim, found.changed_share, found.max_change, found.mean_shift):
        assert not np.isnan(values[0])
        assert np.isnan(values[1]), "an empty region has nothing to measure"


def test_volumes_are_measured_as_a_whole() -> None:
    x = np.zeros((1, 1, 3, 16, 16))
    y = x.copy()
    y[:, :, 1] = 0.1
    assert psnr_db(x, y) == pytest.approx(20 + 10 * np.log10(3))
    assert changed_share(x, y) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("original", "protected", "roi"),
    [
        (np.zeros((1, 1, 12, 12)), np.zeros((1, 1, 12, 13)), None),
        (np.zeros((12, 12)), np.zeros((12, 12)), None),
        (np.zeros((1, 1, 12, 12)), np.zeros((1, 1, 12, 12)), np.ones((1, 1, 5, 5), bool)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(original: Any, protected: Any, roi: Any) -> None:
    with pytest.raises(InputError) as refused:
        measure(original, protected, roi=roi)
    assert refused.value.code == "shape"


def test_a_median_that_json_cannot_hold_is_none() -> None:
    assert median_or_none(np.array([30.0, np.inf, 40.0])) == 40
    assert median_or_none(np.array([np.inf, np.inf, 3.0])) is None
    assert median_or_none(np.array([np.nan, 36.0])) == 36
    assert median_or_none(np.array([])) is None
