"""The whole check of a release with masks: draw images, train U-Nets on originals and on copies, judge by overlap.

verified images -> split by patient -> patches -> (architecture x seed) x (clean | protected) -> Dice, also under the
best thresholds -> word

Volumes are checked slice by slice, whatever their noise was made with: that is what a site has the time for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from medveil.agent.engine import Resources
from medveil.agent.formats import reading_formats
from medveil.agent.imageio import Taxonomy
from medveil.agent.policy import SitePolicy, load_policy
from medveil.agent.preparation import open_trusted_bundle
from medveil.agent.release_job import ledger_of, recorded_call
from medveil.agent.segmentation.label_map import ClassMap
from medveil.agent.segmentation.site_check.networks import ARCHITECTURES, draw_segmenter
from medveil.agent.segmentation.site_check.pairs import MaskedPairs, MaskedReader, of_one_size
from medveil.agent.segmentation.site_check.record import keep_masked_check
from medveil.agent.segmentation.site_check.sample import drawn
from medveil.agent.segmentation.site_check.training import SCHEDULE, Scoring, train_segmenter
from medveil.agent.segmentation.site_check.verdict import MaskedFinding, MaskedSiteCheck, by_unit, finding_of
from medveil.agent.victim_check.record import check_bundle, release_digest
from medveil.agent.victim_check.runs import Progress, Rounds, Run, finished_rounds
from medveil.agent.victim_check.training import MEMORY_PER_VICTIM_BYTES, Schedule
from medveil.agent.victim_check.verdict import FEWEST_SEEDS
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.bundle import Manifest
from medveil.models.errors import ConfigurationError
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.segmentation import SEGMENTATION_METHODS
from medveil.models.quality.filters import blurred
from medveil.models.quality.segmentation import constant_mask_dice

__all__ = ["MaskedCheckSettings", "check_masked_release", "check_patches", "has_masks"]

Scores = tuple[Scoring, ...]
"""Of one victim, on the way and after its last step."""


@dataclass(frozen=True, kw_only=True)
class MaskedCheckSettings:
    """How much is tried.

    Attributes:
        architectures: victims, of `ARCHITECTURES`.
        seeds: runs of each victim on each kind of image.
        schedule: how each of them trains.
        most_images: of the site's verified images or slices, training and hold-out together.
        training_patches, hold_out_patches: about so many are cut from them.
        limit_s: time for all victims; seeds that it cuts off don't count.
        threads: victims trained at once; None takes every processor thread.
        seed: of the draw, the weights and the orders.
    """

    architectures: tuple[str, ...] = ARCHITECTURES
    seeds: int = FEWEST_SEEDS
    schedule: Schedule = field(default=SCHEDULE)
    most_images: int = 400
    training_patches: int = 240
    hold_out_patches: int = 120
    limit_s: float = 1800.0
    threads: int | None = None
    seed: int = 0


def has_masks(release: Path, private: Path | None = None) -> bool:
    """Return whether a release was made by a method for images with masks.

    Raises:
        InputError: as `ledger_of`.
    """
    with ledger_of(release, private) as ledger:
        recorded = ledger.meta("settings")
    return recorded is not None and json.loads(recorded).get("method") in SEGMENTATION_METHODS


def check_masked_release(
    release: Path,
    private: Path | None = None,
    *,
    bundle: Path | None = None,
    policy: Path | None = None,
    settings: MaskedCheckSettings | None = None,
    progress: Progress = lambda done, total: None,
) -> MaskedSiteCheck:
    """Check a release with the site's own images and masks, and keep the result beside it.

    Nothing leaves: originals, masks and copies are read where they lie, victims are trained here and forgotten.

    Args:
        release: folder of the protected copies.
        private: its private folder; None: beside it.
        bundle: what it was made with; None: as its last run says.
        policy: likewise.
        settings: how much is tried.
        progress: who looks on.

    Raises:
        InputError: ``too-few-images``, ``source-missing``, ``source-changed``, ``release-changed``, or as
            `ledger_of`.
        ConfigurationError: ``other-bundle``, ``time-limit``, ``task``.
        RefusedError: the bundle can't be trusted, or onnxruntime computes nonsense.
    """
    settings = settings or MaskedCheckSettings()
    call = recorded_call(release, private)
    site_policy = load_policy(policy or call.wishes.policy)
    opened = open_trusted_bundle(bundle or call.wishes.bundle, site_policy)
    manifest = opened.manifest
    _check_task(manifest)
    workspace = Workspace(release, private or private_beside(release))
    with ledger_of(release, private) as ledger:
        check_bundle(ledger, opened.digest)
        about = release_digest(ledger)
        names = ClassMap(_taxonomy(manifest, site_policy), site_policy.segmentation.aliases)
        reader = MaskedReader(workspace, ledger, call.source, reading_formats(site_policy.windows), names)
        split = drawn(reader.candidates(), reader.units, seed=settings.seed, most=settings.most_images)
        channels = manifest.input.channels
        training, hold_out = of_one_size(
            reader.patches(split.training, settings.training_patches, channels),
            reader.patches(split.hold_out, settings.hold_out_patches, channels),
        )
    check = check_patches(
        training,
        hold_out,
        classes=len(manifest.taxonomy.classes),
        about=about,
        settings=settings,
        progress=progress,
    )
    keep_masked_check(workspace, check)
    return check


def check_patches(
    training: MaskedPairs,
    hold_out: MaskedPairs,
    *,
    classes: int,
    about: str,
    settings: MaskedCheckSettings,
    progress: Progress = lambda done, total: None,
) -> MaskedSiteCheck:
    """Train every victim on clean and on protected patches, and say what they find in clean ones.

    What counts is what somebody recovers who moves their thresholds, above what a constant mask finds: that much
    takes no image. The first victim is then tried again on patches that were all blurred, as far as the time goes.

    Args:
        training: what victims train on, both ways.
        hold_out: what they are scored on; only its clean patches count.
        classes: of the bundle, background included.
        about: digest of the release.
        settings: how much is tried.
        progress: who looks on.

    Raises:
        ConfigurationError: ``time-limit``: not one seed of all victims was finished in time.
    """
    started = time.monotonic()

    def train(run: Run, training: MaskedPairs = training, tested: FloatArray = hold_out.clean) -> Scores:
        """Clean and protected begin with the same weights and order."""
        images = training.clean if run.kind == "clean" else training.protected
        rng = np.random.default_rng((settings.seed, run.seed, settings.architectures.index(run.architecture)))
        return train_segmenter(
            draw_segmenter(run.architecture, shape=images.shape[1:], classes=classes, rng=rng),
            images,
            training.labels,
            (tested, hold_out.labels),
            settings.schedule,
            resources=Resources("cpu", 1, MEMORY_PER_VICTIM_BYTES),
            rng=rng,
            until=started + settings.limit_s,
        )

    def rounds_of(
        victim: Callable[[Run], Scores], architectures: tuple[str, ...], before: int
    ) -> Rounds[Scores]:
        return finished_rounds(
            victim,
            architectures,
            settings.seeds,
            threads=settings.threads,
            progress=lambda done, _: progress(before + done, runs),
        )

    first, plain = settings.architectures[:1], 2 * settings.seeds * len(settings.architectures)
    runs = plain + 2 * settings.seeds
    rounds = rounds_of(train, settings.architectures, 0)
    soft = replace(training, clean=blurred(training.clean), protected=blurred(training.protected))
    try:
        filtered = rounds_of(partial(train, training=soft, tested=blurred(hold_out.clean)), first, plain)
    except ConfigurationError:  # out of time: what was found stands without it
        filtered = None
    found = constant_mask_dice(training.labels, hold_out.labels, classes)
    constant = float(by_unit(found.mean(axis=1), hold_out.units).mean())

    def finding(of: Rounds[Scores], name: str) -> MaskedFinding:
        return finding_of(name, of.of(name, "clean"), of.of(name, "protected"), hold_out.units, constant)

    return MaskedSiteCheck(
        release_sha256=about,
        seeds=len(rounds.seeds),
        training_patches=len(training.labels),
        hold_out_patches=len(hold_out.labels),
        hold_out_units=int(hold_out.units.max()) + 1,
        victims=tuple(finding(rounds, name) for name in settings.architectures),
        blurred=None if filtered is None else finding(filtered, first[0]),
        seconds=round(time.monotonic() - started, 1),
        constant_mask_dice=constant,
    )


def _taxonomy(manifest: Manifest, policy: SitePolicy) -> Taxonomy:
    classes = manifest.taxonomy.classes
    return Taxonomy(tuple(c.name for c in classes), tuple(c.stored_value for c in classes), policy.classes)


def _check_task(manifest: Manifest) -> None:
    if manifest.task != "segmentation":
        raise ConfigurationError("task", "This bundle is for labelled images; this check is for masks.")
