"""The masks of a source: every image's label map, wherever it is kept, or the reason why there is none.

The readers of hospital formats are loaded on first use, as in `medveil.agent.imageio`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from medveil.agent.imageio import Image, Item, Listing
from medveil.agent.segmentation.label_map import (
    BACKGROUND,
    ClassArray,
    ClassMap,
    LabelMap,
    check_tells_apart,
    merged,
)
from medveil.agent.segmentation.pairing import MaskFile, pair
from medveil.agent.segmentation.raster_masks import RASTER_FORMATS, read_raster_mask
from medveil.models.errors import ImageError

if TYPE_CHECKING:
    from medveil.agent.segmentation.perturber import MaskedPerturber
    from medveil.agent.segmentation.series import SeriesChange

__all__ = ["Annotations", "files_of"]

_NIFTI: Final = "nifti"
_JPEG: Final = "jpeg"


class Annotations:
    """Pairs the images of a source with their masks.

    Args:
        listing: what the source holds.
        names: what classes are called.
    """

    def __init__(self, listing: Listing, names: ClassMap) -> None:
        from medveil.agent.segmentation.dicom_masks import DicomMasks

        self._names = names
        pairing = pair(listing, names)
        self._masks = pairing.masks
        self._images: dict[PurePosixPath, set[PurePosixPath]] = defaultdict(set)
        for image, masks in pairing.masks.items():
            for mask in masks:
                self._images[mask.item.relative].add(image)
        self._listing = pairing.listing
        self._dicom = DicomMasks(listing.items, names)
        self._stack = lru_cache(maxsize=1)(self._read_stack)

    @property
    def listing(self) -> Listing:
        """The source with its masks as companions: carried over byte for byte, or remapped as DICOM objects are."""
        return self._listing

    def mask_files(self, item: Item) -> tuple[Item, ...]:
        """Return the files that mark structures in an image."""
        named = self._dicom.files_of(item) if item.format == "dicom" else ()
        return (*(mask.item for mask in self._masks.get(item.relative, ())), *named)

    def images_of(self, mask: Item) -> frozenset[PurePosixPath]:
        """Return the images that a raster or NIfTI mask belongs to; of no other file is there anything to say."""
        return frozenset(self._images.get(mask.relative, ()))

    def label_map(self, item: Item, image: Image) -> LabelMap:
        """Return the mask of one image, or of one slice of a volume, on its grid.

        A slice in which nothing is marked has an empty mask; a volume in which nothing is marked is refused.

        Raises:
            ImageError: ``missing-mask``, ``mask-conflict``, ``mask-lossy``, ``mask-size``, ``mask-grid``,
                ``mask-type``, ``mask-shades``, ``mask-colour``, ``mask-damaged``, ``mask-tiled``, ``empty-mask``,
                ``full-mask``, ``unknown-class``, ``contour-type`` or ``bad-geometry``.
        """
        if item.format == "dicom":
            found = self._dicom.label_map(item, image)
            if found is not None:
                return found
        masks = self._masks.get(item.relative, ())
        _check_masks(masks)
        stack = self._stack(item, masks)
        if stack.shape != (item.frames, *image.size):
            raise _wrong_size()
        return LabelMap(stack[image.frame])

    def change_in_series(self, perturber: MaskedPerturber, read: Callable[[Item], Image]) -> SeriesChange:
        """Return what the slices of the source's DICOM series should change by, for generators that look across them.

        Args:
            perturber: asked slab by slab.
            read: reads the one image of a file.
        """
        from medveil.agent.segmentation.series import SeriesChange

        return SeriesChange(
            perturber, self._listing.items, read, lambda item: lambda image: self.label_map(item, image)
        )

    def _read_stack(self, item: Item, masks: tuple[MaskFile, ...]) -> ClassArray:
        """Return the classes of every pixel of a file, ``(frames, rows, columns)``."""
        if len({_pages(mask, item) for mask in masks}) != 1:
            raise _wrong_size()
        parts = [self._read_mask(item, mask) for mask in masks]
        if len({part.shape for part in parts}) != 1:
            raise _wrong_size()
        whole = merged(parts).classes
        check_tells_apart(whole)
        return whole

    def _read_mask(self, item: Item, mask: MaskFile) -> ClassArray:
        if item.format == _NIFTI:
            from medveil.agent.segmentation.volume_masks import read_volume_mask

            stored = read_volume_mask(mask.item.path, item.path)
        else:
            pages = [read_raster_mask(mask.item, page) for page in range(mask.item.frames)]
            if len({page.shape for page in pages}) != 1:
                raise _wrong_size()
            stored = np.stack(pages)
        if mask.class_index is None:
            return self._names.of_values(stored, mask.yes)
        _check_two_values(stored)
        return np.where(stored != 0, mask.class_index, BACKGROUND).astype(np.uint8)


def files_of(item: Item, annotations: Annotations | None) -> tuple[Item, ...]:
    """Return the files that are decoded for an image: its own, and its masks; it has changed when one of them has."""
    return (item, *(() if annotations is None else annotations.mask_files(item)))


def _check_masks(masks: tuple[MaskFile, ...]) -> None:
    """Refuse a set of mask files that does not say one thing.

    Raises:
        ImageError: ``missing-mask``, ``mask-lossy`` or ``mask-conflict``.
    """
    classes = [mask.class_index for mask in masks if mask.class_index != BACKGROUND]
    if not classes:
        raise ImageError(
            "missing-mask",
            "This image has no usable mask; give it one of the same name in a folder called masks, or a DICOM "
            "segmentation that names it.",
        )
    if any(mask.item.format == _JPEG for mask in masks):
        raise ImageError(
            "mask-lossy", "This image's mask is a JPEG, which changes its values; export it as PNG."
        )
    if len(set(classes)) < len(classes) or (None in classes and len(classes) > 1):
        raise ImageError(
            "mask-conflict",
            "Two files claim to be this image's mask; keep one, or name each after its class.",
        )


def _check_two_values(stored: npt.NDArray[Any]) -> None:
    """Refuse as a mask of one class what has shades: edges that a viewer smoothed, or a picture.

    Raises:
        ImageError: ``mask-shades``.
    """
    inside = stored[stored != 0]
    if inside.size and (inside != inside[0]).any():
        raise ImageError(
            "mask-shades",
            "This image's mask of one class holds more than two values; export it with 0 outside and one value "
            "inside.",
        )


def _pages(mask: MaskFile, item: Item) -> int:
    return mask.item.frames if mask.item.format in RASTER_FORMATS else item.frames


def _wrong_size() -> ImageError:
    return ImageError("mask-size", "This image's mask has another size than the image; export both again.")
