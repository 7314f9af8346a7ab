from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medveil.agent.imageio.window import (
    Function,
    LookupTable,
    Mapping,
    Rescale,
    StoredRange,
    StoredWindow,
    Window,
    histogram,
    interval_table,
    percentile_window,
    undeclared_padding,
)
from medveil.models.errors import ImageError

TWELVE_BITS = StoredRange.of_bits(12, signed=False)


def table(*entries: int, first: int = 0) -> LookupTable:
    return LookupTable(first, np.array(entries, "<u2").tobytes())


def reach(window: StoredWindow, value: int, epsilon: float) -> tuple[int, int]:
    low, high = window.bounds(np.array([value], np.int32), epsilon)
    return int(low[0]) - value, int(high[0]) - value


@pytest.mark.parametrize(
    ("width", "slope", "epsilon", "units"),
    [
        (80, 1, 8, 2),
        (100, 1, 8, 3),
        (400, 1, 8, 12),
        (1500, 1, 8, 47),
        (1800, 1, 8, 56),
        (1600, 1, 8, 50),
        (100, 25, 8, 0),
        (128, 1, 2, 0),
        (80, 1, 2, 0),
    ],
)
def test_the_budget_in_stored_units_is_the_one_of_the_windows_width(
    width: float, slope: float, epsilon: float, units: int
) -> None:
    window = StoredWindow(
        StoredRange.of_bits(16, signed=True), (Mapping(Rescale(slope), Window(40 * slope, width)),)
    )
    assert reach(window, 40, epsilon) == (-units, units)


def test_a_twelve_bit_full_range_window_allows_128_units() -> None:
    window = StoredWindow(TWELVE_BITS, (Mapping(Rescale(), Window(2048, 4096)),))
    assert reach(window, 2000, 8) == (-128, 128)


def test_an_eight_bit_full_range_window_allows_exactly_epsilon() -> None:
    window = StoredWindow(StoredRange.of_bits(8, signed=False), (Mapping(Rescale(), Window(128, 256)),))
    for epsilon in range(9):
        assert reach(window, 100, epsilon) == (-epsilon, epsilon)


@given(
    centre=st.floats(-500, 3000),
    width=st.floats(2, 4000),
    slope=st.sampled_from([0.5, 1.0, 3.774114, 25.0, -1.0]),
    function=st.sampled_from(list(Function)),
    inverted=st.booleans(),
    epsilon=st.sampled_from([0.5, 2.0, 8.0]),
)
@settings(max_examples=60, deadline=None)
def test_no_value_of_an_interval_shows_more_than_epsilon(
    centre: float, width: float, slope: float, function: Function, inverted: bool, epsilon: float
) -> None:
    mapping = Mapping(Rescale(slope, -100.0), Window(centre, width, function), inverted)
    low, high = interval_table(StoredWindow(TWELVE_BITS, (mapping,)), epsilon)
    shown = mapping.display(TWELVE_BITS)
    for bound in (low, high):
        assert np.abs(shown[bound] - shown).max() <= epsilon / 255 + 1e-9


def test_the_interval_is_as_wide_as_the_budget_allows() -> None:
    mapping = Mapping(Rescale(), Window(2000, 1000, Function.SIGMOID))
    low, high = interval_table(StoredWindow(TWELVE_BITS, (mapping,)), 8)
    line = mapping.voi.ramp(TWELVE_BITS.values().astype(np.float64))  # type: ignore[union-attr]
    inside = slice(100, 3900)
    for bound, step in ((low, -1), (high, 1)):
        assert (np.abs(line[bound[inside]] - line[inside]) <= 8 / 255 + 1e-9).all()
        assert (np.abs(line[bound[inside] + step] - line[inside]) > 8 / 255).all()


def test_every_window_limits_the_change_not_only_the_first() -> None:
    wide, narrow = (Mapping(Rescale(), Window(2000, width)) for width in (4000, 80))
    assert reach(StoredWindow(TWELVE_BITS, (wide, narrow)), 2000, 8) == (-2, 2)
    assert reach(StoredWindow(TWELVE_BITS, (narrow, wide)), 2000, 8) == (-2, 2)


def test_black_and_white_move_no_further_than_the_ramp_would_allow() -> None:
    window = StoredWindow(TWELVE_BITS, (Mapping(Rescale(), Window(2000, 400)),))
    assert reach(window, 10, 8) == (-10, 12)
    assert reach(window, 4000, 8) == (-12, 12)


def test_a_table_that_saturates_does_not_let_its_flat_ends_move_freely() -> None:
    steps = table(*([0] * 1000 + list(range(256)) + [255] * 2840))
    window = StoredWindow(TWELVE_BITS, (Mapping(Rescale(), steps),))
    assert reach(window, 500, 8) == (-8, 8)
    assert reach(window, 1100, 8) == (-8, 8)


def test_a_threshold_window_is_never_crossed() -> None:
    window = StoredWindow(TWELVE_BITS, (Mapping(Rescale(), Window(2000, 1)),))
    assert reach(window, 1999, 8) == (0, 0)


@pytest.mark.parametrize("which", ["modality", "voi"])
def test_a_table_that_runs_up_and_down_is_refused_by_name(which: str) -> None:
    zigzag = table(0, 10, 5, 20, 15)
    mapping = Mapping(zigzag, Window(10, 20)) if which == "modality" else Mapping(Rescale(), zigzag)
    with pytest.raises(ImageError, match="non-monotone-lut"):
        interval_table(StoredWindow(StoredRange(0, 4), (mapping,)), 8)


@pytest.mark.parametrize("width", [0.0, 0.5, -3.0, float("nan"), float("inf")])
def test_a_window_without_a_valid_width_is_refused_by_name(width: float) -> None:
    with pytest.raises(ImageError, match="bad-window"):
        Window(40, width)


def test_padding_never_moves_and_nothing_lands_on_it() -> None:
    window = StoredWindow(
        StoredRange.of_bits(12, signed=True), (Mapping(Rescale(), Window(0, 400)),), ((-5, -3), (7, 7))
    )
    low, high = interval_table(window, 8)
    values = window.stored.values()
    padding = np.isin(values, [-5, -4, -3, 7])
    assert (low[padding] == values[padding]).all()
    assert (high[padding] == values[padding]).all()
    for value in values[~padding]:
        interval = range(low[value + 2048], high[value + 2048] + 1)
        assert not set(interval) & {-5, -4, -3, 7}
        assert value in interval


def test_monochrome1_moves_the_other_way_by_the_same_amount() -> None:
    mapping = Mapping(Rescale(), Window(2048, 4096), inverted=True)
    window = StoredWindow(TWELVE_BITS, (mapping,))
    before = np.array([2000], np.uint16)
    after = window.shifted(before, np.array([8 / 255], np.float32))
    assert int(after[0]) - 2000 == -128
    shown = window.display(after) - window.display(before)
    assert shown[0] * 255 == pytest.approx(7.98, abs=0.02)


def test_a_change_of_nothing_changes_nothing() -> None:
    curve = table(*(np.sqrt(np.arange(4096)) * 100).astype(int))
    for mapping in (Mapping(Rescale(3.7, 1.0), Window(500, 900)), Mapping(Rescale(), curve)):
        window = StoredWindow(TWELVE_BITS, (mapping,))
        values = np.arange(4096, dtype=np.uint16)
        assert np.array_equal(window.shifted(values, np.zeros(4096, np.float32)), values)


def test_behind_a_table_the_nearest_display_value_is_taken() -> None:
    curve = table(*(np.sqrt(np.arange(4096)) * 100).astype(int))
    for inverted in (False, True):
        window = StoredWindow(TWELVE_BITS, (Mapping(Rescale(), curve, inverted),))
        values = np.arange(500, 3500, 50, dtype=np.uint16)
        moved = window.shifted(values, np.full(values.shape, 0.02, np.float32))
        shown = window.display(moved) - window.display(values)
        assert np.abs(shown - 0.02).max() < 0.001


def test_signed_values_are_looked_up_in_any_shape() -> None:
    window = StoredWindow(
        StoredRange.of_bits(16, signed=True), (Mapping(Rescale(1, -1024), Window(40, 400)),)
    )
    values = np.array([[-32768, -1], [0, 32767]], np.int16)
    low, high = window.bounds(values, 8)
    assert low.dtype == high.dtype == np.int16
    assert low.tolist() == [[-32768, -13], [-12, 32755]]
    assert high.tolist() == [[-32756, 11], [12, 32767]]


def test_padding_that_nobody_declared_is_found_by_its_distance() -> None:
    stored = StoredRange.of_bits(16, signed=True)
    pixels = np.concatenate([np.full(500, -2000), np.arange(-1024, 1000)]).astype(np.int16)
    assert undeclared_padding(histogram(pixels, stored), stored) == ((-2000, -2000),)


def test_declaring_a_value_that_is_not_used_does_not_hide_the_one_that_is() -> None:
    stored = StoredRange.of_bits(16, signed=True)
    pixels = np.concatenate([np.full(500, -2000), np.full(500, -32768), np.arange(-1024, 1000)]).astype(
        np.int16
    )
    declared = ((-32768, -32768),)
    assert undeclared_padding(histogram(pixels, stored), stored, declared) == ((-2000, -2000),)


@pytest.mark.parametrize(
    "pixels",
    [
        np.arange(-1024, 1000),  # a full range without a gap
        np.concatenate([[-2000], np.arange(-1024, 1000)]),  # one dead pixel
        np.repeat([0, 255], 100),  # a mask
        np.zeros(100),  # a constant
    ],
)
def test_an_images_own_extreme_value_is_not_taken_for_padding(pixels: np.ndarray) -> None:
    stored = StoredRange.of_bits(16, signed=True)
    assert undeclared_padding(histogram(pixels.astype(np.int16), stored), stored) == ()


def test_the_guessed_window_spans_the_percentiles_without_padding() -> None:
    stored = StoredRange.of_bits(16, signed=True)
    counts = histogram(np.concatenate([np.full(5000, -2000), np.arange(1000)]).astype(np.int16), stored)
    window = percentile_window(counts, stored, Rescale(2.0, 10.0), (0.5, 99.5), ((-2000, -2000),))
    assert window is not None
    assert window.centre == pytest.approx(1010, abs=3)
    assert window.width == pytest.approx(1980, abs=3)


def test_a_constant_image_has_no_guessed_window() -> None:
    stored = StoredRange.of_bits(8, signed=False)
    counts = histogram(np.full(100, 7, np.uint8), stored)
    assert percentile_window(counts, stored, Rescale(), (0.5, 99.5), ()) is None
