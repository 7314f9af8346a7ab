"""What folders and files are called, and whether that says "image" or "mask".

The words are those of the layouts that data sets come in: MSD's ``imagesTr`` and ``labelsTr``, BIDS's
``derivatives/labels``, ``_seg``, ``1st_manual``. The deepest word of a path decides: ``mask study/images/7.png`` is
an image. What is called by what a mask shows only (``lesions/7.png``) is a mask, unless it lies among images.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final

__all__ = ["IMAGE_WORDS", "MASK_WORDS", "STRUCTURE_WORDS", "is_named_as_mask", "parts_of", "words_of"]

IMAGE_WORDS: Final = frozenset({"image", "images", "img", "imgs"})
MASK_WORDS: Final = frozenset(
    {"mask", "masks", "label", "labels", "seg", "segs", "segmentation", "segmentations", "gt", "manual"}
    | {"annotation", "annotations"}
)
STRUCTURE_WORDS: Final = frozenset({"contour", "contours", "lesion", "lesions"})
"""What a mask shows; an image may be called after it, too."""


def words_of(part: str) -> tuple[str, ...]:
    """Return the words and numbers of a name, in lower case: ``labelsTr_007`` is labels, tr, 007."""
    spelled = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower()
    return tuple(re.findall(r"[^\W\d_]+|\d+", spelled))


def parts_of(relative: PurePosixPath) -> tuple[tuple[str, ...], ...]:
    """Return the words of every folder and of the name, without its suffix."""
    stem = relative.name.removesuffix(".gz").rpartition(".")[0] or relative.name
    return tuple(words_of(part) for part in (*relative.parts[:-1], stem))


def is_named_as_mask(relative: PurePosixPath) -> bool:
    """Return whether a path says "mask"."""
    parts = parts_of(relative)
    for words in reversed(parts):
        if MASK_WORDS.intersection(words):
            return True
        if IMAGE_WORDS.intersection(words):
            return False
    return any(STRUCTURE_WORDS.intersection(words) for words in parts)
