"""The life of one image, as a table: which state may follow which. Pure; the store asks before it writes."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

__all__ = ["FINAL_STATES", "FileState", "ImageState", "allowed"]


class ImageState(StrEnum):
    """How far one image has come."""

    FOUND = "found"
    """Listed from a header; not looked at yet."""
    READ = "read"
    """Decoded and labelled; its digest is known."""
    PROTECTED = "protected"
    """The changed pixels are on the disk of the private folder; the file is not released yet."""
    VERIFIED = "verified"
    """Released, read back and found to be what was meant."""
    QUARANTINED = "quarantined"
    """Left out, with a named reason."""
    NOT_PROTECTABLE = "not_protectable"
    """Left out: no change fits into the budget."""


class FileState(StrEnum):
    """How far one file of the source has come."""

    FOUND = "found"
    WRITING = "writing"
    """From here on a file under the target's name in the release folder is ours."""
    DONE = "done"
    """Every image of it is verified, or left out."""


_NEXT: Final[Mapping[ImageState, frozenset[ImageState]]] = {
    ImageState.FOUND: frozenset({ImageState.READ, ImageState.QUARANTINED}),
    ImageState.READ: frozenset(
        {
            ImageState.FOUND,
            ImageState.READ,
            ImageState.PROTECTED,
            ImageState.QUARANTINED,
            ImageState.NOT_PROTECTABLE,
        }
    ),
    # Left out after all: the copy did not read back, or another image of the same file has no room for
    # a change.
    ImageState.PROTECTED: frozenset(
        {ImageState.FOUND, ImageState.VERIFIED, ImageState.QUARANTINED, ImageState.NOT_PROTECTABLE}
    ),
    # Back to the start: the released file vanished, the source changed, or the steward asked for another try.
    ImageState.VERIFIED: frozenset({ImageState.FOUND}),
    ImageState.QUARANTINED: frozenset({ImageState.FOUND}),
    ImageState.NOT_PROTECTABLE: frozenset({ImageState.FOUND, ImageState.QUARANTINED}),
}

FINAL_STATES: Final = frozenset({ImageState.VERIFIED, ImageState.QUARANTINED, ImageState.NOT_PROTECTABLE})
"""States that need no more work."""


def allowed(current: ImageState, following: ImageState) -> bool:
    """Return whether an image may go from one state to another."""
    return following in _NEXT[current]
