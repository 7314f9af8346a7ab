"""DICOM structure sets (RTSTRUCT): contours in the patient, filled in on the image's own pixels.

A pixel belongs to a structure when its centre lies inside a contour. Contours of one structure on one plane are
combined by exclusive or, so an inner one cuts a hole; a keyhole (one contour that runs in and out along the same
line) comes out the same way, because the line is crossed twice. This is the even-odd rule that planning systems
follow; the standard asks for keyholes or CLOSEDPLANAR_XOR (PS3.3 C.8.8.6.3) and vendors write plain inner contours
as well. A centre exactly on a border belongs to the structure that begins there in rows and columns, so that
structures that share a border share no pixel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from medveil.agent.imageio.dicom_header import damage_named, read_dataset
from medveil.agent.segmentation.dicom_seg import Target
from medveil.agent.segmentation.geometry import Plane, Vector
from medveil.agent.segmentation.label_map import ClassArray, ClassMap
from medveil.models.errors import ImageError

__all__ = ["STRUCTURE_SET", "StructureSet", "filled", "read_structure_set"]

STRUCTURE_SET: Final = "1.2.840.10008.5.1.4.1.1.481.3"

_PLANAR: Final = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})
_SMALLEST_SLAB_MM: Final = 0.1
"""How far a contour may be from its plane where the image does not say how thick a slice is. Our choice."""

_TILT: Final = 0.1
"""How much of a slice's thickness the points of one contour may be apart along the normal. Our choice."""


@dataclass(frozen=True, slots=True)
class _Contour:
    """One closed contour: ``(n, 3)`` points in mm, and the images that it names."""

    points: Vector
    images: frozenset[str]


@dataclass(frozen=True, slots=True)
class StructureSet:
    """One structure set.

    Attributes:
        instances: images that it names anywhere.
        series: series that it names.
        frames_of_reference: coordinate systems that it speaks of.
        contours: of every structure, by its name.
    """

    instances: frozenset[str]
    series: frozenset[str]
    frames_of_reference: frozenset[str]
    contours: Mapping[str, tuple[_Contour, ...]]

    @property
    def marks_anything(self) -> bool:
        """Whether anything is drawn."""
        return bool(self.contours)

    def classes_of(self, target: Target, names: ClassMap) -> ClassArray | None:
        """Return the class of every pixel of an image; None where the set does not speak of it.

        Raises:
            ImageError: ``unknown-class``; ``mask-grid``: the contours do not lie in image planes, or the image does
                not say where it lies.
        """
        if not self._speaks_of(target):
            return None
        if target.plane is None:
            raise ImageError(
                "mask-grid", "This image does not say where it lies, so its contours cannot be placed."
            )
        classes = np.zeros(target.shape, np.uint8)
        for name, contours in self.contours.items():
            inside = np.zeros(target.shape, np.bool_)
            for contour in contours:
                polygon = _on_plane(contour, target.plane, target.instance)
                if polygon is not None:
                    inside ^= filled(polygon, target.shape)
            classes = np.maximum(classes, np.where(inside, names.of_name(name), 0).astype(np.uint8))
        return classes

    def _speaks_of(self, target: Target) -> bool:
        if self.instances or self.series:
            return target.instance in self.instances or target.series in self.series
        return target.frame_of_reference in self.frames_of_reference


def read_structure_set(path: Path) -> StructureSet:
    """Read a structure set.

    Raises:
        ImageError: ``mask-damaged``; ``contour-type``: a structure is drawn as points or open lines.
    """
    dataset = read_dataset(path)
    with damage_named("mask-damaged", "This image's structure set cannot be read; export it again."):
        names = {int(roi.ROINumber): str(roi.get("ROIName") or "") for roi in dataset.StructureSetROISequence}
        frames = {
            str(roi.get("ReferencedFrameOfReferenceUID") or "") for roi in dataset.StructureSetROISequence
        }
        contours: dict[str, list[_Contour]] = defaultdict(list)
        for roi in dataset.get("ROIContourSequence") or ():
            for item in roi.get("ContourSequence") or ():
                if str(item.ContourGeometricType) not in _PLANAR:
                    raise ImageError(
                        "contour-type",
                        "A structure of this image is drawn as points or open lines; close it.",
                    )
                points = np.array(item.ContourData, np.float64).reshape(-1, 3)
                contours[names[int(roi.ReferencedROINumber)]].append(_Contour(points, _named_images(item)))
        series = _named_series(dataset)
    finite = all(np.isfinite(c.points).all() for group in contours.values() for c in group)
    if not finite:
        raise ImageError("mask-damaged", "This image's structure set cannot be read; export it again.")
    drawn_on = {uid for group in contours.values() for contour in group for uid in contour.images}
    return StructureSet(
        instances=frozenset(drawn_on.union(*(_named_images(item) for item in series))),
        series=frozenset(str(item.SeriesInstanceUID) for item in series),
        frames_of_reference=frozenset(frames - {""}),
        contours={name: tuple(group) for name, group in contours.items()},
    )


def _named_images(item: Dataset) -> frozenset[str]:
    images = item.get("ContourImageSequence") or ()
    return frozenset(str(image.ReferencedSOPInstanceUID) for image in images)


def _named_series(dataset: Dataset) -> list[Dataset]:
    return [
        series
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
        for study in frame.get("RTReferencedStudySequence") or ()
        for series in study.get("RTReferencedSeriesSequence") or ()
    ]


def _on_plane(contour: _Contour, plane: Plane, instance: str) -> Vector | None:
    """Return a contour's ``(n, 2)`` rows and columns on an image; None where it lies on another one.

    Raises:
        ImageError: ``mask-grid``: it names this image and lies outside its slice, or crosses slices.
    """
    pixels, distance = plane.pixels_of(contour.points)
    slab = max(plane.thickness / 2, _SMALLEST_SLAB_MM)
    if contour.images and instance not in contour.images:
        return None
    if not contour.images and float(np.abs(distance.mean())) >= slab:
        return None
    if float(np.ptp(distance)) > max(_TILT * plane.thickness, _SMALLEST_SLAB_MM) or (
        float(np.abs(distance).max()) > slab * (1 + _TILT)
    ):
        raise ImageError(
            "mask-grid", "This image's contours do not lie in its plane; draw or export them on this series."
        )
    return pixels


def filled(polygon: Vector, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return which pixel centres lie inside a polygon, by the even-odd rule.

    Args:
        polygon: ``(n, 2)`` corners as row and column; the last is joined to the first.
        shape: rows and columns of the image.
    """
    rows, columns = shape
    inside = np.zeros((rows, columns + 1), np.bool_)
    for (row_a, column_a), (row_b, column_b) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        first, last = sorted((row_a, row_b))
        # Rows whose centre line the edge crosses; half open, so that a corner counts for one of its two edges.
        crossed = np.arange(max(0, int(np.ceil(first))), min(rows, int(np.ceil(last))))
        if crossed.size:
            share = (crossed - row_a) / (row_b - row_a)
            where = np.ceil(column_a + share * (column_b - column_a))
            start = np.clip(where, 0, columns).astype(np.intp)
            inside[crossed, start] ^= True  # turns over all pixels to its right: the running parity below
    return np.asarray(np.logical_xor.accumulate(inside, axis=1)[:, :columns], np.bool_)
