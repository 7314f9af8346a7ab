"""DICOM segmentations are placed pixel by pixel by what they reference and where they lie, or refused by name."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from medveil.agent.imageio import FullRange, Image, Item, Taxonomy
from medveil.agent.segmentation.dicom_masks import DicomMasks
from medveil.agent.segmentation.dicom_seg import read_segmentation
from medveil.agent.segmentation.label_map import ClassMap
from medveil.models.errors import ImageError

NAMES = ClassMap(Taxonomy(("background", "liver", "tumour"), (0, 1, 2)))
SHAPE = (6, 7)
SLICES = 3


def image_of(item: Item, shape: tuple[int, int] = SHAPE) -> Image:
    return Image(np.zeros(shape, np.uint16), FullRange(4095), item.relative)


def found_in(items: list[Item], slices: list[Item]) -> list[list[list[int]] | None]:
    masks = DicomMasks(items, NAMES)
    maps = [masks.label_map(item, image_of(item)) for item in slices]
    return [None if found is None else found.classes.tolist() for found in maps]


@pytest.fixture
def drawn(rng) -> list[np.ndarray]:
    return [rng.integers(0, 2, SHAPE).astype(np.uint8) for _ in range(4)]


@pytest.mark.parametrize("derived", [True, False])
def test_every_bit_lands_on_its_pixel_of_its_slice(derived, segmentation, slices, drawn):
    """Frames in any order, one bit per pixel, by reference and by position."""
    seg = segmentation([(1, 2, drawn[0]), (1, 0, drawn[1])], derived=derived)
    assert found_in([seg], slices) == [drawn[1].tolist(), np.zeros(SHAPE, int).tolist(), drawn[0].tolist()]


def test_segments_overlap_and_the_inner_class_wins(segmentation, slices, drawn):
    seg = segmentation([(2, 1, drawn[0]), (1, 1, drawn[1])])
    expected = np.where(drawn[0], 2, drawn[1])
    assert found_in([seg], slices)[1] == expected.tolist()


def test_half_a_structure_and_more_counts_as_it(segmentation, slices):
    shares = np.zeros(SHAPE, np.uint8)
    shares[0, :4] = [0, 99, 100, 200]
    found = found_in([segmentation([(1, 0, shares)], kind="FRACTIONAL")], slices)[0]
    assert found[0][:4] == [0, 0, 1, 1]


def test_a_label_map_holds_the_number_of_the_segment_in_every_pixel(segmentation, slices, rng):
    numbers = rng.integers(0, 3, SHAPE).astype(np.uint8)
    seg = segmentation([(0, 1, numbers)], kind="LABELMAP", labels=("Tumour", "Liver"))
    assert found_in([seg], slices)[1] == np.array([0, 2, 1])[numbers].tolist()


def test_the_code_names_a_segment_whose_label_does_not(segmentation, slices, drawn):
    segment, code = Dataset(), Dataset()
    segment.SegmentNumber, segment.SegmentLabel, code.CodeMeaning = 1, "Segment_1", "Liver"
    segment.SegmentedPropertyTypeCodeSequence = Items([code])
    seg = segmentation([(1, 0, drawn[0])], SegmentSequence=Items([segment]))
    assert found_in([seg], slices)[0] == drawn[0].tolist()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"shift": (0.3, 0, 0)}, "mask-grid"),
        ({"shift": (0, 0, 3)}, "mask-grid"),
        ({"labels": ("Spleen", "Tumour")}, "unknown-class"),
        ({"PixelData": b"\0\0"}, "mask-damaged"),
    ],
)
def test_a_segmentation_that_does_not_fit_is_refused_by_name(options, code, segmentation, slices, drawn):
    seg = segmentation([(1, 0, drawn[0])], **options)
    with pytest.raises(ImageError) as refused:
        found_in([seg], slices)
    assert refused.value.code == code


def test_a_segmentation_of_another_size_is_refused_by_name(segmentation, slices):
    seg = segmentation([(1, 0, np.ones((12, 14), np.uint8))])
    with pytest.raises(ImageError) as refused:
        found_in([seg], slices)
    assert refused.value.code == "mask-size"


def test_a_tenth_of_a_pixel_is_rounding_and_no_shift(segmentation, slices, drawn):
    assert found_in([segmentation([(1, 0, drawn[0])], shift=(0.05, 0, 0))], slices)[0] == drawn[0].tolist()


def test_an_empty_segmentation_is_refused_and_an_unmarked_slice_is_not(segmentation, slices, drawn):
    nothing = segmentation([(1, number, np.zeros(SHAPE, np.uint8)) for number in range(SLICES)])
    with pytest.raises(ImageError) as refused:
        found_in([nothing], slices)
    assert refused.value.code == "empty-mask"


def test_tiles_that_name_nothing_are_refused_by_name(segmentation, drawn):
    seg = segmentation([(1, 0, drawn[0])], DimensionOrganizationType="TILED_FULL")
    with pytest.raises(ImageError) as refused:
        read_segmentation(seg.path)
    assert refused.value.code == "mask-tiled"


def test_an_image_of_another_series_has_no_mask(
    segmentation, slices, drawn, tmp_path, save_dataset, dicom_item
):
    seg = segmentation([(1, 0, drawn[0])], named=range(1))
    header = pydicom.dcmread(slices[2].path)
    header.SOPInstanceUID, header.SeriesInstanceUID = "5.5.1", "5.5"
    other = dicom_item(save_dataset(tmp_path / "other.dcm", header), 1, "5.5.1")
    assert found_in([seg], [other]) == [None]


@pytest.mark.parametrize(
    ("name", "image", "kind"),
    [("seg_image_ct_binary_single_frame.dcm", "ct_image.dcm", "BINARY")],
)
def test_a_segmentation_written_by_highdicom_is_placed_on_its_image(
    name, image, kind, shared_data, dicom_item
):
    folder = shared_data / "dicom_highdicom"
    header = pydicom.dcmread(folder / image)
    source = dicom_item(folder / image, 1, str(header.SOPInstanceUID))
    names = ClassMap(Taxonomy(("background", "first segment"), (0, 1)))
    masks = DicomMasks([dicom_item(folder / name, 0, "")], names)
    found = masks.label_map(source, image_of(source, (header.Rows, header.Columns)))
    assert found is not None
    stored = pydicom.dcmread(folder / name)
    assert stored.SegmentationType == kind
    np.testing.assert_array_equal(found.classes, stored.pixel_array)
    assert found.classes.any()


@pytest.mark.parametrize("name", ["seg_image_sm_control.dcm", "seg_image_sm_control_labelmap.dcm"])
def test_every_tile_of_a_slide_gets_the_segments_that_name_it(name, shared_data, dicom_item):
    folder = shared_data / "dicom_highdicom"
    slide = pydicom.dcmread(folder / "sm_image_control.dcm")
    seg = pydicom.dcmread(folder / name)
    labels = [s.SegmentLabel for s in seg.SegmentSequence if s.SegmentNumber]
    names = ClassMap(Taxonomy(("background", *labels), tuple(range(len(labels) + 1))))
    expected = np.zeros((int(slide.NumberOfFrames), slide.Rows, slide.Columns), np.uint8)
    for group, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        named = int(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber)
        if seg.SegmentationType == "BINARY":
            pixels = pixels * group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        expected[named - 1] = np.maximum(expected[named - 1], pixels)
    assert expected.any()
    source = dicom_item(folder / "sm_image_control.dcm", len(expected), str(slide.SOPInstanceUID))
    masks = DicomMasks([dicom_item(folder / name, 0, "")], names)
    for frame, wanted in enumerate(expected):
        image = Image(np.zeros((*wanted.shape, 3), np.uint8), FullRange(255), source.relative, frame)
        found = masks.label_map(source, image)
        assert found is not None
        np.testing.assert_array_equal(found.classes, wanted)
