"""Before the first image: what the source holds now, against what earlier runs of the job have done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

from medveil.agent.imageio import Item, Listing
from medveil.agent.labelling import LABEL_REASONS, Labeller
from medveil.agent.ledger import FileEntry, FileRow, FileState, ImageState, Ledger
from medveil.agent.segmentation import Annotations, files_of
from medveil.agent.spool import Spool
from medveil.agent.workspace import Workspace
from medveil.models.disk import changed_ns, check_free, disk_errors, file_sha256

__all__ = ["Intake"]

_INTEGER: Final = 2**63
"""What an SQLite integer holds; the sum of six modern times in nanoseconds is more."""


class Intake:
    """Brings the ledger up to date with the source and the release folder, and says what is left to do."""

    def __init__(
        self,
        workspace: Workspace,
        ledger: Ledger,
        labeller: Labeller,
        annotations: Annotations | None = None,
    ) -> None:
        self._workspace = workspace
        self._ledger = ledger
        self._labeller = labeller
        self._annotations = annotations

    def pending(self, listing: Listing, retry: Callable[[str], bool]) -> list[tuple[FileRow, Item]]:
        """Return the files that need work, by path.

        Args:
            listing: the source, as it is now.
            retry: for which quarantine reasons another try is made.

        Raises:
            StorageError: ``disk-full``: what is left to do cannot fit.
        """
        items = {item.relative: item for item in listing.items}
        self._enter(listing)
        self._recheck(items)
        self._retry(items, retry)
        self._reconsider_masks(items)
        self._forget(listing)
        todo = [
            (file, items[file.relative]) for file in self._ledger.files() if file.state is not FileState.DONE
        ]
        self._sweep([file for file, _ in todo])
        self._check_space([item for _, item in todo])
        return todo

    def _enter(self, listing: Listing) -> None:
        """Enter the source into the ledger; files that changed since an earlier run start over."""
        with self._ledger.transaction():
            for item in listing.items:
                files = files_of(item, self._annotations)  # sums tell, and no other place needs them
                entry = FileEntry(
                    item.relative,
                    item.target,
                    item.format,
                    item.frames,
                    sum(file.size_bytes for file in files),
                    sum(changed_ns(file.path) for file in files) % _INTEGER,
                )
                self._remove(self._ledger.register(entry))
            for bad in listing.quarantined:
                self._remove(self._ledger.register_quarantined(bad.relative, bad.code, bad.public))
            for relative in self._named_but_missing(listing):
                self._ledger.register_quarantined(
                    relative, "missing-file", "The labels file names an image that is not there."
                )

    def _named_but_missing(self, listing: Listing) -> list[PurePosixPath]:
        """Return the paths that the labels file names and the source does not hold."""
        return sorted(set(self._labeller.table.labels) - _present(listing)) if self._labeller.table else []

    def _forget(self, listing: Listing) -> None:
        """Drop what is no longer in the source and was never released."""
        present = _present(listing).union(self._named_but_missing(listing))
        with self._ledger.transaction():
            leftovers = self._ledger.forget_missing(present)
        for target in leftovers:
            self._remove(target)

    def _remove(self, target: PurePosixPath | None) -> None:
        """Take back a protected copy that no file of the source stands behind any more."""
        if target is not None:
            with disk_errors():
                self._workspace.output(target).unlink(missing_ok=True)

    def _recheck(self, items: Mapping[PurePosixPath, Item]) -> None:
        """Send back what can't be relied on: released files that are gone or changed, and half-done work."""
        lost = []
        for file in self._ledger.files():
            if file.state is FileState.DONE:
                if file.output_sha256 is not None and not self._is_released(file):
                    lost.append((file, "output-missing"))
                elif file.relative in items and self._label_changed(file, items[file.relative]):
                    lost.append((file, "label-changed"))
            elif not self._is_resumable(file):
                lost.append((file, "resumed"))
        with self._ledger.transaction():
            for file, event in lost:
                self._ledger.reopen_file(file.id, event)

    def _retry(self, items: Mapping[PurePosixPath, Item], retry: Callable[[str], bool]) -> None:
        """Send quarantined images back: the steward dealt with the reason, or a label came."""
        chosen = {}
        for file, image in self._ledger.quarantined():
            item, reason = items.get(file.relative), image.reason or ""
            if item is None:
                continue
            labelled = (
                self._annotations is None
                and reason in LABEL_REASONS
                and not item.splittable
                and self._labeller.known_class(item) is not None
            )
            if labelled or retry(reason):
                chosen[file.id] = file
        with self._ledger.transaction():
            for file in chosen.values():
                self._ledger.reopen_file(file.id, "retry")

    def _reconsider_masks(self, items: Mapping[PurePosixPath, Item]) -> None:
        """Send back masks whose images are worked on in this run, or were left out: a mask goes where they go."""
        if self._annotations is None:
            return
        files = {file.relative: file for file in self._ledger.files()}
        with self._ledger.transaction():
            for relative in files.keys() & items.keys():
                mask, images = files[relative], self._annotations.images_of(items[relative])
                if not images or mask.state is not FileState.DONE:
                    continue
                done = [files[image].state is FileState.DONE for image in images]
                released = [files[image].output_sha256 is not None for image in images]
                if not all(done) or (mask.output_sha256 is not None and not any(released)):
                    self._ledger.reopen_file(mask.id, "mask-reconsidered")

    def _is_released(self, file: FileRow) -> bool:
        output = self._workspace.output(file.target)
        sealed = file.frames == 0 or self._workspace.sidecar(file.target).is_file()
        return sealed and output.is_file() and file_sha256(output) == file.output_sha256

    def _label_changed(self, file: FileRow, item: Item) -> bool:
        """Return whether the labels file now gives a released image another class, or none."""
        if self._labeller.table is None or file.output_sha256 is None or item.splittable or item.frames == 0:
            return False
        receipt = self._ledger.images(file.id)[0].receipt
        index = self._labeller.known_class(item)
        return index is None or (receipt is not None and index != receipt.class_index)

    def _is_resumable(self, file: FileRow) -> bool:
        """Return whether what the ledger says about an unfinished file can be relied on."""
        offsets = [
            image.spool_offset
            for image in self._ledger.images(file.id)
            if image.state is ImageState.PROTECTED
        ]
        if not offsets:
            return True
        path = self._workspace.spool_file(file.id)
        if not path.exists() or None in offsets:
            return False
        with Spool(path) as spool:
            return all(spool.holds(offset) for offset in offsets if offset is not None)

    def _sweep(self, unfinished: Sequence[FileRow]) -> None:
        """Remove the pixels of files that were finished, or forgotten, just before a kill."""
        needed = {self._workspace.spool_file(file.id) for file in unfinished}
        with disk_errors():
            for path in self._workspace.spool.iterdir():
                if path not in needed:
                    path.unlink()

    def _check_space(self, items: Sequence[Item]) -> None:
        """Refuse to begin when the release, the sidecars and the spool can't fit.

        A stored value takes two bytes at most; noise hardly compresses, and a sealed difference takes
        less than the copy it belongs to.
        """
        copies = sum(2 * item.pixels for item in items)
        largest = max((2 * 2 * item.pixels for item in items if item.frames > 1), default=0)
        check_free(self._workspace.release, copies)
        check_free(self._workspace.private, copies // 2 + largest)


def _present(listing: Listing) -> frozenset[PurePosixPath]:
    return frozenset([i.relative for i in listing.items] + [q.relative for q in listing.quarantined])
