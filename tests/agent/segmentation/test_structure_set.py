"""Contours in millimetres become the pixels whose centres they hold; holes stay holes; other slices stay empty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items

from medveil.agent.imageio import Taxonomy
from medveil.agent.segmentation.dicom_seg import Target
from medveil.agent.segmentation.geometry import Plane
from medveil.agent.segmentation.label_map import ClassMap
from medveil.agent.segmentation.structure_set import filled, read_structure_set
from medveil.models.errors import ImageError

NAMES = ClassMap(Taxonomy(("background", "liver", "tumour"), (0, 1, 2)), {"BODY": "background"})


def target(instance: str = "1.2.3.1", z: float = 0.0, **changes: object) -> Target:
    plane = Plane(
        position=np.array([10.0, 20.0, z]),
        rows_step=np.array([0.0, 2.0, 0.0]),
        columns_step=np.array([0.5, 0.0, 0.0]),
        shape=(8, 8),
        thickness=3.0,
    )
    values = {
        "instance": instance,
        "series": "1.2.3",
        "frame": 0,
        "frames": 1,
        "shape": (8, 8),
        "plane": plane,
    }
    return Target(**{**values, "frame_of_reference": "1.9", **changes})


def box(top: float, left: float, bottom: float, right: float, z: float = 0.0) -> np.ndarray:
    """Return the corners of a box given in pixels of `target`, as points in mm."""
    corners = np.array([[top, left], [top, right], [bottom, right], [bottom, left]])
    return np.column_stack([10 + 0.5 * corners[:, 1], 20 + 2 * corners[:, 0], np.full(4, z)])


def structure_set(
    path: Path,
    contours: dict[str, Sequence[np.ndarray]],
    *,
    kind: str = "CLOSED_PLANAR",
    on: Sequence[str] = ("1.2.3.1",),
    series: str = "1.2.3",
) -> Path:
    """Write a structure set; contours name no image of their own when ``on`` is empty."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = uids.RTStructureSetStorage, "1.2.3.99"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = Items(), Items()
    for number, (name, polygons) in enumerate(contours.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, "1.9"
        drawn.ReferencedROINumber, drawn.ContourSequence = number, Items()
        for points in polygons:
            contour = Dataset()
            contour.ContourGeometricType = kind
            contour.NumberOfContourPoints = len(points)
            contour.ContourData = [f"{value:.6g}" for value in points.ravel()]
            if on:
                contour.ContourImageSequence = Items([_reference(uid) for uid in on])
            drawn.ContourSequence.append(contour)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(drawn)
    if series:
        study, group, listed = Dataset(), Dataset(), Dataset()
        listed.SeriesInstanceUID, listed.ContourImageSequence = series, Items([_reference(uid) for uid in on])
        study.RTReferencedSeriesSequence = Items([listed])
        group.FrameOfReferenceUID, group.RTReferencedStudySequence = "1.9", Items([study])
        dataset.ReferencedFrameOfReferenceSequence = Items([group])
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def _reference(instance: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = uids.CTImageStorage, instance
    return item


def marked(classes: np.ndarray, value: int = 1) -> set[tuple[int, int]]:
    return {(int(row), int(column)) for row, column in np.argwhere(classes == value)}


def test_pixels_whose_centres_lie_inside_are_marked(tmp_path):
    path = structure_set(tmp_path / "rs.dcm", {"liver": [box(1.5, 2.5, 4.5, 5.5)]})
    found = read_structure_set(path).classes_of(target(), NAMES)
    assert marked(found) == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_an_inner_contour_cuts_a_hole(kind, tmp_path):
    rings = [box(0.5, 0.5, 6.5, 6.5), box(2.5, 2.5, 4.5, 4.5)]
    found = read_structure_set(structure_set(tmp_path / "rs.dcm", {"liver": rings}, kind=kind)).classes_of(
        target(), NAMES
    )
    assert marked(found, 0) >= {(3, 3), (3, 4), (4, 3), (4, 4)}
    assert len(marked(found)) == 36 - 4


def test_a_keyhole_cuts_the_same_hole():
    outer = [[0.5, 0.5], [0.5, 6.5], [6.5, 6.5], [6.5, 0.5], [2.5, 0.5]]
    inner = [[2.5, 2.5], [4.5, 2.5], [4.5, 4.5], [2.5, 4.5], [2.5, 2.5], [2.5, 0.5]]
    keyhole = filled(np.array(outer + inner), (8, 8))
    rings = [np.array([[a, a], [a, b], [b, b], [b, a]]) for a, b in ((0.5, 6.5), (2.5, 4.5))]
    np.testing.assert_array_equal(keyhole, filled(rings[0], (8, 8)) ^ filled(rings[1], (8, 8)))


def test_structures_that_share_a_border_share_no_pixel():
    left, right = (
        filled(np.array([[0, a], [0, b], [8, b], [8, a]], float), (8, 8)) for a, b in ((0, 4), (4, 8))
    )
    assert not (left & right).any()
    assert (left | right).all()


def test_a_contour_that_leaves_the_image_is_cut_at_its_edge():
    assert filled(np.array([[-9.0, -9], [-9, 99], [99, 99], [99, -9]]), (3, 5)).all()


def test_the_direction_and_the_first_point_of_a_contour_do_not_matter(rng):
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    polygon = 4 + np.column_stack([np.sin(angles), np.cos(angles)]) * rng.uniform(1, 3.5, (9, 1))
    expected = filled(polygon, (8, 8))
    np.testing.assert_array_equal(filled(polygon[::-1], (8, 8)), expected)
    np.testing.assert_array_equal(filled(np.roll(polygon, 3, axis=0), (8, 8)), expected)


def test_a_contour_of_another_slice_marks_nothing_here(tmp_path):
    liver = {"liver": [box(1, 1, 5, 5, z=3.0)]}
    drawn = read_structure_set(structure_set(tmp_path / "a.dcm", liver, on=["1.2.3.2"]))
    assert not drawn.classes_of(target(), NAMES).any()
    unnamed = read_structure_set(structure_set(tmp_path / "b.dcm", liver, on=[]))
    assert not unnamed.classes_of(target(), NAMES).any()
    assert unnamed.classes_of(target("1.2.3.2", z=3.0), NAMES).any()


def test_images_of_another_series_are_not_spoken_of(tmp_path):
    drawn = read_structure_set(structure_set(tmp_path / "rs.dcm", {"liver": [box(1, 1, 5, 5)]}))
    assert drawn.classes_of(target("5.5.5.1", series="5.5.5"), NAMES) is None


def test_structures_overlap_and_the_inner_class_wins(tmp_path):
    path = structure_set(
        tmp_path / "rs.dcm", {"tumour": [box(2.5, 2.5, 4.5, 4.5)], "liver": [box(0.5, 0.5, 6.5, 6.5)]}
    )
    found = read_structure_set(path).classes_of(target(), NAMES)
    assert len(marked(found, 2)) == 4
    assert len(marked(found, 1)) == 32


def test_a_structure_that_the_site_calls_background_is_not_marked(tmp_path):
    path = structure_set(
        tmp_path / "rs.dcm", {"Body": [box(-1, -1, 9, 9)], "liver": [box(1.5, 1.5, 4.5, 4.5)]}
    )
    assert len(marked(read_structure_set(path).classes_of(target(), NAMES))) == 9


@pytest.mark.parametrize(
    ("contours", "options", "changes", "code"),
    [
        ({"spleen": [box(1, 1, 5, 5)]}, {}, {}, "unknown-class"),
        ({"liver": [box(1, 1, 5, 5, z=9)]}, {}, {}, "mask-grid"),
        ({"liver": [box(1, 1, 5, 5)]}, {}, {"plane": None}, "mask-grid"),
        ({"liver": [box(1, 1, 5, 5)]}, {"kind": "OPEN_PLANAR"}, {}, "contour-type"),
        ({"liver": [box(1, 1, 5, 5)[:, :2]]}, {}, {}, "mask-damaged"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(contours, options, changes, code, tmp_path):
    path = structure_set(tmp_path / "rs.dcm", contours, **options)
    with pytest.raises(ImageError) as refused:
        read_structure_set(path).classes_of(target(**changes), NAMES)
    assert refused.value.code == code
