"""Before the first real run: is all in place, does it work on this site's images, how long will it take?

Every check is made even when an earlier one fails, as far as it can be. The last one protects three images of
the site end to end in a temporary folder. The forecast counts up from a second trial that fills the engine's
batches, because three images cost almost as much as a whole batch.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Final, TypeVar

from medveil.agent.engine import probe, resolve_device
from medveil.agent.formats import reading_formats, release_formats
from medveil.agent.imageio import Item, Listing, read_label_table, scan
from medveil.agent.job import Job, Outcome
from medveil.agent.ledger import Ledger
from medveil.agent.policy import load_policy
from medveil.agent.preparation import DRAWN_NOISE, Prepared, Wishes, open_trusted_bundle, prepare
from medveil.agent.protect import protect
from medveil.agent.sealing import SiteKey, load_site_key
from medveil.agent.segmentation import Annotations, ClassMap
from medveil.agent.workspace import LABELS_NAME
from medveil.models.bundle import Bundle
from medveil.models.errors import ExitCode, InputError, MedveilError

__all__ = ["Check", "Diagnosis", "Forecast", "diagnose"]

_TRIAL_IMAGES: Final = 3
_FORECAST_IMAGES: Final = 64
"""Enough to fill the engine's batches on eight threads; our choice."""
_FORECAST_S: Final = 20.0
"""Longest that the second trial should take; our choice."""
_HOUR_S: Final = 3600.0
_LEDGER_BYTES_PER_IMAGE: Final = 600
"""One row and two lines of the audit log; measured on a job of 5,856 images."""

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        ok: whether it is as it should be.
        detail: what was found, or what to do.
        code: the error's code when it isn't.
        exit_code: what the command ends with because of it.
    """

    name: str
    ok: bool
    detail: str
    code: str = ""
    exit_code: ExitCode = ExitCode.OK


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the whole source will take, counted up from the trial.

    Attributes:
        images: images of the source.
        hours: time.
        release_bytes: size of the protected copies.
        private_bytes: size of the sealed sidecars, the ledger, and what unfinished files need.
        free_bytes: what the disk has left now.
    """

    images: int
    hours: float
    release_bytes: int
    private_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All checks, and the forecast if the trial succeeded."""

    checks: tuple[Check, ...]
    forecast: Forecast | None

    @property
    def exit_code(self) -> ExitCode:
        """The first failed check's exit code, or success."""
        return next((check.exit_code for check in self.checks if not check.ok), ExitCode.OK)


def diagnose(
    source: Path, wishes: Wishes, *, labels_file: Path | None, out: Path, now: datetime
) -> Diagnosis:
    """Check the bundle, the engine, the key, the source and the disk; then protect three images.

    Args:
        source: the site's folder or file; opened read-only.
        wishes: as `protect` would get them.
        labels_file: the labels CSV, if it is not in the source.
        out: where the release would go; decides which disk is measured.
        now: what the trial's protected copies give as their time.
    """
    checks: list[Check] = []
    bundle = _checked(
        "bundle",
        checks,
        lambda: open_trusted_bundle(wishes.bundle, load_policy(wishes.policy)),
        _describe_bundle,
    )
    prepared = None
    if bundle is not None:
        prepared = _checked(
            "surrogates", checks, lambda: prepare(wishes), lambda found: _describe_surrogates(found, wishes)
        )
    key = _checked("site key", checks, lambda: load_site_key(create=True), lambda key: f"{key.recipient}")
    class_map = None if prepared is None else prepared.class_map
    found = _checked("source", checks, lambda: _read(source, labels_file, class_map), _describe_source)
    if prepared is None or key is None or found is None:
        return Diagnosis(tuple(checks), None)

    with tempfile.TemporaryDirectory(prefix="medveil-doctor-") as folder:
        trial = _Trial(prepared, key, found, labels_file or source / LABELS_NAME, now, Path(folder))
        outcome = _checked("trial on three images", checks, lambda: trial.run(_TRIAL_IMAGES), _describe_trial)
        if outcome is None:
            return Diagnosis(tuple(checks), None)
        if outcome.totals.verified < outcome.totals.images:
            checks[-1] = replace(checks[-1], ok=False, code="trial", exit_code=ExitCode.PARTIAL)
        if not outcome.totals.verified:
            return Diagnosis(tuple(checks), None)
        affordable = int(_FORECAST_S / outcome.seconds * outcome.totals.images)
        images = min(affordable, _FORECAST_IMAGES, found.images)
        if images > outcome.totals.images:
            outcome = trial.run(images)
        forecast = _forecast(found, outcome, out)
    checks.append(_disk_check(forecast))
    return Diagnosis(tuple(checks), forecast)


def _checked(
    name: str, checks: list[Check], look: Callable[[], _Found], describe: Callable[[_Found], str]
) -> _Found | None:
    try:
        found = look()
    except MedveilError as error:
        checks.append(Check(name, False, error.public, error.code, error.exit_code))
        return None
    checks.append(Check(name, True, describe(found)))
    return found


def _describe_bundle(bundle: Bundle) -> str:
    return f"intact; signed by {bundle.signer}: compare it with your coordinator unless the policy names it"


def _describe_surrogates(prepared: Prepared, wishes: Wishes) -> str:
    names = [entry.name for entry in prepared.bundle.manifest.surrogates]
    if prepared.class_map is not None:
        generators = len(prepared.bundle.manifest.graphs)
        if not generators:
            return DRAWN_NOISE
        return f"{generators} noise generators admitted; they run forward only"
    if not names:
        return "none needed by this method"
    golden = sum(prepared.bundle.golden(name) is not None for name in names)
    machine = probe()
    return (
        f"{len(names)} admitted; every session passed its gradient checks, {golden or 'none'} of them a golden "
        f"vector of the coordinator's as well; they run on {resolve_device(wishes.device)} "
        f"(onnxruntime {machine.runtime_version}, {wishes.threads or machine.threads} threads)"
    )


def _describe_source(source: _Source) -> str:
    items = source.listing.items
    files = sum(item.frames > 0 for item in items)
    beside = f", {len(items) - files} files beside them (masks, DICOM objects)" if len(items) > files else ""
    return (
        f"{source.images} images in {files} files{beside}; cannot be used: {len(source.listing.quarantined)}"
    )


def _describe_trial(outcome: Outcome) -> str:
    totals = outcome.totals
    reasons = ", ".join(f"{reason}: {count}" for reason, count in totals.quarantined.items())
    found = f"{totals.verified} of {totals.images} verified in {outcome.seconds:.1f} s"
    if not reasons:
        return found
    with Ledger(outcome.workspace.ledger_path) as ledger:
        _, first = ledger.quarantined()[0]
    return f"{found} ({reasons}). {first.sentence}"


@dataclass(frozen=True, slots=True)
class _Source:
    """What the site's folder holds, its masks told apart from its images where the bundle asks for masks."""

    listing: Listing
    annotations: Annotations | None

    @property
    def images(self) -> int:
        return sum(item.frames for item in self.listing.items)


def _read(source: Path, labels_file: Path | None, class_map: ClassMap | None) -> _Source:
    listing = scan(source, reading_formats(), labels_file=labels_file)
    annotations = None if class_map is None else Annotations(listing, class_map)
    found = _Source(listing if annotations is None else annotations.listing, annotations)
    if not found.images:
        raise InputError("nothing-found", "There is no image in the source; check the path.")
    return found


class _Trial:
    """A real job on copies of a few of the site's files, without the policy's further recipients."""

    def __init__(
        self, prepared: Prepared, key: SiteKey, source: _Source, labels: Path, now: datetime, folder: Path
    ) -> None:
        self._prepared = prepared
        self._recipient = key.recipient
        self._source = source
        self._labels = labels
        self._now = now
        self._folder = folder
        self._formats = release_formats(prepared, key, now)

    def run(self, images: int) -> Outcome:
        """Protect about so many images in a folder of their own.

        Raises:
            MedveilError: as `protect` does.
        """
        place = Path(tempfile.mkdtemp(dir=self._folder))
        items = _trial_items(self._source.listing, images)
        self._copy([*items, *self._masks_of(items)], images, place / "source")
        prepared = self._prepared
        job = Job(
            source=place / "source",
            release=place / "release",
            private=None,
            labels_file=None,
            formats=self._formats,
            allows_format=prepared.policy.allows_format,
            taxonomy=prepared.taxonomy,
            perturber=prepared.perturber,
            budget=prepared.budget,
            minimum_psnr_db=prepared.policy.minimum_psnr_db,
            recipients=(self._recipient,),
            settings=prepared.settings,
            begun=self._now,
            invocation={},
            class_map=prepared.class_map,
        )
        return protect(job)

    def _masks_of(self, items: Sequence[Item]) -> list[Item]:
        """Return the files that mark structures in some images, each once."""
        annotations = self._source.annotations
        if annotations is None:
            return []
        masks = {mask.relative: mask for item in items for mask in annotations.mask_files(item)}
        return list(masks.values())

    def _copy(self, items: Sequence[Item], images: int, target: Path) -> None:
        """Copy files, the first rows of an NPZ, and their lines of the labels file."""
        by_name = {format_.name: format_ for format_ in self._formats}
        for item in items:
            copy = target / item.relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            if item.splittable and item.frames > images:
                with by_name[item.format].open(item, target.parent) as frames:
                    rows = range(images)
                    by_name[item.format].write(item, rows, (frames[row].pixels for row in rows), copy)
            else:
                shutil.copyfile(item.path, copy)
        if self._labels.is_file():
            table = read_label_table(self._labels)
            with (target / LABELS_NAME).open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["file", "label"])
                writer.writerows([str(i.relative), table.labels.get(i.relative, "")] for i in items)


def _trial_items(listing: Listing, images: int) -> list[Item]:
    """Return files of so many images (one file, if it holds them all), from as many folders as there are."""
    files = [item for item in listing.items if item.frames]
    by_folder: dict[str, list[Item]] = {}
    for item in files:
        by_folder.setdefault(str(item.relative.parent), []).append(item)
    turns = (item for turn in zip_longest(*by_folder.values()) for item in turn if item is not None)
    chosen: list[Item] = []
    for item in turns:
        if sum(other.frames for other in chosen) < images:
            chosen.append(item)
    return chosen


def _forecast(source: _Source, outcome: Outcome, out: Path) -> Forecast:
    """Count up from the trial: time by image, disk by stored value."""
    images = source.images
    trial = outcome.totals.images
    sizes = [_folder_bytes(outcome.workspace.release), _folder_bytes(outcome.workspace.private / "sidecars")]
    spool = max((4 * item.pixels for item in source.listing.items if item.frames > 1), default=0)
    ledger = int(images * _LEDGER_BYTES_PER_IMAGE)
    return Forecast(
        images=images,
        hours=outcome.seconds / trial * images / _HOUR_S,
        release_bytes=int(sizes[0] / trial * images),
        private_bytes=int(sizes[1] / trial * images) + spool + ledger,
        free_bytes=shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free,
    )


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _disk_check(forecast: Forecast) -> Check:
    needed = forecast.release_bytes + forecast.private_bytes
    detail = f"about {needed / 1e6:,.0f} MB needed, {forecast.free_bytes / 1e6:,.0f} MB free"
    if needed > forecast.free_bytes:
        return Check("disk", False, detail, "disk-full", ExitCode.STORAGE)
    return Check("disk", True, detail)
