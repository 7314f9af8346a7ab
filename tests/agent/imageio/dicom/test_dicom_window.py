from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medveil.agent.imageio.dicom_window import Choice, WindowPolicy, frame_window
from medveil.agent.imageio.window import StoredRange, StoredWindow
from medveil.models.errors import ImageError

STORED = StoredRange.of_bits(12, signed=False)
PIXELS = np.arange(64, dtype=np.uint16).reshape(8, 8)

MakeDataset = Callable[..., Dataset]


def window_of(dataset: Dataset, frame: int = 0, policy: WindowPolicy | None = None) -> StoredWindow:
    return frame_window(dataset, frame, PIXELS, STORED, policy or WindowPolicy())


def names(window: StoredWindow) -> list[str]:
    return [mapping.name for mapping in window.mappings]


def item(**attributes: object) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def test_every_declared_window_counts(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS, WindowCenter=[450, 200], WindowWidth=[790, 443])
    assert names(window_of(dataset)) == ["450/790", "200/443"]


def test_an_empty_window_is_none_and_the_preset_takes_its_place(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS, WindowCenter=0, WindowWidth=0)
    assert names(window_of(dataset)) == ["40/400"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice.DECLARED, ["50/100"]),
        (Choice.PRESETS, ["40/400", "600/1500"]),
        (Choice.BOTH, ["40/400", "600/1500", "50/100"]),
    ],
)
def test_the_policy_chooses_between_declared_and_preset_windows(
    make_dataset: MakeDataset, choice: Choice, expected: list[str]
) -> None:
    policy = WindowPolicy(choice, {"CT": ((40, 400), (600, 1500))})
    dataset = make_dataset(PIXELS, WindowCenter=50, WindowWidth=100)
    assert names(window_of(dataset, policy=policy)) == expected


def test_without_any_window_the_guess_is_marked_as_one(make_dataset: MakeDataset) -> None:
    window = window_of(make_dataset(PIXELS, Modality="MR"))
    assert window.guessed
    assert names(window) == ["percentile"]


def test_a_policy_may_forbid_the_guess(make_dataset: MakeDataset) -> None:
    with pytest.raises(ImageError, match="no-window"):
        window_of(make_dataset(PIXELS, Modality="MR"), policy=WindowPolicy(percentiles=None))


def test_a_constant_image_still_has_a_window(make_dataset: MakeDataset) -> None:
    flat = np.full((8, 8), 9, np.uint16)
    window = frame_window(make_dataset(flat, Modality="MR"), 0, flat, STORED, WindowPolicy())
    assert window.display(flat).shape == (8, 8)


def test_each_frame_of_an_enhanced_object_has_its_own_window_and_slope(make_dataset: MakeDataset) -> None:
    def group(width: float, slope: float) -> Dataset:
        return item(
            FrameVOILUTSequence=Sequence([item(WindowCenter=50, WindowWidth=width)]),
            PixelValueTransformationSequence=Sequence([item(RescaleSlope=slope, RescaleIntercept=0)]),
        )

    dataset = make_dataset(np.stack([PIXELS, PIXELS]))
    dataset.PerFrameFunctionalGroupsSequence = Sequence([group(100, 1), group(200, 0.5)])
    assert names(window_of(dataset, 0)) == ["50/100"]
    assert names(window_of(dataset, 1)) == ["50/200"]
    value = np.array([2000], np.uint16)
    reach = [int(window_of(dataset, frame).bounds(value, 8)[1][0]) - 2000 for frame in (0, 1)]
    assert reach == [3, 12]  # 8/255 of 99 and of 199, the latter at slope 0.5


def test_shared_groups_apply_where_a_frame_says_nothing(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS)
    dataset.SharedFunctionalGroupsSequence = Sequence(
        [item(FrameVOILUTSequence=Sequence([item(WindowCenter=49, WindowWidth=102)]))]
    )
    dataset.PerFrameFunctionalGroupsSequence = Sequence([item()])
    assert names(window_of(dataset)) == ["49/102"]


def lut(entries: list[int], first: int, bits: int = 16) -> Dataset:
    table = item(LUTDescriptor=[len(entries) & 0xFFFF, first, bits])
    table.add_new(0x00283006, "OW", np.array(entries, "<u2").tobytes())
    return table


def test_a_voi_table_is_a_window_of_its_own(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS)
    dataset.VOILUTSequence = Sequence([lut(list(range(0, 512, 2)), 0)])
    window = window_of(dataset)
    assert names(window) == ["VOI LUT 1"]
    assert window.display(np.array([0, 255], np.uint16)).tolist() == [0.0, 1.0]


def test_a_modality_table_replaces_slope_and_intercept(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS, WindowCenter=5000, WindowWidth=10001)
    dataset.ModalityLUTSequence = Sequence([lut([value * 10 for value in range(1001)], 0)])
    window = window_of(dataset)
    low, high = window.bounds(np.array([500], np.uint16), 8)
    assert (int(low[0]), int(high[0])) == (469, 531)  # 8/255 of 10,000 units at 10 units per stored value


def test_a_table_of_65536_entries_says_0_in_its_descriptor(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS)
    dataset.VOILUTSequence = Sequence([lut(list(range(65536)), 0)])
    assert window_of(dataset).display(np.array([4095], np.uint16))[0] == pytest.approx(4095 / 65535)


def test_a_table_cut_short_is_refused_by_name(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS)
    table = lut(list(range(16)), 0)
    table.LUTDescriptor = [256, 0, 16]
    dataset.VOILUTSequence = Sequence([table])
    with pytest.raises(ImageError, match="bad-lut"):
        window_of(dataset)


def test_an_unknown_window_function_is_refused_by_name(make_dataset: MakeDataset) -> None:
    with pytest.raises(ImageError, match="bad-window"):
        window_of(make_dataset(PIXELS, WindowCenter=40, WindowWidth=400, VOILUTFunction="CUBIC"))


def test_a_slope_of_zero_is_refused_by_name(make_dataset: MakeDataset) -> None:
    with pytest.raises(ImageError, match="bad-rescale"):
        window_of(make_dataset(PIXELS, RescaleSlope=0, RescaleIntercept=0))


def test_the_declared_padding_range_is_frozen(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS, PixelPaddingValue=5, PixelPaddingRangeLimit=2)
    assert window_of(dataset).frozen == ((2, 5),)


def test_negative_padding_written_as_an_unsigned_number_is_understood(make_dataset: MakeDataset) -> None:
    signed = StoredRange.of_bits(16, signed=True)
    pixels = PIXELS.astype(np.int16)
    dataset = make_dataset(pixels)
    dataset.add_new(0x00280120, "US", 63536)
    assert frame_window(dataset, 0, pixels, signed, WindowPolicy()).frozen == ((-2000, -2000),)


def test_colours_of_a_supplemental_palette_never_move(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(PIXELS, PixelPresentation="COLOR")
    dataset.RedPaletteColorLookupTableDescriptor = [100, 1024, 16]
    assert window_of(dataset).frozen == ((1024, 1123),)
