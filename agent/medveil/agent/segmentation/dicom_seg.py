"""DICOM segmentations (SEG): which of their frames belong to an image, and what those say about its pixels.

A segmentation frame belongs to an image frame that its Derivation Image Sequence names. Where the same frame also
says where it lies in the patient, that has to be the place of the image, pixel by pixel: a segmentation on a finer or
shifted grid is refused, not resampled. A segmentation without derivations is placed by position alone.

DICOM PS3.3 C.8.20: BINARY holds one bit per pixel and segment; FRACTIONAL a share of Maximum Fractional Value, of
which we take half and more (the standard sets no threshold; a pixel that is half a structure counts as it); LABELMAP
the segment's number in every pixel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.utils import pixel_array

from medveil.agent.imageio.dicom_header import damage_named, quiet, read_dataset
from medveil.agent.segmentation.geometry import Plane, plane_of, same_grid
from medveil.agent.segmentation.label_map import BACKGROUND, ClassArray, ClassMap
from medveil.models.errors import ImageError

__all__ = ["SEGMENTATIONS", "Segmentation", "Target", "read_segmentation"]

SEGMENTATIONS: Final = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
"""Segmentation Storage and Label Map Segmentation Storage (PS3.4 B.5)."""

_FRACTION: Final = 0.5
_TILED_FULL: Final = "TILED_FULL"


@dataclass(frozen=True, slots=True)
class Target:
    """The image frame that a mask is wanted for.

    Attributes:
        instance: SOP Instance UID.
        series: Series Instance UID.
        frame: index from 0.
        frames: frames of the object.
        shape: rows and columns.
        plane: where it lies; None where the object doesn't say.
        frame_of_reference: coordinate system; empty where there is none.
    """

    instance: str
    series: str
    frame: int
    frames: int
    shape: tuple[int, int]
    plane: Plane | None
    frame_of_reference: str


@dataclass(frozen=True)
class Segmentation:
    """One segmentation object, with its frames sorted by the images that they belong to.

    Attributes:
        dataset: the object, pixels not decoded.
        by_image: (SOP Instance UID, frame from 0) -> segmentation frames. Frame -1: the whole of a one-frame image.
        unplaced: frames that name no image.
        instances: images that it names anywhere.
        series: series that it names.
        frames_of_reference: coordinate systems that it speaks of.
    """

    dataset: FileDataset
    by_image: Mapping[tuple[str, int], tuple[int, ...]]
    unplaced: tuple[int, ...]
    instances: frozenset[str]
    series: frozenset[str]
    frames_of_reference: frozenset[str]

    @cached_property
    def marks_anything(self) -> bool:
        """Whether any pixel of any frame is marked."""
        return any(
            self._decoded(frame).any() for frame in range(len(self.dataset.PerFrameFunctionalGroupsSequence))
        )

    def classes_of(self, target: Target, names: ClassMap) -> ClassArray | None:
        """Return the class of every pixel of an image frame; None where the segmentation does not speak of it.

        It speaks of every image and series that it names: writers leave out frames in which nothing is marked.

        Raises:
            ImageError: ``mask-size``, ``mask-grid``, ``unknown-class``, ``mask-damaged``.
        """
        frames = self._frames_of(target)
        if not frames and target.instance not in self.instances and target.series not in self.series:
            return None
        segments = self._classes_of_segments(names)
        classes = np.zeros(target.shape, np.uint8)
        for frame in frames:
            self._check_place(frame, target)
            stored = self._decoded(frame)
            if str(self.dataset.SegmentationType) == "LABELMAP":
                found = _labelled(stored, segments)
            else:
                found = np.where(self._is_inside(stored), segments[self._segment_of(frame)], BACKGROUND)
            classes = np.maximum(classes, found.astype(np.uint8))
        return classes

    def _frames_of(self, target: Target) -> tuple[int, ...]:
        named = self.by_image.get((target.instance, target.frame), ())
        if target.frames == 1:
            named = (*named, *self.by_image.get((target.instance, -1), ()))
        if named or target.plane is None:
            return named
        if str(self.dataset.get("FrameOfReferenceUID") or "") != target.frame_of_reference:
            return ()
        planes = ((frame, plane_of(self.dataset, frame)) for frame in self.unplaced)
        return tuple(f for f, plane in planes if plane is not None and same_grid(plane, target.plane))

    def _check_place(self, frame: int, target: Target) -> None:
        if (int(self.dataset.Rows), int(self.dataset.Columns)) != target.shape:
            raise ImageError(
                "mask-size",
                "This image's segmentation has another size than the image; export it on its grid.",
            )
        plane = plane_of(self.dataset, frame)
        if plane is not None and target.plane is not None and not same_grid(plane, target.plane):
            raise ImageError(
                "mask-grid", "This image's segmentation lies elsewhere than the image; export it on its grid."
            )

    def _decoded(self, frame: int) -> npt.NDArray[Any]:
        with (
            damage_named("mask-damaged", "This image's segmentation cannot be decoded; export it again."),
            quiet(),
        ):
            stored = pixel_array(self.dataset, index=frame, raw=True)
        return np.asarray(stored)

    def _is_inside(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        if str(self.dataset.SegmentationType) == "FRACTIONAL":
            return np.asarray(stored >= _FRACTION * int(self.dataset.MaximumFractionalValue), np.bool_)
        return stored > 0

    def _segment_of(self, frame: int) -> int:
        groups = (
            self.dataset.PerFrameFunctionalGroupsSequence[frame],
            *self.dataset.get("SharedFunctionalGroupsSequence", ()),
        )
        found = next(
            group.SegmentIdentificationSequence
            for group in groups
            if "SegmentIdentificationSequence" in group
        )
        return int(found[0].ReferencedSegmentNumber)

    def _classes_of_segments(self, names: ClassMap) -> dict[int, int]:
        """Return the class of every segment by its number: by its label, else by the code of what it is."""
        with damage_named("mask-damaged", "This image's segmentation cannot be read; export it again."):
            return {
                int(segment.SegmentNumber): BACKGROUND
                if int(segment.SegmentNumber) == 0  # a label map's background, which may be named
                else names.of_name(str(segment.get("SegmentLabel") or ""), *_meanings(segment))
                for segment in self.dataset.SegmentSequence
            }


def read_segmentation(path: Path) -> Segmentation:
    """Read a segmentation and sort its frames by image.

    Raises:
        ImageError: ``mask-damaged``; ``mask-tiled``: its frames are placed by their order in a tiled slide alone.
    """
    dataset = read_dataset(path)
    if str(dataset.get("DimensionOrganizationType") or "") == _TILED_FULL:
        raise ImageError(
            "mask-tiled", "A segmentation whose tiles have no references is not handled; export it sparse."
        )
    by_image: dict[tuple[str, int], list[int]] = defaultdict(list)
    unplaced = []
    with damage_named("mask-damaged", "This image's segmentation cannot be read; export it again."):
        for number, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            places = _derived_from(group)
            for place in places:
                by_image[place].append(number)
            if not places:
                unplaced.append(number)
        named = dataset.get("ReferencedSeriesSequence") or ()
        listed = {
            str(i.ReferencedSOPInstanceUID) for s in named for i in s.get("ReferencedInstanceSequence") or ()
        }
        series = frozenset(str(item.SeriesInstanceUID) for item in named)
    return Segmentation(
        dataset=dataset,
        by_image={place: tuple(frames) for place, frames in by_image.items()},
        unplaced=tuple(unplaced),
        instances=frozenset(listed | {instance for instance, _ in by_image}),
        series=series,
        frames_of_reference=frozenset({str(dataset.get("FrameOfReferenceUID") or "")} - {""}),
    )


def _derived_from(group: Dataset) -> list[tuple[str, int]]:
    places = []
    for derivation in group.get("DerivationImageSequence") or ():
        for source in derivation.get("SourceImageSequence") or ():
            numbers = source.get("ReferencedFrameNumber")
            frames = [-1] if numbers is None else [int(n) - 1 for n in np.atleast_1d(numbers)]
            places += [(str(source.ReferencedSOPInstanceUID), frame) for frame in frames]
    return places


def _meanings(segment: Dataset) -> list[str]:
    """Return what a segment is, in the words of its code."""
    codes = segment.get("SegmentedPropertyTypeCodeSequence") or ()
    return [str(code.get("CodeMeaning") or "") for code in codes]


def _labelled(stored: npt.NDArray[Any], segments: Mapping[int, int]) -> ClassArray:
    known, place = np.unique(stored.astype(np.int64), return_inverse=True)
    table = [segments.get(int(number), BACKGROUND if number == 0 else -1) for number in known]
    if min(table) < 0:
        raise ImageError(
            "mask-damaged", "This image's segmentation names a segment that it does not describe."
        )
    return np.array(table, np.uint8)[place.reshape(stored.shape)]
