"""Patches of originals and of protected copies at the same places, with their label maps, at native resolution."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from medveil.agent.budget import channels_first
from medveil.agent.imageio import Image, ImageFormat, StoredArray, scan
from medveil.agent.ledger import Ledger
from medveil.agent.segmentation.annotations import Annotations
from medveil.agent.segmentation.label_map import ClassMap
from medveil.agent.segmentation.perturber import as_channels
from medveil.agent.segmentation.series import in_series
from medveil.agent.segmentation.site_check.networks import ALIGNMENT
from medveil.agent.victim_check.pairs import ReleaseReader
from medveil.agent.victim_check.sample import Candidate
from medveil.agent.victim_check.training import Labels
from medveil.agent.workspace import Workspace
from medveil.models.datasets.masked import MaskedSet, Patches, cut_patches
from medveil.models.methods.oracle import FloatArray

__all__ = ["MaskedPairs", "MaskedReader", "of_one_size"]

_SIDE: Final = 64
"""Rows and columns of a patch: what the coordinator's own victims get."""

_MOST_PER_IMAGE: Final = 20
"""Patches of one image: more of them overlap (a DRIVE image of 584 x 565 pixels holds 72 side by side)."""


@dataclass(frozen=True, eq=False)
class MaskedPairs:
    """The same patches twice.

    Attributes:
        clean: ``(N, C, side, side)`` float32 in [0, 1], from the originals.
        protected: the same places, from the release.
        labels: ``(N, side, side)`` class index of the bundle, 0 for background.
        units: ``(N,)`` which volume, series or image each patch is from, counted from 0.
    """

    clean: FloatArray
    protected: FloatArray
    labels: Labels
    units: npt.NDArray[np.int64]


class MaskedReader(ReleaseReader):
    """Reads a release whose images have masks.

    Attributes:
        units: by file, the series that it belongs to; a file that is not in it stands alone.
    """

    def __init__(
        self,
        workspace: Workspace,
        ledger: Ledger,
        source: Path,
        formats: Sequence[ImageFormat],
        names: ClassMap,
    ) -> None:
        """List the source and pair its images with their masks, as `protect` did.

        Args:
            workspace: the job's folders.
            ledger: its open ledger.
            source: folder or file of the originals.
            formats: as the job used them.
            names: what masks call the classes.
        """
        super().__init__(workspace, ledger, source, formats)
        listing = scan(source, formats, labels_file=None)
        self._annotations = Annotations(listing, names)
        self._classes = names.taxonomy.names
        self._values = names.taxonomy.values
        by_path = {file.relative: file.id for file in self._files.values()}
        self.units: Mapping[int, str] = {
            by_path[item.relative]: f"series {number}"
            for number, series in enumerate(in_series(listing.items))
            for item in series
            if item.relative in by_path
        }

    def patches(self, chosen: Sequence[Candidate], wanted: int, channels: int) -> MaskedPairs:
        """Read images twice and cut patches, most of them with something marked.

        Args:
            chosen: from `candidates`.
            wanted: about so many patches in all.
            channels: what a model takes.

        Raises:
            InputError: as `ReleaseReader.pairs`; or the reason why a mask can't be read any more.
        """
        per_image = min(_MOST_PER_IMAGE, math.ceil(wanted / len(chosen)))
        by_file: dict[int, dict[int, tuple[int, Candidate]]] = defaultdict(dict)
        for place, candidate in enumerate(chosen):
            by_file[candidate.file][candidate.position] = (place, candidate)
        cut: dict[int, Patches] = {}
        largest = ALIGNMENT
        for number, positions in by_file.items():
            item = self._item(self._files[number])
            for place, image, stored in self._read(self._files[number], positions):
                largest = max(largest, *image.size)
                classes = self._annotations.label_map(item, image).classes.astype(np.int64)
                both = [_shown(image, values, channels) for values in (image.pixels, stored)]
                # Every image draws its places from its own digest, whatever else was chosen.
                rng = np.random.default_rng(int(chosen[place].digest[:16], 16))
                cut[place] = cut_patches(self._one(np.concatenate(both), classes), _SIDE, per_image, rng)
        parts = [cut[place] for place in range(len(chosen))]
        names = [self.units.get(c.file, f"file {c.file}") for c in chosen]
        _, units = np.unique(names, return_inverse=True)
        # Small images were filled up with zeros; what is filling in every patch is cut off again.
        filled = slice(min(_SIDE, -(-largest // ALIGNMENT) * ALIGNMENT))
        stacked = np.concatenate([part.images for part in parts])[..., filled, filled]
        return MaskedPairs(
            clean=stacked[:, :channels],
            protected=stacked[:, channels:],
            labels=np.concatenate([part.labels for part in parts])[..., filled, filled],
            units=np.repeat(units, per_image),
        )

    def _one(self, planes: FloatArray, classes: Labels) -> MaskedSet:
        return MaskedSet((planes,), (classes,), self._classes, self._values, "")


def of_one_size(first: MaskedPairs, second: MaskedPairs) -> tuple[MaskedPairs, MaskedPairs]:
    """Return both with patches of the larger side of the two, filled up with zeros as small images are.

    Images smaller than a patch differ in size, and one victim sees the patches of both.
    """
    side = max(first.labels.shape[-1], second.labels.shape[-1])
    return _filled_up(first, side), _filled_up(second, side)


def _filled_up(pairs: MaskedPairs, side: int) -> MaskedPairs:
    missing = [(0, side - pairs.labels.shape[-1])] * 2
    return replace(
        pairs,
        clean=np.pad(pairs.clean, [(0, 0), (0, 0), *missing]),
        protected=np.pad(pairs.protected, [(0, 0), (0, 0), *missing]),
        labels=np.pad(pairs.labels, [(0, 0), *missing]),
    )


def _shown(image: Image, stored: StoredArray, channels: int) -> FloatArray:
    """Return what the release window shows of stored values, ``(channels, rows, columns)``."""
    shown: FloatArray = as_channels(channels_first(image.window.display(stored))[None], channels)[0]
    return shown
