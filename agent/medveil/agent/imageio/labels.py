"""Which class an image belongs to: folder names, a CSV, or label values inside an NPZ."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from medveil.agent.imageio.image import Label
from medveil.models.errors import ConfigurationError, ImageError, InputError

__all__ = ["LABELS_FILE", "LabelTable", "Taxonomy", "folder_label", "read_label_table"]

LABELS_FILE: Final = "labels.csv"
_PATH_COLUMN: Final = "file"
_LABEL_COLUMN: Final = "label"


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """The classes that the surrogates know, in their order.

    Attributes:
        names: class names; compared without regard to case and surrounding blanks.
        values: the label value that each class is stored as in an NPZ.
        aliases: this site's name of a class, or its stored value as text -> class name; it comes first. Those
            that mean no class here are for other bundles.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folded = {_folded(name) for name in self.names}
        if len(self.names) != len(self.values) or len(folded) != len(self.names):
            raise ConfigurationError("taxonomy", "The bundle's class names or label values are not distinct.")

    def named(self, name: str) -> int | None:
        """Return the index of the class of that name, the bundle's or this site's; or None."""
        known = [_folded(name) for name in self.names]
        meant = {_folded(alias): _folded(to) for alias, to in self.aliases.items() if _folded(to) in known}
        wanted = meant.get(_folded(name), _folded(name))
        return known.index(wanted) if wanted in known else None

    def index(self, label: Label) -> int:
        """Return the index of a label given as a class name, a stored value, or a stored value as text.

        Raises:
            ImageError: ``missing-label`` or ``unknown-class``.
        """
        if label is None or (isinstance(label, str) and not label.strip()):
            raise ImageError(
                "missing-label",
                "This image has no label; put it in its class's folder or name it in the CSV.",
            )
        if isinstance(label, str) or str(label) in self.aliases:
            index = self.named(str(label))
            if index is not None:
                return index
        value = int(label) if isinstance(label, int) or label.strip().lstrip("-").isdecimal() else None
        if value in self.values:
            return self.values.index(value)
        raise ImageError(
            "unknown-class",
            f"This image's class is none of the bundle's ({', '.join(self.names)}); rename it, or say in the "
            "policy's table [classes] which of them it is.",
            private=f"label {label!r}",
        )


def _folded(name: str) -> str:
    return name.strip().casefold()


def folder_label(relative: PurePosixPath, taxonomy: Taxonomy) -> Label:
    """Return the class that a path's folders name: the first folder, or the first below it that is a class.

    ``PNEUMONIA/1.png`` and ``train/PNEUMONIA/1.png`` both belong to PNEUMONIA. A file outside any
    folder has no label; where no folder is a class the first one is returned, to be refused under its
    own name.
    """
    folders = relative.parts[:-1]
    if not folders:
        return None
    return next((name for name in folders if taxonomy.named(name) is not None), folders[0])


@dataclass(frozen=True, slots=True)
class LabelTable:
    """Labels by path below the source folder. A path that is named with two labels belongs to neither."""

    labels: Mapping[PurePosixPath, str]
    conflicting: frozenset[PurePosixPath]

    def label(self, relative: PurePosixPath) -> Label:
        """Return the label of a file.

        Raises:
            ImageError: ``label-conflict``, or ``missing-label`` where the table doesn't name the file.
        """
        if relative in self.conflicting:
            raise ImageError("label-conflict", "The labels file names this image with two different labels.")
        if relative not in self.labels:
            raise ImageError("missing-label", "The labels file does not name this image; add a line for it.")
        return self.labels[relative]


def read_label_table(path: Path) -> LabelTable:
    """Read a CSV with the columns ``file`` and ``label``; other columns are not looked at.

    Raises:
        InputError: ``labels-unreadable`` or ``labels-columns``.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise InputError(
            "labels-unreadable",
            "The labels file is not a readable CSV in UTF-8; save it again from the program that made it.",
            private=str(exc),
        ) from exc
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if _PATH_COLUMN not in header or _LABEL_COLUMN not in header:
        raise InputError(
            "labels-columns",
            f"The labels file needs a first line with the columns {_PATH_COLUMN},{_LABEL_COLUMN}.",
        )
    return _table(rows[1:], header.index(_PATH_COLUMN), header.index(_LABEL_COLUMN))


def _table(rows: Sequence[Sequence[str]], path_column: int, label_column: int) -> LabelTable:
    labels: dict[PurePosixPath, str] = {}
    conflicting = set()
    for row in rows:
        if len(row) <= max(path_column, label_column) or not row[path_column].strip():
            continue  # a blank or short line names no file; its image turns up as missing-label
        relative = PurePosixPath(row[path_column].strip().replace("\\", "/"))
        label = row[label_column].strip()
        if labels.setdefault(relative, label) != label:
            conflicting.add(relative)
    return LabelTable(labels, frozenset(conflicting))
