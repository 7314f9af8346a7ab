"""The whole check: draw images, train victims on originals and on protected copies, score all on clean images, judge.

verified images -> split -> (architecture x seed) x (clean | protected) -> scores -> finding -> word
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from medveil.agent.engine import Resources
from medveil.agent.formats import reading_formats
from medveil.agent.ledger import Ledger
from medveil.agent.policy import load_policy
from medveil.agent.preparation import available_threads, open_trusted_bundle
from medveil.agent.release_job import ledger_of, recorded_call
from medveil.agent.victim_check.networks import ARCHITECTURES, draw_network
from medveil.agent.victim_check.pairs import Pairs, ReleaseReader
from medveil.agent.victim_check.record import keep_check, release_digest
from medveil.agent.victim_check.sample import drawn
from medveil.agent.victim_check.training import OutOfTime, Schedule, train_victim
from medveil.agent.victim_check.verdict import FEWEST_SEEDS, SiteCheck, VictimFinding, finding_of
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.bundle import Manifest
from medveil.models.errors import ConfigurationError, InputError
from medveil.models.quality.classification import Scores

__all__ = ["CheckSettings", "Progress", "check_images", "check_release"]

Progress = Callable[[int, int], None]
"""Told how many victims are trained, of how many."""

_MEMORY_PER_VICTIM_BYTES: Final = 2**29


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
        _check_bundle(ledger, opened.digest)
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
    runs = _all_runs(training, hold_out, settings, progress, until=started + settings.limit_s)
    seeds = [
        seed
        for seed in range(settings.seeds)
        if all((name, seed, kind) in runs for name in settings.architectures for kind in _KINDS)
    ]
    if not seeds:
        raise ConfigurationError(
            "time-limit",
            "The time was over before one round of victims was trained; give the check more of it.",
        )
    counts = tuple(int(images) for images in np.bincount(hold_out.labels))

    def finding(name: str) -> VictimFinding:
        clean, protected = ([runs[name, seed, kind] for seed in seeds] for kind in _KINDS)
        return finding_of(name, clean, protected, counts)

    return SiteCheck(
        release_sha256=about,
        seeds=len(seeds),
        training_images=len(training.labels),
        hold_out_images=counts,
        victims=tuple(finding(name) for name in settings.architectures),
        seconds=round(time.monotonic() - started, 1),
    )


_KINDS: Final = ("clean", "protected")
_Run = tuple[str, int, str]
"""Architecture, seed, and the kind of images trained on."""


def _all_runs(
    training: Pairs, hold_out: Pairs, settings: CheckSettings, progress: Progress, *, until: float
) -> dict[_Run, tuple[Scores, ...]]:
    """Return the scores of every run that was finished in time; seed after seed, so that whole rounds come first."""
    runs: list[_Run] = [
        (name, seed, kind)
        for seed in range(settings.seeds)
        for name in settings.architectures
        for kind in _KINDS
    ]
    finished: dict[_Run, tuple[Scores, ...]] = {}
    workers = min(settings.threads or available_threads(), len(runs))
    progress(0, len(runs))
    with ThreadPoolExecutor(workers) as pool:
        waiting: dict[Future[tuple[Scores, ...] | None], _Run] = {
            pool.submit(_one_run, run, training, hold_out, settings, until): run for run in runs
        }
        try:
            for number, done in enumerate(as_completed(waiting), start=1):
                scores = done.result()
                if scores is not None:
                    finished[waiting[done]] = scores
                progress(number, len(runs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return finished


def _one_run(
    run: _Run, training: Pairs, hold_out: Pairs, settings: CheckSettings, until: float
) -> tuple[Scores, ...] | None:
    """Train one victim; None if the time is over. Clean and protected begin with the same weights and order."""
    name, seed, kind = run
    images = training.clean if kind == "clean" else training.protected
    shape = (images.shape[1], images.shape[2], images.shape[3])
    rng = np.random.default_rng((settings.seed, seed, settings.architectures.index(name)))
    classes = int(hold_out.labels.max()) + 1
    try:
        return train_victim(
            draw_network(name, shape=shape, classes=classes, rng=rng),
            images,
            training.labels,
            (hold_out.clean, hold_out.labels),
            settings.schedule,
            resources=Resources("cpu", 1, _MEMORY_PER_VICTIM_BYTES),
            rng=rng,
            until=until,
        )
    except OutOfTime:
        return None


def _image_shape(manifest: Manifest) -> tuple[int, int, int]:
    """Return the images that this campaign's models take, which are what victims take, too."""
    contract = manifest.input
    if manifest.task != "classification" or contract.slices is not None:
        raise ConfigurationError(
            "task",
            "The site check trains classifiers on labelled images; it can't judge this kind of release.",
        )
    return (contract.channels, contract.rows, contract.columns)


def _check_bundle(ledger: Ledger, digest: str) -> None:
    recorded = ledger.meta("settings")
    if recorded is None:
        raise InputError("no-call", "This job was never started; run `medveil-agent protect`.")
    if json.loads(recorded).get("bundle_sha256") != digest:
        raise ConfigurationError(
            "other-bundle", "This release was made with another bundle; name that one with --bundle."
        )
