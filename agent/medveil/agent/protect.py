"""The site's main job: every image is read, perturbed, bounded, written, read back and accounted for.

The story of one image:

    read -> label -> perturb (the method's wish) -> enforce the budget (in stored integers)
         -> write under a temporary name -> read back -> compare with what was meant
         -> seal what restores it -> final name -> receipt `verified`

Kill it anywhere and run it again: the ledger says what is done, nothing is repeated and nothing lost. A file
has its final name only when all of this holds for every image in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from medveil.agent.batching import Queue, Work, subject_of
from medveil.agent.budget import Budget, enforce, may_move, measure
from medveil.agent.disk import disk_errors
from medveil.agent.imageio import (
    Frames,
    Image,
    Item,
    Listing,
    Quarantined,
    StoredArray,
    read_label_table,
    scan,
)
from medveil.agent.intake import Intake
from medveil.agent.job import Job, Outcome, Unwatched, Watch, settings_digest
from medveil.agent.labelling import Labeller
from medveil.agent.ledger import FINAL_STATES, FileRow, ImageRow, ImageState, Ledger, Receipt
from medveil.agent.release_file import FileWriter
from medveil.agent.release_lists import publish_lists
from medveil.agent.spool import Spool
from medveil.agent.workspace import LABELS_NAME, Workspace, open_workspace
from medveil.models.errors import ImageError, InputError

__all__ = ["Job", "Outcome", "Watch", "protect"]

_WHOLE_RANGE: Final = Budget(epsilon=255.0, mask=1.0)
"""A budget that allows everything: what cannot move even so is padding."""


@dataclass(frozen=True, slots=True)
class _Protected:
    """One image with its protected stored values."""

    work: Work
    pixels: StoredArray
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """One image that is not released, and why."""

    work: Work
    state: ImageState
    reason: str
    sentence: str


def protect(
    job: Job, watch: Watch | None = None, *, retry: Callable[[str], bool] = lambda reason: False
) -> Outcome:
    """Protect a source, or go on with one that was begun.

    Args:
        job: what to do.
        watch: who looks on.
        retry: for which quarantine reasons another try is made; none by default, because a file that has not
            changed fails again.

    Raises:
        InputError: the source is missing or holds nothing that could be protected.
        ConfigurationError: the folders lie inside one another, or the job was begun with other settings.
        StorageError: a disk is full or read-only, or a folder holds someone else's files.
        BusyError: another process works on the same job.
    """
    started = time.monotonic()
    labels_file = _labels_file(job)
    table = None if labels_file is None else read_label_table(labels_file)
    listing = _allowed(scan(job.source, job.formats, labels_file=labels_file), job)
    if not listing.items and not listing.quarantined:
        raise InputError("nothing-found", "There is no image in the source; check the path.")
    with open_workspace(job.source, job.release, job.private) as (workspace, ledger):
        ledger.bind(settings_digest(job.settings), job.settings)
        ledger.begin(job.begun)
        with ledger.transaction():
            ledger.set_meta("invocation", json.dumps(job.invocation))
            ledger.log("run-started", "", "")
        labeller = Labeller(job.taxonomy, table)
        todo = Intake(workspace, ledger, labeller).pending(listing, retry)
        run = _Run(job, workspace, ledger, labeller, watch or Unwatched())
        finished = run.all(todo)
        publish_lists(job, workspace, ledger, with_labels=table is not None)
        with ledger.transaction():
            ledger.log("run-finished", "", str(finished))
        return Outcome(workspace, ledger.totals(), listing.ignored, finished, time.monotonic() - started)


def _labels_file(job: Job) -> Path | None:
    beside = job.source / LABELS_NAME
    if job.labels_file is not None and not job.labels_file.is_file():
        raise InputError("no-labels-file", "There is no labels file at this path; check --labels.")
    return job.labels_file or (beside if beside.is_file() else None)


def _allowed(listing: Listing, job: Job) -> Listing:
    """Move the files whose format the policy doesn't allow into quarantine."""
    refused = [item for item in listing.items if not job.allows_format(item.format)]
    sentence = "This site's policy does not allow this file format; change the policy or leave the file out."
    entries = [Quarantined(item.relative, "format-not-allowed", sentence) for item in refused]
    kept = tuple(item for item in listing.items if job.allows_format(item.format))
    return Listing(kept, (*listing.quarantined, *entries), listing.ignored)


def _is_blank(image: Image) -> bool:
    """Return whether a frame shows nothing: one single value, or padding only."""
    constant = bool((image.pixels == image.pixels.flat[0]).all())
    return constant or not may_move(image, _WHOLE_RANGE).any()


class _Run:
    """One run of a job: the open ledger and folders, and what is waiting in memory."""

    def __init__(
        self, job: Job, workspace: Workspace, ledger: Ledger, labeller: Labeller, watch: Watch
    ) -> None:
        self._job = job
        self._workspace = workspace
        self._ledger = ledger
        self._labeller = labeller
        self._watch = watch
        self._formats = {format_.name: format_ for format_ in job.formats}
        digest = settings_digest(job.settings)
        self._writer = FileWriter(workspace, self._formats, job.recipients, digest)
        self._finished = 0

    def all(self, todo: Sequence[tuple[FileRow, Item]]) -> int:
        """Bring every image to a final state and return how many this run brought there."""
        totals = self._ledger.totals()
        self._watch.begin(totals.images, totals.images - totals.unfinished)
        queue = Queue()
        for file, item in todo:
            if item.frames == 1:
                self._read_single(file, item, queue)
                for batch in queue.full_batches():
                    self._single_files(batch)
            elif item.frames > 1:
                self._many_images(file, item)
        for batch in queue.remaining_batches():
            self._single_files(batch)
        for file, item in todo:
            if item.frames == 0:
                self._companion(file, item)
        return self._finished

    # Reading

    def _read_single(self, file: FileRow, item: Item, queue: Queue) -> None:
        try:
            with self._formats[item.format].open(item, self._workspace.scratch) as frames:
                image = frames[0]
            queue.put(Work(file, item, image, self._labeller.class_of(item, image)))
        except ImageError as error:
            self._leave_out_file(file, item, ImageState.QUARANTINED, error.code, error.public)

    def _unread(self, file: FileRow, item: Item, frames: Frames) -> Iterator[Work]:
        """Yield the images of an open file that still have to be perturbed; quarantine what cannot be."""
        for row in self._ledger.images(file.id):
            if row.state in FINAL_STATES or row.state is ImageState.PROTECTED:
                continue
            try:
                image = frames[row.frame]
                work = Work(file, item, image, self._labeller.class_of(item, image))
            except ImageError as error:
                with self._ledger.transaction():
                    self._ledger.mark_left_out(
                        file.id,
                        row.frame,
                        ImageState.QUARANTINED,
                        subject_of(item, row.frame),
                        error.code,
                        error.public,
                    )
                continue
            yield work

    # Perturbing

    def _perturbed(self, batch: Sequence[Work]) -> list[_Protected | _LeftOut]:
        """Perturb images of one size and bound each change; what doesn't fit is left out with a reason."""
        with self._ledger.transaction():
            for work in batch:
                self._ledger.mark_read(
                    work.file.id, work.image.frame, work.image.digest.hex(), work.class_index
                )
        return self._attempted(batch)

    def _attempted(self, batch: Sequence[Work]) -> list[_Protected | _LeftOut]:
        """Ask the method; where it refuses a batch, find the image that it refuses."""
        images = [work.image for work in batch]
        try:
            wanted = self._job.perturber.wanted(
                images, [work.class_index for work in batch], self._job.budget
            )
        except InputError as error:
            if len(batch) > 1:
                return [result for work in batch for result in self._attempted([work])]
            return [_LeftOut(batch[0], ImageState.QUARANTINED, error.code, error.public)]
        return [self._bounded(work, delta) for work, delta in zip(batch, wanted, strict=True)]

    def _bounded(self, work: Work, delta: npt.NDArray[np.float32]) -> _Protected | _LeftOut:
        image, budget = work.image, self._job.budget
        try:
            pixels = enforce(image, delta, budget, together=self._job.perturber.settings.colour == "luma")
            change = measure(image, pixels, budget)
        except ImageError as error:
            return _LeftOut(work, ImageState.QUARANTINED, error.code, error.public)
        psnr: float | None = change.psnr_db
        if not change.changed:
            if work.item.frames == 1 or work.item.splittable or not _is_blank(image):
                return _LeftOut(
                    work,
                    ImageState.NOT_PROTECTABLE,
                    "nothing-fits",
                    "No change fits into the budget; raise epsilon or widen the release window.",
                )
            psnr = None  # a blank frame among others: there is nothing in it to protect
        elif change.psnr_db < self._job.minimum_psnr_db:
            return _LeftOut(
                work,
                ImageState.NOT_PROTECTABLE,
                "below-minimum-psnr",
                "The change would show more than the policy allows; lower epsilon or the mask.",
            )
        receipt = Receipt(image.digest.hex(), work.class_index, psnr, change.epsilon_max, change.changed)
        return _Protected(work, pixels, receipt)

    def _mark_left_out(self, results: Sequence[_Protected | _LeftOut]) -> None:
        for left in results:
            if isinstance(left, _LeftOut):
                self._ledger.mark_left_out(
                    left.work.file.id,
                    left.work.image.frame,
                    left.state,
                    left.work.subject,
                    left.reason,
                    left.sentence,
                )

    # Files of one image: many per batch

    def _single_files(self, batch: Sequence[Work]) -> None:
        """Perturb and release a batch of one-image files."""
        results = self._perturbed(batch)
        done = [result for result in results if isinstance(result, _Protected)]
        with self._ledger.transaction():
            self._mark_left_out(results)
            for left in results:
                if isinstance(left, _LeftOut):
                    self._withdraw(left.work.file)
            for protected in done:
                self._ledger.mark_protected(protected.work.file.id, 0, protected.receipt, None)
            self._ledger.mark_writing(protected.work.file.id for protected in done)
        digests: list[tuple[str, str] | ImageError] = []
        for protected in done:
            try:
                digests.append(self._release_single(protected))
            except ImageError as error:
                digests.append(error)
        with self._ledger.transaction():
            for protected, written in zip(done, digests, strict=True):
                self._record_single(protected.work, written)
        self._count(len(batch))

    def _release_single(self, protected: _Protected) -> tuple[str, str]:
        image = protected.work.image
        return self._writer.write(
            protected.work.item, _InMemory(image), {0: lambda: protected.pixels}, [image.digest]
        )

    def _record_single(self, work: Work, written: tuple[str, str] | ImageError) -> None:
        if isinstance(written, ImageError):
            self._ledger.mark_left_out(
                work.file.id, 0, ImageState.QUARANTINED, work.subject, written.code, written.public
            )
            self._withdraw(work.file)
            return
        self._ledger.mark_verified(work.file.id, 0, work.subject)
        self._ledger.finish_file(work.file.id, output_sha256=written[0], clean_sha256=written[1])

    # Files of many images: spooled until all are done

    def _many_images(self, file: FileRow, item: Item) -> None:
        """Perturb the images of one file into its spool, then release the file as a whole."""
        try:
            with ExitStack() as stack:
                frames = stack.enter_context(self._formats[item.format].open(item, self._workspace.scratch))
                spool = stack.enter_context(Spool(self._workspace.spool_file(file.id)))
                queue = Queue()
                for work in self._unread(file, item, frames):
                    queue.put(work)
                    for batch in queue.full_batches():
                        self._spool(batch, spool)
                for batch in queue.remaining_batches():
                    self._spool(batch, spool)
                self._release_many(file, item, frames, spool)
        except ImageError as error:
            self._leave_out_file(file, item, ImageState.QUARANTINED, error.code, error.public)
        with disk_errors():
            self._workspace.spool_file(file.id).unlink(missing_ok=True)

    def _spool(self, batch: Sequence[Work], spool: Spool) -> None:
        results = self._perturbed(batch)
        offsets = [spool.append(r.pixels) if isinstance(r, _Protected) else None for r in results]
        spool.sync()
        with self._ledger.transaction():
            self._mark_left_out(results)
            for result, offset in zip(results, offsets, strict=True):
                if isinstance(result, _Protected):
                    frame = result.work.image.frame
                    self._ledger.mark_protected(result.work.file.id, frame, result.receipt, offset)
        self._count(len(batch))

    def _release_many(self, file: FileRow, item: Item, frames: Frames, spool: Spool) -> None:
        rows = self._ledger.images(file.id)
        ready = [row for row in rows if row.state is ImageState.PROTECTED]
        left_out = next((row for row in rows if row.state is not ImageState.PROTECTED), None)
        if left_out is not None and (not item.splittable or not ready):
            # A volume stands or falls as a whole: one clean slice among protected ones would be
            # training data.
            self._leave_out_file(file, item, left_out.state, left_out.reason or "", left_out.sentence or "")
            return
        with self._ledger.transaction():
            self._ledger.mark_writing([file.id])
        protected: dict[int, Callable[[], StoredArray]] = {}
        digests = []
        for row in rows:
            image = self._unchanged(frames, row)
            digests.append(image.digest)
            if row.state is ImageState.PROTECTED:
                place = (row.spool_offset or 0, image.pixels.shape, image.pixels.dtype)
                protected[row.frame] = partial(spool.read, *place)
        output, clean = self._writer.write(item, frames, protected, digests)
        with self._ledger.transaction():
            for row in ready:
                self._ledger.mark_verified(file.id, row.frame, subject_of(item, row.frame))
            self._ledger.finish_file(file.id, output_sha256=output, clean_sha256=clean)

    @staticmethod
    def _unchanged(frames: Frames, row: ImageRow) -> Image:
        """Return a frame, read once more.

        Raises:
            ImageError: ``source-changed``: it is not what the spooled pixels were made from.
        """
        image = frames[row.frame]
        if row.receipt is not None and image.digest.hex() != row.receipt.digest:
            raise ImageError("source-changed", "The source changed while it was being protected; run again.")
        return image

    def _leave_out_file(
        self, file: FileRow, item: Item, state: ImageState, reason: str, sentence: str
    ) -> None:
        """Leave out a whole file: every image of it, for one reason."""
        with self._ledger.transaction():
            moved = [row for row in self._ledger.images(file.id) if row.state not in FINAL_STATES]
            for row in moved:
                self._ledger.mark_left_out(
                    file.id, row.frame, state, subject_of(item, row.frame), reason, sentence
                )
            self._withdraw(file)
        self._count(len(moved))

    def _withdraw(self, file: FileRow) -> None:
        """Finish a file without a released copy; one from an earlier version of the source goes away."""
        with disk_errors():
            if file.ours:
                self._workspace.output(file.target).unlink(missing_ok=True)
        self._ledger.finish_file(file.id, output_sha256=None, clean_sha256=None)

    # Files of no image

    def _companion(self, file: FileRow, item: Item) -> None:
        """Carry over a file that holds no image of its own but belongs to those that do."""
        with self._ledger.transaction():
            self._ledger.mark_writing([file.id])
        try:
            output, clean = self._writer.write(item, (), {}, [])
        except ImageError as error:
            with self._ledger.transaction():
                self._withdraw(file)
                self._ledger.register_quarantined(item.relative, error.code, error.public)
            return
        with self._ledger.transaction():
            self._ledger.finish_file(file.id, output_sha256=output, clean_sha256=clean)

    def _count(self, images: int) -> None:
        self._finished += images
        self._watch.advance(images)


@dataclass(frozen=True, slots=True)
class _InMemory:
    """The frames of a one-image file that has been read already."""

    image: Image

    def __len__(self) -> int:
        return 1

    def __getitem__(self, frame: int) -> Image:
        return self.image
