"""Which class of the bundle an image gets: from its own label, the labels file, or its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medveil.agent.imageio import Image, Item, LabelTable, Taxonomy, folder_label
from medveil.agent.workspace import LABELS_NAME
from medveil.models.errors import ImageError, InputError

__all__ = ["LABEL_REASONS", "Labeller", "labels_file"]

LABEL_REASONS = ("missing-label", "unknown-class", "label-conflict")
"""Reasons that lie outside the image's file: they may be gone although the file has not changed."""


def labels_file(source: Path, named: Path | None) -> Path | None:
    """Return the labels file of a source: the one that was named, else the one that lies in it; None: there is none.

    Raises:
        InputError: ``no-labels-file``: the one that was named isn't there.
    """
    if named is not None and not named.is_file():
        raise InputError("no-labels-file", "There is no labels file at this path; check --labels.")
    beside = source / LABELS_NAME
    return named or (beside if beside.is_file() else None)


@dataclass(frozen=True, slots=True)
class Labeller:
    """Labels every image of a job.

    Attributes:
        taxonomy: the bundle's classes.
        table: the labels file, if there is one; it decides over folders.
    """

    taxonomy: Taxonomy
    table: LabelTable | None

    def class_of(self, item: Item, image: Image) -> int:
        """Return the index of an image's class.

        Raises:
            ImageError: ``missing-label``, ``label-conflict`` or ``unknown-class``.
        """
        if item.splittable or image.label is not None:
            return self.taxonomy.index(image.label)
        return self.class_of_file(item)

    def class_of_file(self, item: Item) -> int:
        """Return the index of the class that the labels file or the folder gives to all of a file.

        Raises:
            ImageError: ``missing-label``, ``label-conflict`` or ``unknown-class``.
        """
        if self.table is not None:
            return self.taxonomy.index(self.table.label(item.relative))
        return self.taxonomy.index(folder_label(item.relative, self.taxonomy))

    def known_class(self, item: Item) -> int | None:
        """Return the class of a file, or None where it has none."""
        try:
            return self.class_of_file(item)
        except ImageError:
            return None
