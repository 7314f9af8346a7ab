"""The whole check: draw images, train victims on originals and on protected copies, score all on clean images, judge.

verified images -> split -> (architecture x seed) x (clean | protected) -> scores -> finding -> word
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medveil.agent.engine import Resources
from medveil.agent.formats import reading_formats
from medveil.agent.policy import load_policy
from medveil.agent.preparation import open_trusted_bundle
from medveil.agent.release_job import ledger_of, recorded_call
from medveil.agent.victim_check.networks import ARCHITECTURES, draw_network
from medveil.agent.victim_check.pairs import Pairs, ReleaseReader
from medveil.agent.victim_check.record import check_bundle, keep_check, release_digest
from medveil.agent.victim_check.runs import Progress, Run, finished_rounds
from medveil.agent.victim_check.sample import drawn
from medveil.agent.victim_check.training import MEMORY_PER_VICTIM_BYTES, Schedule, train_victim
from medveil.agent.victim_check.verdict import FEWEST_SEEDS, SiteCheck, finding_of
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.bundle import Manifest
from medveil.models.errors import ConfigurationError
from medveil.models.quality.classification import Scores

__all__ = ["CheckSettings", "check_images", "check_release"]


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """How much is tried.

    Attributes:
        architectures: victims, of `ARCHITECTURES`.
        seeds: runs of each victim on each kind of image.
        schedule: how each of them trains.
        most_images: of the site's verified images, training and hold-out together.
        most_bytes: memory for them; large ones come in smaller numbers.
        limit_s: time for all victims; seeds that it cuts off don't count.
        threads: victims trained at once; None takes every processor thread.
        seed: of the draw, the weights and the orders.
    """

    architectures: tuple[str, ...] = ARCHITECTURES
    seeds: int = FEWEST_SEEDS
    schedule: Schedule = field(default_factory=Schedule)
    most_images: int = 900
    most_bytes: int = 2**29
    limit_s: float = 1800.0
    threads: int | None = None
    seed: int = 0


def check_release(
    release: Path,
    private: Path | None = None,
    *,
    bundle: Path | None = None,
    policy: Path | None = None,
    settings: CheckSettings | None = None,
    progress: Progress = lambda done, total: None,
) -> SiteCheck:
    """Check a release, finished or running, with the site's own images, and keep the result beside it.

    Nothing leaves: originals and copies are read where they lie, victims are trained here and forgotten.

    Args:
        release: folder of the protected copies.
        private: its private folder; None: beside it.
        bundle: what it was made with; None: as its last run says.
        policy: likewise.
        settings: how much is tried.
        progress: who looks on.

    Raises:
        InputError: ``too-few-images``, ``one-class``, ``source-missing``, ``source-changed``, ``release-changed``, or
            as `ledger_of`.
        ConfigurationError: ``other-bundle``, ``time-limit``, ``task``.
        RefusedError: the bundle can't be trusted, or onnxruntime computes nonsense.
    """
    settings = settings or CheckSettings()
    call = recorded_call(release, private)
    site_policy = load_policy(policy or call.wishes.policy)
    opened = open_trusted_bundle(bundle or call.wishes.bundle, site_policy)
    shape = _image_shape(opened.manifest)
    workspace = Workspace(release, private or private_beside(release))
    with ledger_of(release, private) as ledger:
        check_bundle(ledger, opened.digest)
        about = release_digest(ledger)
        reader = ReleaseReader(workspace, ledger, call.source, reading_formats(site_policy.windows))
        most = min(settings.most_images, settings.most_bytes // (2 * 4 * int(np.prod(shape))))
        split = drawn(reader.candidates(), seed=settings.seed, most=most)
        training, hold_out = reader.pairs(split.training, shape), reader.pairs(split.hold_out, shape)
    check = check_images(training, hold_out, about=about, settings=settings, progress=progress)
    keep_check(workspace, check)
    return check


def check_images(
    training: Pairs,
    hold_out: Pairs,
    *,
    about: str,
    settings: CheckSettings,
    progress: Progress = lambda done, total: None,
) -> SiteCheck:
    """Train every victim on clean and on protected images, and say what they learned.

    Args:
        training: what victims train on, both ways; every class occurs, counted from 0 without gaps.
        hold_out: what they are scored on; only its clean images count. The same classes.
        about: digest of the release.
        settings: how much is tried.
        progress: who looks on.

    Raises:
        ConfigurationError: ``time-limit``: not one seed of all victims was finished in time.
    """
    started = time.monotonic()
    classes = int(hold_out.labels.max()) + 1

    def train(run: Run) -> tuple[Scores, ...]:
        """Clean and protected begin with the same weights and order."""
        images = training.clean if run.kind == "clean" else training.protected
        shape = (images.shape[1], images.shape[2], images.shape[3])
        rng = np.random.default_rng((settings.seed, run.seed, settings.architectures.index(run.architecture)))
        return train_victim(
            draw_network(run.architecture, shape=shape, classes=classes, rng=rng),
            images,
            training.labels,
            (hold_out.clean, hold_out.labels),
            settings.schedule,
            resources=Resources("cpu", 1, MEMORY_PER_VICTIM_BYTES),
            rng=rng,
            until=started + settings.limit_s,
        )

    rounds = finished_rounds(
        train, settings.architectures, settings.seeds, threads=settings.threads, progress=progress
    )
    counts = tuple(int(images) for images in np.bincount(hold_out.labels))
    return SiteCheck(
        release_sha256=about,
        seeds=len(rounds.seeds),
        training_images=len(training.labels),
        hold_out_images=counts,
        victims=tuple(
            finding_of(name, rounds.of(name, "clean"), rounds.of(name, "protected"), counts)
            for name in settings.architectures
        ),
        seconds=round(time.monotonic() - started, 1),
    )


def _image_shape(manifest: Manifest) -> tuple[int, int, int]:
    """Return the images that this campaign's models take, which are what victims take, too."""
    contract = manifest.input
    if manifest.task != "classification" or contract.slices is not None:
        raise ConfigurationError(
            "task",
            "The site check trains classifiers on labelled images; it can't judge this kind of release.",
        )
    return (contract.channels, contract.rows, contract.columns)
