"""Pointing at the new instances: references inside DICOM objects follow the images into the release.

A segmentation, an RT structure set, a report, a presentation state or a key object names images by UID. In a
release those images have new UIDs, so the names change with them, wherever they are nested, and nothing else
does. Only instances of classes that medveil gives new UIDs are renamed; a reference to a dose grid, a plan, a
study or a procedure step stays as it is, and so do frames of reference and device identifiers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pydicom import uid as uidlib
from pydicom.dataset import Dataset

from medveil.agent.imageio.dicom_header import REFUSED_CLASSES
from medveil.agent.imageio.uid import DerivedUids

__all__ = ["remap_references"]

STORAGE_ROOT: Final = "1.2.840.10008.5.1.4.1.1."
"""Storage SOP classes (PS3.4 B.5); studies, patients and procedure steps have others."""

NOT_RENAMED: Final = frozenset(
    {*REFUSED_CLASSES, uidlib.RTPlanStorage, uidlib.RTIonPlanStorage, uidlib.RawDataStorage}
)
"""Storage classes that medveil never writes: a reference to one of them keeps pointing at the source."""


def remap_references(dataset: Dataset, uids: DerivedUids) -> int:
    """Rename, in place, every nested UID that names a renamed instance or series; return how many were.

    Args:
        dataset: any DICOM object; its own identifiers at the top level are not touched.
        uids: gives the new UID of each source UID.
    """
    renamed = _renamed(dataset, uids)
    count = 0
    for item in _items(dataset):
        for element in item:
            if element.VR != "UI" or not element.value:
                continue
            values = [element.value] if isinstance(element.value, str) else list(element.value)
            hits = sum(str(value) in renamed for value in values)
            if hits:
                new = [renamed.get(str(value), str(value)) for value in values]
                element.value = new if len(new) > 1 else new[0]
                count += hits
    return count


def _renamed(dataset: Dataset, uids: DerivedUids) -> dict[str, str]:
    """Return the new UID of every instance that the object refers to, and of the series named with it."""
    renamed: dict[str, str] = {}
    for item in _items(dataset):
        if instance := _renamed_instance(item):
            renamed[instance] = uids.instance(instance)
        series = str(item.get("SeriesInstanceUID") or "")
        if series and any(_renamed_instance(inner) for inner in (item, *_items(item))):
            renamed[series] = uids.series(series)
    return renamed


def _items(dataset: Dataset) -> Iterator[Dataset]:
    """Yield every item of every sequence at any depth, outer ones first."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value or ():
                yield item
                yield from _items(item)


def _renamed_instance(item: Dataset) -> str:
    """Return the UID of the instance that an item refers to, or nothing where medveil does not rename it."""
    sop_class = str(item.get("ReferencedSOPClassUID") or "")
    if not sop_class.startswith(STORAGE_ROOT) or sop_class in NOT_RENAMED:
        return ""
    return str(item.get("ReferencedSOPInstanceUID") or "")
