"""Which mask belongs to which image, by where the files lie and what they are called.

``images/a/7.png`` and ``masks/a/7.png`` belong together, as do ``7.png`` and ``7_mask.png``, ``imagesTr/7.nii.gz``
and ``labelsTr/7.nii.gz``, or BIDS's ``sub-1/anat/sub-1_T1w.nii.gz`` and
``derivatives/labels/sub-1/anat/sub-1_T1w_seg-manual.nii.gz``. In words: take a path apart, drop the words that only
say "image" or "mask", and what remains is the same for both.

A folder or name that is called like one of the bundle's classes, or its alias in the policy, marks a mask of that
class alone (``vessel/7.png``), so an image may have one mask file per class. Data sets are called after what they
show, too (``imagesTr/liver_7.nii.gz`` beside ``labelsTr/liver_7.nii.gz``): where an image carries the name as well,
the values of its mask say what they stand for. A class called by a mere number names no file: ``2.png`` is the second
image.

A mask goes to the image of its own whole name, if there is one; else to the image whose whole name is its own without
a class; else, classes dropped on both sides, to its image only where there is one: no image is protected under
another one's mask.

DICOM segmentations and structure sets name their images themselves; see `dicom_masks`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import PurePosixPath
from typing import Final

from medveil.agent.imageio import Item, Listing, Quarantined
from medveil.agent.imageio.naming import IMAGE_WORDS, MASK_WORDS, STRUCTURE_WORDS, parts_of, words_of
from medveil.agent.segmentation.label_map import ClassMap
from medveil.agent.segmentation.raster_masks import RASTER_FORMATS

__all__ = ["MASK_FORMAT", "Kind", "MaskFile", "Pairing", "Place", "pair", "place_of"]

MASK_FORMAT: Final = "mask"
"""Name of the format that carries a raster mask over, byte for byte."""

_SAYS_NOTHING: Final = IMAGE_WORDS | MASK_WORDS | {"derivatives"}
"""Words that image and mask need not share."""

_NIFTI: Final = "nifti"
_JPEG: Final = "jpeg"


Words = tuple[str, ...]
Key = tuple[Words, ...]
"""The words of folders and name."""

Named = Mapping[Words, int | None]
"""Words that name a structure, and the index of its class; None: of no class in particular."""


class Kind(Enum):
    """What a path alone says that a file is."""

    IMAGE = auto()
    MASK = auto()
    STRUCTURE = auto()
    """Called like a class: its mask, or an image that is called after what it shows."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a path says.

    Attributes:
        kind: see `Kind`; the deepest word decides.
        among_images: whether the deepest word of the two says "image", not "mask".
        whole: what the path says without the words for "image" and "mask".
        readings: the same without one name of a class, and the index of that class, in every way there is.
        bare: the same without any name of a class.
        class_index: the deepest class that the path names; None where it names none.
    """

    kind: Kind
    among_images: bool
    whole: Key
    readings: tuple[tuple[Key, int | None], ...]
    bare: Key
    class_index: int | None


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A file that marks structures in an image.

    Attributes:
        item: the file.
        class_index: the one class that it marks, with every value but 0; None where values stand for classes.
        yes: the structure that "yes" (255) means there, if no class has that value: the one that the path names.
    """

    item: Item
    class_index: int | None
    yes: int | None = None


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
    named = _named(names)
    places = {item.relative: _place(item.relative, named) for item in listing.items}
    found, images = _divided(listing.items, places)
    owners = _Owners([places[image.relative] for image in images])
    by_owner: dict[Key, list[MaskFile]] = defaultdict(list)
    for item in found:
        place = places[item.relative]
        owner = owners.of(place)
        if owner is not None:
            by_owner[owner[0]].append(MaskFile(item, owner[1], place.class_index or None))
    masks = {
        image.relative: tuple(
            mask for mask in by_owner[places[image.relative].whole] if _fits(mask.item, image)
        )
        for image in images
    }
    used = {mask.item.relative for group in masks.values() for mask in group}
    orphans = {item.relative for item in found if item.relative not in used}
    entries = [_orphaned(relative, places[relative]) for relative in sorted(orphans)]
    kept = tuple(
        _carried_over(item) if item.relative in used else item
        for item in listing.items
        if item.relative not in orphans
    )
    return Pairing(replace(listing, items=kept, quarantined=(*listing.quarantined, *entries)), masks)


def place_of(relative: PurePosixPath, names: ClassMap) -> Place:
    """Take a path apart; see the top of this module."""
    return _place(relative, _named(names))


def _named(names: ClassMap) -> Named:
    """Return the words that name structures: those of everyone, and the bundle's classes and their aliases."""
    named: dict[Words, int | None] = {(word,): None for word in STRUCTURE_WORDS}
    for name, index in reversed(names.structures):
        words = _telling(words_of(name))
        if not all(word.isdigit() for word in words):
            named[words] = index
    return named


def _place(relative: PurePosixPath, named: Named) -> Place:
    parts = parts_of(relative)
    kind, among_images, class_index = Kind.IMAGE, False, None
    for words in parts:
        if MASK_WORDS.intersection(words):
            kind, among_images = Kind.MASK, False
        elif IMAGE_WORDS.intersection(words):
            kind, among_images = Kind.IMAGE, True
        for _, index in _without_one(words, named):
            kind = Kind.MASK if kind is Kind.MASK else Kind.STRUCTURE
            class_index = class_index if index is None else index
    whole = tuple(_telling(words) for words in parts)
    readings = tuple(
        (_key((*whole[:at], rest, *whole[at + 1 :])), index)
        for at, words in enumerate(whole)
        for rest, index in _without_one(words, named)
    )
    bare = _key(tuple(_without_any(words, named) for words in whole))
    return Place(kind, among_images, _key(whole), readings, bare, class_index)


def _telling(words: Words) -> Words:
    return tuple(word for word in words if word not in _SAYS_NOTHING)


def _key(parts: Key) -> Key:
    return tuple(words for words in parts if words)


def _without_one(words: Words, named: Named) -> Iterator[tuple[Words, int | None]]:
    """Yield the words without the name of a structure, and its class, for each name in them."""
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            if words[start:end] in named:
                yield words[:start] + words[end:], named[words[start:end]]


def _without_any(words: Words, named: Named) -> Words:
    """Return the words without the names of structures, longer names first."""
    shorter = min((rest for rest, _ in _without_one(words, named)), key=len, default=None)
    return words if shorter is None else _without_any(shorter, named)


class _Owners:
    """The images that masks may belong to, by what they are called."""

    def __init__(self, images: Sequence[Place]) -> None:
        self._wholes = {image.whole for image in images}
        self._by_bare: dict[Key, set[Key]] = defaultdict(set)
        for image in images:
            self._by_bare[image.bare].add(image.whole)

    def of(self, mask: Place) -> tuple[Key, int | None] | None:
        """Return the whole name of a mask's image and the one class that it marks; None: it could be of several."""
        if mask.whole in self._wholes:
            return mask.whole, None
        known = {key: index for key, index in mask.readings if key in self._wholes}
        if known:
            return known.popitem() if len(known) == 1 else None
        images = self._by_bare.get(mask.bare, set())
        return (min(images), mask.class_index) if len(images) == 1 else None


def _divided(items: Sequence[Item], places: Mapping[PurePosixPath, Place]) -> tuple[list[Item], list[Item]]:
    """Return mask files and images. Companions that are neither (DICOM objects) are in none of the two."""
    masks: list[Item] = []
    images: list[Item] = []
    unclear: list[Item] = []
    for item in items:
        kind = places[item.relative].kind
        if item.format == _NIFTI:
            (images if item.frames else masks).append(item)  # the format looked into the voxels itself
        elif item.format not in (*RASTER_FORMATS, _JPEG) or kind is Kind.IMAGE:
            images.extend([item] if item.frames else [])
        else:
            (masks if kind is Kind.MASK else unclear).append(item)
    with_mask = {places[item.relative].whole for item in masks}
    seen = {places[item.relative].whole for item in images}
    for item in unclear:
        (images if _is_image(places[item.relative], with_mask, seen) else masks).append(item)
    return masks, images


def _is_image(place: Place, with_mask: set[Key], images: set[Key]) -> bool:
    """Return whether what is called like a class is an image all the same.

    Args:
        place: what it is called.
        with_mask: what masks that say so are called.
        images: what images that are no such case are called.
    """
    if place.whole in with_mask:
        return True
    is_mask_of_another = any(key in images for key, _ in place.readings) or place.bare in images
    return place.among_images and not is_mask_of_another


def _orphaned(relative: PurePosixPath, place: Place) -> Quarantined:
    sentence = "This mask belongs to no readable image of the source; give both the same name, or remove it."
    if place.kind is Kind.STRUCTURE:
        sentence = (
            "This file is called like a structure, so it counts as its mask, and it belongs to no image; put images "
            "into a folder called images and masks into one called masks."
        )
    return Quarantined(relative, "mask-without-image", sentence)


def _fits(mask: Item, image: Item) -> bool:
    """Return whether a mask's format can say something about an image: voxels about voxels, pixels about pixels."""
    return (mask.format == _NIFTI) == (image.format == _NIFTI)


def _carried_over(item: Item) -> Item:
    """Return a mask as a companion: no images of its own, the same name, the same bytes."""
    if item.format == _NIFTI:
        return item
    return replace(item, format=MASK_FORMAT, frames=0, pixels=0, target=item.relative, seals_original=False)
