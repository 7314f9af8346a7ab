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
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from medveil.agent.batching import Queue, Work, subject_of
from medveil.agent.budget import Budget, enforce, measure, room
from medveil.agent.crash_note import DECODER_CRASH, CrashNote, crash_note
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
from medveil.agent.labelling import Labeller, labels_file
from medveil.agent.ledger import FINAL_STATES, FileRow, ImageRow, ImageState, Ledger, Receipt
from medveil.agent.release_file import FileWriter
from medveil.agent.release_lists import publish_lists
from medveil.agent.segmentation import Annotations, LabelMap, MaskedPerturber, files_of
from medveil.agent.spool import Spool
from medveil.agent.workspace import Workspace, open_workspace
from medveil.models.disk import disk_errors
from medveil.models.errors import ImageError, InputError
from medveil.models.methods.oracle import FloatArray

__all__ = ["Job", "Outcome", "Watch", "protect"]

_WHOLE_RANGE: Final = Budget(epsilon=255.0, mask=1.0)
"""A budget that allows everything: what cannot move even so is padding."""

_NOTHING_FITS: Final = (
    "nothing-fits",
    "No change fits into the budget; raise epsilon or widen the release window.",
)


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
    labels = _labels_file(job)
    table = None if labels is None else read_label_table(labels)
    listing = _allowed(scan(job.source, job.formats, labels_file=labels), job)
    annotations = None if job.class_map is None else Annotations(listing, job.class_map)
    if annotations is not None:
        listing = annotations.listing
    if not listing.items and not listing.quarantined:
        raise InputError("nothing-found", "There is no image in the source; check the path.")
    with open_workspace(job.source, job.release, job.private) as (workspace, ledger):
        ledger.bind(settings_digest(job.settings), job.settings)
        ledger.begin(job.begun)
        with ledger.transaction():
            ledger.set_meta("invocation", json.dumps(job.invocation))
            ledger.log("run-started", "", "")
        labeller = Labeller(job.taxonomy, table)
        todo = Intake(workspace, ledger, labeller, annotations).pending(listing, retry)
        decoded = partial(files_of, annotations=annotations)
        with crash_note(workspace, ledger, decoded, forget=retry(DECODER_CRASH)) as note:
            run = _Run(job, workspace, ledger, labeller, annotations, note, watch or Unwatched())
            finished = run.all(todo)
        publish_lists(job, workspace, ledger, with_labels=table is not None)
        with ledger.transaction():
            ledger.log("run-finished", "", str(finished))
        seconds = time.monotonic() - started
        return Outcome(workspace, ledger.totals(), listing.ignored, finished, seconds, annotations)


def _labels_file(job: Job) -> Path | None:
    if job.class_map is not None:
        return None  # masks are the labels; a table beside them says something else
    return labels_file(job.source, job.labels_file)


def _allowed(listing: Listing, job: Job) -> Listing:
    """Move the files whose format the policy doesn't allow into quarantine."""
    refused = [item for item in listing.items if not job.allows_format(item.format)]
    sentence = "This site's policy does not allow this file format; change the policy or leave the file out."
    entries = [Quarantined(item.relative, "format-not-allowed", sentence) for item in refused]
    kept = tuple(item for item in listing.items if job.allows_format(item.format))
    return Listing(kept, (*listing.quarantined, *entries), listing.ignored)


def _may_stay(work: Work) -> bool:
    """Return whether an image may be released unchanged, because there is nothing in it to protect.

    That is a blank frame among others, or a slice in which no structure is marked. A slice of a marked volume may
    stay too, as long as another one changes: see ``_release_many``.
    """
    if work.mask is not None:
        return work.mask.is_empty or work.item.frames > 1
    return work.item.frames > 1 and not work.item.splittable and _is_blank(work.image)


def _is_blank(image: Image) -> bool:
    """Return whether a frame shows nothing: one single value, or padding only."""
    constant = bool((image.pixels == image.pixels.flat[0]).all())
    return constant or not any(side.any() for side in room(image, _WHOLE_RANGE))


class _Run:
    """One run of a job: the open ledger and folders, and what is waiting in memory."""

    def __init__(
        self,
        job: Job,
        workspace: Workspace,
        ledger: Ledger,
        labeller: Labeller,
        annotations: Annotations | None,
        note: CrashNote,
        watch: Watch,
    ) -> None:
        self._job = job
        self._workspace = workspace
        self._ledger = ledger
        self._labeller = labeller
        self._annotations = annotations
        self._note = note
        self._watch = watch
        self._formats = {format_.name: format_ for format_ in job.formats}
        digest = settings_digest(job.settings)
        self._writer = FileWriter(workspace, self._formats, job.recipients, digest)
        self._finished = 0
        self._series = None
        if isinstance(job.perturber, MaskedPerturber) and job.perturber.takes_volumes and annotations:
            self._series = annotations.change_in_series(job.perturber, self._read_image)

    @property
    def _together(self) -> bool:
        """Whether the channels of a pixel move together; a generator's bounded answer is taken channel by channel."""
        perturber = self._job.perturber
        return not isinstance(perturber, MaskedPerturber) and perturber.settings.colour == "luma"

    def all(self, todo: Sequence[tuple[FileRow, Item]]) -> int:
        """Bring every image to a final state and return how many this run brought there."""
        totals = self._ledger.totals()
        self._watch.begin(totals.images, totals.images - totals.unfinished)
        queue = Queue()
        for file, item in todo if self._series is None else sorted(todo, key=self._slab_order):
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

    def _slab_order(self, entry: tuple[FileRow, Item]) -> tuple[int, int]:
        return (0, 0) if self._series is None else self._series.place(entry[1])

    # Reading

    def _open(self, item: Item) -> AbstractContextManager[Frames]:
        return self._note.frames(self._formats[item.format], item, self._workspace.scratch)

    def _read_image(self, item: Item) -> Image:
        with self._open(item) as frames:
            return frames[0]

    def _read_single(self, file: FileRow, item: Item, queue: Queue) -> None:
        of_volume = None if self._series is None else self._series.of(item)
        try:
            queue.put(self._work(file, item, self._read_image(item), of_volume))
        except ImageError as error:
            self._leave_out_file(file, item, ImageState.QUARANTINED, error.code, error.public)

    def _work(
        self, file: FileRow, item: Item, image: Image, of_volume: Callable[[int], FloatArray] | None = None
    ) -> Work:
        """Return an image with its label or its mask.

        Raises:
            ImageError: it has none, or one that nothing can be done with.
        """
        if self._annotations is None:
            return Work(file, item, image, self._labeller.class_of(item, image))
        mask = self._mask_of(self._annotations, item, image)
        return Work(file, item, image, mask.main_class, mask, of_volume)

    def _mask_of(self, annotations: Annotations, item: Item, image: Image) -> LabelMap:
        with self._note.reading(item):
            return annotations.label_map(item, image)

    def _unread(self, file: FileRow, item: Item, frames: Frames) -> Iterator[Work]:
        """Yield the images of an open file that still have to be perturbed; quarantine what cannot be."""
        of_volume = self._change_of_volume(item, frames)
        for row in self._ledger.images(file.id):
            if row.state in FINAL_STATES or row.state is ImageState.PROTECTED:
                continue
            try:
                image = frames[row.frame]
                work = self._work(file, item, image, of_volume)
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

    def _change_of_volume(self, item: Item, frames: Frames) -> Callable[[int], FloatArray] | None:
        """Return what the slices of a file should change by, where generators look across slices."""
        perturber, annotations = self._job.perturber, self._annotations
        if not isinstance(perturber, MaskedPerturber) or annotations is None or not perturber.takes_volumes:
            return None
        return perturber.of_volume(frames, lambda image: self._mask_of(annotations, item, image)).of_slice

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
        try:
            wanted = self._wanted(batch)
        except InputError as error:
            if len(batch) > 1:
                return [result for work in batch for result in self._attempted([work])]
            return [_LeftOut(batch[0], ImageState.QUARANTINED, error.code, error.public)]
        return [self._bounded(work, delta) for work, delta in zip(batch, wanted, strict=True)]

    def _wanted(self, batch: Sequence[Work]) -> list[FloatArray]:
        images, perturber = [work.image for work in batch], self._job.perturber
        if not isinstance(perturber, MaskedPerturber):
            return list(perturber.wanted(images, [work.class_index for work in batch], self._job.budget))
        changes = [work.of_volume(work.image.frame) for work in batch if work.of_volume is not None]
        if len(changes) == len(batch):
            return changes
        return list(perturber.wanted(images, [work.mask for work in batch if work.mask is not None]))

    def _bounded(self, work: Work, delta: npt.NDArray[np.float32]) -> _Protected | _LeftOut:
        image, budget = work.image, self._job.budget
        try:
            pixels = enforce(image, delta, budget, together=self._together)
            change = measure(image, pixels, budget)
        except ImageError as error:
            return _LeftOut(work, ImageState.QUARANTINED, error.code, error.public)
        psnr: float | None = change.psnr_db
        if not change.changed:
            if not _may_stay(work):
                return _LeftOut(
                    work,
                    ImageState.NOT_PROTECTABLE,
                    *_NOTHING_FITS,
                )
            psnr = None
        elif change.psnr_db < self._job.minimum_psnr_db:
            return _LeftOut(
                work,
                ImageState.NOT_PROTECTABLE,
                "below-minimum-psnr",
                "The change would show more than the policy allows; lower epsilon or the mask.",
            )
        receipt = Receipt(
            image.digest.hex(),
            work.class_index,
            psnr,
            change.epsilon_max,
            change.changed,
            image.window.guessed,
        )
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
        image, item = protected.work.image, protected.work.item
        with self._note.reading(item):
            return self._writer.write(item, _InMemory(image), {0: lambda: protected.pixels}, [image.digest])

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
                frames = stack.enter_context(self._open(item))
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
        if self._annotations is not None and not any(row.receipt and row.receipt.changed for row in ready):
            self._leave_out_file(file, item, ImageState.NOT_PROTECTABLE, *_NOTHING_FITS)
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
        with self._note.reading(item):
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
        """Carry over a file that holds no image of its own but belongs to those that do; a mask with its image.

        A mask is copied as it is: what nobody could read as one may be anything, the original image, too.
        """
        images = frozenset() if self._annotations is None else self._annotations.images_of(item)
        if images and not self._ledger.any_released(images):
            with self._ledger.transaction():
                self._withdraw(file)
            return
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
