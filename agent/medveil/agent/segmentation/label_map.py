"""What a mask says: the class of every pixel, in the bundle's words, on the grid of its image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from medveil.agent.imageio import Taxonomy
from medveil.models.errors import ConfigurationError, ImageError

__all__ = ["BACKGROUND", "ClassArray", "ClassMap", "LabelMap", "check_tells_apart", "merged"]

ClassArray = npt.NDArray[np.uint8]
"""Class of every pixel: its index in the taxonomy."""

BACKGROUND: Final = 0
"""Index of the class that is no structure; the first of every segmentation taxonomy."""

_BINARY_FOREGROUND: Final = frozenset({1, 255, 65535})
"""What editors write for "yes" in a mask of one structure: one bit, 8 bits, 16 bits."""


@dataclass(frozen=True, slots=True)
class LabelMap:
    """The mask of one image or slice.

    Attributes:
        classes: ``(rows, columns)`` uint8, index of each pixel's class; 0 is background. Read-only.
    """

    classes: ClassArray

    def __post_init__(self) -> None:
        frozen = np.ascontiguousarray(self.classes).view()
        frozen.flags.writeable = False
        object.__setattr__(self, "classes", frozen)

    @property
    def is_empty(self) -> bool:
        """Whether no structure is marked."""
        return not self.classes.any()

    def check_alone(self) -> None:
        """Refuse a mask that says nothing, where no other slice of the same object says more.

        Raises:
            ImageError: ``empty-mask`` or ``full-mask``.
        """
        check_tells_apart(self.classes)

    @property
    def main_class(self) -> int:
        """Index of the structure that covers most pixels (the first of equals); background where there is none."""
        counts = np.bincount(self.classes.ravel(), minlength=1)
        counts[BACKGROUND] = 0
        return int(counts.argmax())


@dataclass(frozen=True, slots=True)
class ClassMap:
    """From what files call a structure to the index of its class.

    Attributes:
        taxonomy: the bundle's classes, background first.
        aliases: name or stored value in the site's files -> class name; to "background" what is not of interest.
    """

    taxonomy: Taxonomy
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for alias, meant in self.aliases.items():
            if self.taxonomy.named(meant) is None:
                raise ConfigurationError(
                    "alias",
                    f"The policy says that {alias!r} means {meant!r}, which is no class of the bundle "
                    f"({', '.join(self.taxonomy.names)}).",
                )

    @property
    def structures(self) -> tuple[tuple[str, int], ...]:
        """Every name that stands for a class, and the class; background only under the site's own names."""
        named = [(name, index) for index, name in enumerate(self.taxonomy.names) if index != BACKGROUND]
        aliases = [(alias, self.of_name(alias)) for alias in self.aliases]
        return (*named, *aliases)

    def of_name(self, *names: str) -> int:
        """Return the index of the first of several names of one structure that is known.

        Raises:
            ImageError: ``unknown-class``: none is.
        """
        for name in names:
            index = self._named(name)
            if index is not None:
                return index
        raise _unknown(self.taxonomy, ", ".join(names))

    def of_values(self, stored: npt.NDArray[Any], yes: int | None = None) -> ClassArray:
        """Return the class of every stored value of a label map; the arrays have one shape.

        Args:
            stored: whole numbers.
            yes: the class that the usual ways to write "yes" (1, 255, 65535) mean where they are no class's value;
                None: the bundle's one structure, if it knows one only.

        Raises:
            ImageError: ``unknown-class``: a value stands for no class; ``mask-type``: values are no whole numbers.
        """
        numbers = _whole(stored)
        known, place = np.unique(numbers, return_inverse=True)
        table = [self._of_value(int(value), yes) for value in known]
        return np.array(table, np.uint8)[place.reshape(numbers.shape)]

    def _of_value(self, value: int, yes: int | None) -> int:
        index = self._named(str(value))
        if index is not None:
            return index
        if value in self.taxonomy.values:
            return self.taxonomy.values.index(value)
        if value == 0:
            return BACKGROUND
        if yes is None and len(self.taxonomy.names) == 2:
            yes = 1
        if yes is not None and value in _BINARY_FOREGROUND:
            return yes
        raise _unknown(self.taxonomy, str(value))

    def _named(self, name: str) -> int | None:
        folded = {known.strip().casefold(): meant for known, meant in self.aliases.items()}
        return self.taxonomy.named(folded.get(name.strip().casefold(), name))


def check_tells_apart(classes: ClassArray) -> None:
    """Refuse a whole image's or volume's mask that is one class all over.

    Raises:
        ImageError: ``empty-mask``: background everywhere; ``full-mask``: one structure everywhere.
    """
    first = classes.flat[0]
    if (classes != first).any():
        return
    if first == BACKGROUND:
        raise ImageError("empty-mask", "This image's mask marks nothing; segment it, or leave the image out.")
    raise ImageError(
        "full-mask", "This image's mask covers all of it and tells nothing apart; segment it anew."
    )


def merged(maps: Sequence[ClassArray]) -> LabelMap:
    """Return one mask out of several of the same image; where they overlap, the class named later wins.

    Taxonomies go from the organ to what lies in it (tumour in liver), so the later class is the inner one.
    """
    whole = maps[0]
    for other in maps[1:]:
        whole = np.maximum(whole, other)
    return LabelMap(whole)


def _whole(stored: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if stored.dtype.kind == "f":
        if not np.isfinite(stored).all() or not np.array_equal(stored, np.rint(stored)):
            raise ImageError(
                "mask-type", "This image's mask holds values that are not whole numbers; export it as labels."
            )
    elif stored.dtype.kind not in "biu":
        raise ImageError("mask-type", "This image's mask is of no type that holds labels; export it again.")
    return stored.astype(np.int64)


def _unknown(taxonomy: Taxonomy, found: str) -> ImageError:
    return ImageError(
        "unknown-class",
        f"This image's mask holds a class that is none of the bundle's ({', '.join(taxonomy.names)}); rename it, or "
        "say in the policy what it means.",
        private=f"label {found!r}",
    )
