"""The segmentations and structure sets of a source, and what they say about an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import pydicom
from pydicom.dataset import Dataset

from medveil.agent.imageio import Image, Item
from medveil.agent.imageio.dicom_header import damage_named, quiet
from medveil.agent.segmentation.dicom_seg import SEGMENTATIONS, Segmentation, Target, read_segmentation
from medveil.agent.segmentation.geometry import plane_of
from medveil.agent.segmentation.label_map import ClassMap, LabelMap, merged
from medveil.agent.segmentation.structure_set import STRUCTURE_SET, StructureSet, read_structure_set
from medveil.models.errors import ImageError

__all__ = ["DicomMasks", "read_header"]

_KEPT_OPEN: Final = 4
"""Mask objects kept in memory. Files come in the order of their paths, so that those of one series follow each
other; our choice."""


@dataclass(frozen=True, slots=True)
class _Index:
    """What a mask object speaks of, kept for every object of the source."""

    item: Item
    sop_class: str
    instances: frozenset[str]
    series: frozenset[str]
    frames_of_reference: frozenset[str]

    def may_speak_of(self, target: Target) -> bool:
        return (
            target.instance in self.instances
            or target.series in self.series
            or target.frame_of_reference in self.frames_of_reference
        )


class DicomMasks:
    """Answers for every DICOM image of a source.

    Args:
        items: the source's files; those of DICOM that are segmentations or structure sets are read.
        names: what their segments and structures are called.
    """

    def __init__(self, items: Sequence[Item], names: ClassMap) -> None:
        self._names = names
        self._opened = lru_cache(maxsize=_KEPT_OPEN)(_read_mask)
        self._header = lru_cache(maxsize=1)(read_header)
        self._index = [index for item in items if (index := self._indexed(item)) is not None]

    def files_of(self, item: Item) -> tuple[Item, ...]:
        """Return the objects that name an image."""
        return tuple(index.item for index in self._index if item.identity in index.instances)

    def label_map(self, item: Item, image: Image) -> LabelMap | None:
        """Return the mask of one frame of a DICOM image; None where nothing speaks of it.

        Several objects may mark structures in one image (one per organ, one per lesion): what any of them marks is
        marked.

        Raises:
            ImageError: ``empty-mask``: there is no structure, in this image and in all that belongs to it;
                ``full-mask``; or as the objects' own readers.
        """
        target = _target(self._header(item.path), item, image)
        found, one_of_many = [], False
        for index in self._index:
            if index.may_speak_of(target):
                mask = self._opened(index.item.path, index.sop_class)
                classes = mask.classes_of(target, self._names)
                if classes is not None:
                    found.append(classes)
                    one_of_many |= mask.marks_anything and max(item.frames, len(index.instances)) > 1
        if not found:
            return None
        whole = merged(found)
        if not one_of_many:
            whole.check_alone()
        return whole

    def _indexed(self, item: Item) -> _Index | None:
        """Return what a mask object speaks of; None for other files, and for damaged ones, which speak of nothing."""
        if item.format != "dicom" or item.frames:
            return None
        sop_class = str(self._header(item.path).get("SOPClassUID") or "")
        if sop_class not in SEGMENTATIONS and sop_class != STRUCTURE_SET:
            return None
        try:
            mask = self._opened(item.path, sop_class)
        except ImageError:
            return None
        frames = mask.frames_of_reference if not mask.instances | mask.series else frozenset()
        return _Index(item, sop_class, mask.instances, mask.series, frames)


def _read_mask(path: Path, sop_class: str) -> Segmentation | StructureSet:
    return read_segmentation(path) if sop_class in SEGMENTATIONS else read_structure_set(path)


def read_header(path: Path) -> Dataset:
    """Read what a DICOM object says, without its pixels; the scan of the source has looked at it already."""
    with damage_named(), quiet():
        return pydicom.dcmread(path, stop_before_pixels=True, force=True)


def _target(dataset: Dataset, item: Item, image: Image) -> Target:
    return Target(
        instance=str(dataset.get("SOPInstanceUID") or ""),
        series=str(dataset.get("SeriesInstanceUID") or ""),
        frame=image.frame,
        frames=item.frames,
        shape=image.size,
        plane=plane_of(dataset, image.frame),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID") or ""),
    )
