"""Originals and protected copies of a release, as a model would be given them: resized, windowed, in [0, 1]."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medveil.agent.imageio import Image, ImageFormat, Item, StoredArray
from medveil.agent.ledger import FileRow, FileState, ImageState, Ledger
from medveil.agent.perturb import seen
from medveil.agent.victim_check.sample import Candidate
from medveil.agent.victim_check.training import Labels
from medveil.agent.workspace import Workspace
from medveil.models.disk import file_sha256
from medveil.models.errors import ImageError, InputError
from medveil.models.methods.oracle import FloatArray

__all__ = ["Pairs", "ReleaseReader"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The same images twice.

    Attributes:
        clean: ``(N, C, rows, columns)`` float32 in [0, 1], from the originals.
        protected: the same images, from the release.
        labels: ``(N,)`` the classes that occur, counted from 0.
    """

    clean: FloatArray
    protected: FloatArray
    labels: Labels


class ReleaseReader:
    """Reads a release, finished or running: only what the ledger holds as verified counts."""

    def __init__(
        self, workspace: Workspace, ledger: Ledger, source: Path, formats: Sequence[ImageFormat]
    ) -> None:
        """Keep where everything lies; nothing is read yet.

        Args:
            workspace: the job's folders.
            ledger: its open ledger.
            source: folder or file of the originals.
            formats: as the job used them: windows decide what a model sees.
        """
        self._workspace = workspace
        self._ledger = ledger
        self._root = source if source.is_dir() else source.parent
        self._formats: Mapping[str, ImageFormat] = {format_.name: format_ for format_ in formats}
        self._files = {
            file.id: file for file in ledger.files(FileState.DONE) if file.output_sha256 is not None
        }

    def candidates(self) -> Iterator[Candidate]:
        """Yield every verified image."""
        for file in self._files.values():
            whole = file.frames > 1 and not self._item(file).splittable
            rows = [row for row in self._ledger.images(file.id) if row.state is ImageState.VERIFIED]
            for position, row in enumerate(rows):
                if row.receipt is not None:
                    label, digest = row.receipt.class_index, row.receipt.digest
                    yield Candidate(file.id, row.frame, position, label, digest, whole)

    def pairs(self, chosen: Sequence[Candidate], shape: tuple[int, int, int]) -> Pairs:
        """Read images twice, in the order given.

        Args:
            chosen: from `candidates`.
            shape: ``(C, rows, columns)`` of what a model takes; images are brought there as `protect` does.

        Raises:
            InputError: ``source-changed`` or ``release-changed``: an original or a copy is not what the ledger
                says; ``source-missing``.
        """
        clean = np.empty((len(chosen), *shape), np.float32)
        protected = np.empty_like(clean)
        wanted: dict[int, dict[int, tuple[int, Candidate]]] = defaultdict(dict)
        for place, candidate in enumerate(chosen):
            wanted[candidate.file][candidate.position] = (place, candidate)
        for number, positions in wanted.items():
            for place, image, written in self._read(self._files[number], positions):
                clean[place] = seen(image, image.pixels, shape)
                protected[place] = seen(image, written, shape)
        # A site needn't have every class of the campaign, and a victim has no use for an answer that never occurs.
        _, labels = np.unique([c.class_index for c in chosen], return_inverse=True)
        return Pairs(clean, protected, labels.astype(np.int64))

    def _item(self, file: FileRow) -> Item:
        try:
            return self._formats[file.format].inspect(self._root / file.relative, file.relative)
        except ImageError as exc:
            raise InputError(
                "source-missing", "An original of this release can't be read any more; the check needs it."
            ) from exc

    def _read(
        self, file: FileRow, positions: Mapping[int, tuple[int, Candidate]]
    ) -> Iterator[tuple[int, Image, StoredArray]]:
        """Yield place, original and protected stored values of the wanted images of one file."""
        copy = self._workspace.output(file.target)
        if not copy.is_file() or file_sha256(copy) != file.output_sha256:
            raise InputError(
                "release-changed", "A protected copy is gone or changed; run `medveil-agent protect` again."
            )
        format_ = self._formats[file.format]
        left = dict(positions)
        with (
            tempfile.TemporaryDirectory(dir=self._workspace.private, prefix="check-") as scratch,
            format_.open(self._item(file), Path(scratch)) as frames,
            format_.read_back(copy) as written,
        ):
            for position, stored in enumerate(written):
                if position not in left:
                    continue
                place, candidate = left.pop(position)
                image = frames[candidate.frame]
                if image.digest.hex() != candidate.digest:
                    raise InputError(
                        "source-changed", "An original changed since it was protected; run `protect` again."
                    )
                yield place, image, np.array(stored)
                if not left:
                    return
