"""One job as a value: what is protected, how, for whom; and what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from medveil.agent.budget import Budget
from medveil.agent.imageio import ImageFormat, Taxonomy
from medveil.agent.ledger import Totals
from medveil.agent.perturb import Perturber
from medveil.agent.segmentation import Annotations, ClassMap, MaskedPerturber
from medveil.agent.workspace import Workspace

__all__ = ["Job", "Outcome", "Unwatched", "Watch", "settings_digest"]


class Watch(Protocol):
    """Who looks on: a progress bar, or nobody."""

    def begin(self, total: int, done: int) -> None:
        """Learn how many images there are and how many were finished before."""
        ...

    def advance(self, images: int) -> None:
        """Learn that so many more images reached their final state."""
        ...


class Unwatched:
    """Nobody looks on."""

    def begin(self, total: int, done: int) -> None:
        """Do nothing."""

    def advance(self, images: int) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that one job is.

    Attributes:
        source: folder or file; opened read-only.
        release: what may be shared afterwards.
        private: what stays; None puts it beside the release.
        labels_file: CSV with the columns file,label; None looks for one in the source.
        formats: what is read, asked in this order.
        allows_format: whether the policy lets a format be protected.
        taxonomy: the bundle's classes.
        perturber: method, settings and surrogates, or generators where the task is segmentation.
        budget: enforced on whatever the method asks for.
        minimum_psnr_db: an image that would fall below is not released.
        recipients: age public keys for the sidecars, the site's own first.
        settings: what the release depends on, beside the images: bundle digest, budget, policy, method.
        begun: when the job was first begun, local time; the same in every rerun.
        invocation: how to call this job again (`quarantine retry`); kept in the private ledger.
        class_map: what masks call the classes, where the task is segmentation; None: images have labels.
    """

    source: Path
    release: Path
    private: Path | None
    labels_file: Path | None
    formats: tuple[ImageFormat, ...]
    allows_format: Callable[[str], bool]
    taxonomy: Taxonomy
    perturber: Perturber | MaskedPerturber
    budget: Budget
    minimum_psnr_db: float
    recipients: tuple[str, ...]
    settings: Mapping[str, object]
    begun: datetime
    invocation: Mapping[str, str | float | None]
    class_map: ClassMap | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run achieved.

    Attributes:
        workspace: where everything lies.
        totals: the job's figures, this run's and earlier ones'.
        ignored: hidden and system files that were not looked at.
        finished: images that this run opened and brought to a final state; a file refused unopened isn't one.
        seconds: what it took.
        annotations: the source's masks, where the task is segmentation.
    """

    workspace: Workspace
    totals: Totals
    ignored: int
    finished: int
    seconds: float
    annotations: Annotations | None = None


def settings_digest(settings: Mapping[str, object]) -> str:
    """Return the SHA-256 of what a release depends on beside its images, hex."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
