"""Which mask belongs to which image, by where the files lie and what they are called.

``images/a/7.png`` and ``masks/a/7.png`` belong together, as do ``7.png`` and ``7_mask.png``, ``imagesTr/7.nii.gz``
and ``labelsTr/7.nii.gz``, or BIDS's ``sub-1/anat/sub-1_T1w.nii.gz`` and
``derivatives/labels/sub-1/anat/sub-1_T1w_seg-manual.nii.gz``. In words: take a path apart, drop the words that only
say "image" or "mask", and what remains is the same for both. A folder or name that is called like one of the
bundle's classes, or its alias in the policy, marks a mask of that class alone (``vessel/7.png``), so an image may
have one mask file per class. A class called by a mere number names no file: ``2.png`` is the second image.

A mask goes to the image of its own whole name, if there is one. Otherwise classes' names are dropped, too, and it
finds its image only where that leaves one: no image is protected under another one's mask.

DICOM segmentations and structure sets name their images themselves; see `dicom_masks`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Final

from medveil.agent.imageio import Item, Listing, Quarantined
from medveil.agent.segmentation.label_map import ClassMap
from medveil.agent.segmentation.raster_masks import RASTER_FORMATS

__all__ = ["MASK_FORMAT", "MaskFile", "Pairing", "Place", "pair", "place_of"]

MASK_FORMAT: Final = "mask"
"""Name of the format that carries a raster mask over, byte for byte."""

_IMAGE_WORDS: Final = frozenset({"image", "images", "img", "imgs"})
_MASK_WORDS: Final = frozenset(
    {"mask", "masks", "label", "labels", "seg", "segs", "segmentation", "segmentations", "gt", "manual"}
    | {"annotation", "annotations", "contour", "contours", "lesion", "lesions", "derivatives"}
)
"""What folders and files of masks are called: MSD ``labelsTr``, BIDS ``derivatives/labels``, ``_seg``."""

_NIFTI: Final = "nifti"
_JPEG: Final = "jpeg"


Key = tuple[tuple[str, ...], ...]
"""The words of folders and name."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a path says.

    Attributes:
        whole: what the path says without the words for "image" and "mask".
        key: the same without names of classes: what image and mask have in common.
        is_mask: whether the deepest word that tells them apart says "mask".
        class_index: the class that the path names; None where it names none.
    """

    whole: Key
    key: Key
    is_mask: bool
    class_index: int | None


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A file that marks structures in an image.

    Attributes:
        item: the file.
        class_index: the one class that it marks, with every value but 0; None where values stand for classes.
    """

    item: Item
    class_index: int | None


@dataclass(frozen=True, slots=True)
class Pairing:
    """A source with its masks told apart from its images.

    Attributes:
        listing: the source; raster masks are companions now, and masks without an image are quarantined.
        masks: mask files of an image, by the image's path; DICOM objects are not in here.
    """

    listing: Listing
    masks: Mapping[PurePosixPath, tuple[MaskFile, ...]]


def pair(listing: Listing, names: ClassMap) -> Pairing:
    """Tell masks from images and say which belong together.

    Args:
        listing: as the scan found the source.
        names: class names that folders and files may carry.
    """
    places = {item.relative: place_of(item.relative, names) for item in listing.items}
    found, images = _divided(listing.items, places)
    owners: dict[Key, set[Key]] = defaultdict(set)
    for image in images:
        place = places[image.relative]
        owners[place.key].add(place.whole)
    by_owner: dict[Key, list[MaskFile]] = defaultdict(list)
    for item in found:
        place = places[item.relative]
        for owner in _owner(place, owners):
            by_owner[owner].append(MaskFile(item, place.class_index))
    masks = {
        image.relative: tuple(
            mask for mask in by_owner[places[image.relative].whole] if _fits(mask.item, image)
        )
        for image in images
    }
    used = {mask.item.relative for group in masks.values() for mask in group}
    orphans = {item.relative for item in found if item.relative not in used}
    sentence = "This mask belongs to no image of the source; give both the same name, or remove it."
    entries = [Quarantined(relative, "mask-without-image", sentence) for relative in sorted(orphans)]
    kept = tuple(
        _carried_over(item) if item.relative in used else item
        for item in listing.items
        if item.relative not in orphans
    )
    return Pairing(replace(listing, items=kept, quarantined=(*listing.quarantined, *entries)), masks)


def place_of(relative: PurePosixPath, names: ClassMap) -> Place:
    """Take a path apart; see the top of this module."""
    key: list[tuple[str, ...]] = []
    whole: list[tuple[str, ...]] = []
    is_mask, class_index = False, None
    stem = relative.name.removesuffix(".gz").rpartition(".")[0] or relative.name
    for part in (*relative.parts[:-1], stem):
        spoken = _words(part)
        words, named = _without_class(spoken, names)
        class_index = named if named is not None else class_index
        kinds = [word in _MASK_WORDS for word in words if word in _MASK_WORDS or word in _IMAGE_WORDS]
        if named is not None or kinds:
            is_mask = named is not None or any(kinds)
        for said, into in ((spoken, whole), (words, key)):
            rest = tuple(word for word in said if word not in _MASK_WORDS and word not in _IMAGE_WORDS)
            if rest:
                into.append(rest)
    return Place(tuple(whole), tuple(key), is_mask, class_index if is_mask else None)


def _owner(mask: Place, owners: Mapping[Key, set[Key]]) -> set[Key]:
    """Return the whole name of the image that a mask belongs to; nothing where it could be one of several."""
    candidates = owners.get(mask.key, set())
    if mask.whole in candidates:
        return {mask.whole}
    return candidates if len(candidates) == 1 else set()


def _words(part: str) -> tuple[str, ...]:
    """Return the words and numbers of a name, in lower case: ``labelsTr_007`` is labels, tr, 007."""
    spelled = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower()
    return tuple(re.findall(r"[^\W\d_]+|\d+", spelled))


def _without_class(words: tuple[str, ...], names: ClassMap) -> tuple[tuple[str, ...], int | None]:
    """Return the words without those of a class's name, and which class it was."""
    for name, index in names.structures:
        wanted = _words(name)
        if all(word.isdigit() for word in wanted):
            continue
        for start in range(len(words) - len(wanted) + 1):
            if words[start : start + len(wanted)] == wanted:
                return words[:start] + words[start + len(wanted) :], index
    return words, None


def _divided(items: Sequence[Item], places: Mapping[PurePosixPath, Place]) -> tuple[list[Item], list[Item]]:
    """Return mask files and images. Companions that are neither (DICOM objects) are in none of the two."""
    masks: list[Item] = []
    images: list[Item] = []
    for item in items:
        if item.format == _NIFTI:
            (images if item.frames else masks).append(item)  # the format looked into the voxels itself
        elif places[item.relative].is_mask and item.format in (*RASTER_FORMATS, _JPEG):
            masks.append(item)
        elif item.frames:
            images.append(item)
    return masks, images


def _fits(mask: Item, image: Item) -> bool:
    """Return whether a mask's format can say something about an image: voxels about voxels, pixels about pixels."""
    return (mask.format == _NIFTI) == (image.format == _NIFTI)


def _carried_over(item: Item) -> Item:
    """Return a mask as a companion: no images of its own, the same name, the same bytes."""
    if item.format == _NIFTI:
        return item
    return replace(item, format=MASK_FORMAT, frames=0, pixels=0, target=item.relative, seals_original=False)
