"""What the victims' scores mean: figures with intervals, and the word that a release has earned. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from medveil.models.quality.classification import Scores

__all__ = [
    "FEWEST_ARCHITECTURES",
    "FEWEST_SEEDS",
    "LEAST_GAIN",
    "LEAST_LOSS",
    "Finding",
    "Interval",
    "JudgedRelease",
    "SiteCheck",
    "VictimFinding",
    "auc_interval",
    "finding_of",
    "mean_recall_interval",
    "wilson",
]

LEAST_LOSS: Final = 0.5
"""Share of what a victim learns from clean images that it must lose: the coordinator's gate
(`medveil.models.training.proxy`). Here the upper end of the interval must, so that a small hold-out decides
nothing."""

LEAST_GAIN: Final = 0.05
"""Balanced accuracy above chance below which a victim learned nothing from clean images either, so that it can't tell
anything (`medveil.models.training.surrogates`)."""

FEWEST_ARCHITECTURES: Final = 2
FEWEST_SEEDS: Final = 3
"""What the word "protected" takes at least (the campaign's rule 1: two architectures, three seeds)."""

_Z: Final = 1.959963984540054
"""Quantile of the normal distribution for 95 %."""

Interval = tuple[float, float]
Verdict = Literal["protected", "in part", "not protected", "undecided"]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Value):
    """What one architecture found.

    Attributes:
        architecture: its name.
        lost: share of what the victim learned from clean images that the protected one lacks, at the cautious end of
            an interval; None where the clean one learned nothing.
    """

    architecture: str
    lost: float | None

    @property
    def holds(self) -> bool | None:
        """Whether the protection holds against this victim; None where it can't tell."""
        return None if self.lost is None else self.lost >= LEAST_LOSS


class JudgedRelease(_Value):
    """What victims of any kind say together.

    Attributes:
        release_sha256: digest of the protected copies that the check is about.
        seeds: finished ones; every architecture trained with each of them.
        victims: in the order of the tables.
        seconds: what the check took.
    """

    release_sha256: str
    seeds: Annotated[int, Field(ge=1)]
    victims: Annotated[tuple[Finding, ...], Field(min_length=1)]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """What the victims say together; nothing where there are too few of them."""
        telling = [victim.holds for victim in self.victims if victim.holds is not None]
        if len(telling) < FEWEST_ARCHITECTURES or self.seeds < FEWEST_SEEDS:
            return "undecided"
        if all(telling):
            return "protected"
        return "in part" if any(telling) else "not protected"


class VictimFinding(Finding):
    """One architecture, trained on clean and on protected images, scored on clean ones; means over the seeds.

    Attributes:
        clean: after the last step, trained on clean images.
        protected: after the last step, trained on protected images.
        protected_peak: at each seed's best scoring on the way: an attacker who can stop early by clean images.
        accuracy_interval: 95 %, of `protected.accuracy` (Wilson).
        balanced_interval: 95 %, of `protected.balanced_accuracy` (see `mean_recall_interval`).
        recoverable_interval: 95 %, of `protected.recoverable_accuracy`, likewise.
        auc_interval: 95 %, of `protected.auc` (Hanley and McNeil).
        lost: share of what the clean victim learned that the protected one lacks, by the upper end of
            `recoverable_interval`; None where the clean one learned nothing.
    """

    clean: Scores
    protected: Scores
    protected_peak: Scores
    accuracy_interval: Interval
    balanced_interval: Interval
    recoverable_interval: Interval
    auc_interval: Interval


class SiteCheck(JudgedRelease):
    """What a site found out about its own release.

    Attributes:
        release_sha256: digest of the protected copies that the check is about.
        seeds: finished ones; every architecture trained with each of them.
        training_images: clean or protected images that each victim trained on.
        hold_out_images: clean images of each class that it was scored on.
        victims: in the order of the tables.
        seconds: what the check took.
    """

    training_images: Annotated[int, Field(ge=1)]
    hold_out_images: tuple[int, ...]
    victims: Annotated[tuple[VictimFinding, ...], Field(min_length=1)]

    @property
    def hold_out(self) -> int:
        """Clean images that the scores were measured on."""
        return sum(self.hold_out_images)

    @property
    def strongest(self) -> VictimFinding:
        """The victim that recovers most: what counts, because an attacker chooses."""
        return max(self.victims, key=lambda victim: victim.protected.recoverable_accuracy)

    @property
    def half_interval(self) -> float:
        """Half the 95 % interval of the strongest victim's balanced accuracy (the wider side)."""
        low, high = self.strongest.balanced_interval
        middle = self.strongest.protected.balanced_accuracy
        return max(middle - low, high - middle)

    @property
    def word(self) -> str:
        """The status of the release in one sentence."""
        held = ", ".join(victim.architecture for victim in self.victims if victim.holds)
        learning = ", ".join(_told(victim) for victim in self.victims if victim.holds is False)
        match self.verdict:
            case "protected":
                return f"protected (site check: {held} learn less than half of what clean images teach)"
            case "in part":
                return f"perturbed, protected in part (site check: {held} hold; {learning} still learns)"
            case "not protected":
                return f"perturbed, not protected (site check: {learning} still learn)"
        return "perturbed, not verified by a victim (site check: too little was trained to tell)"


def _told(victim: VictimFinding) -> str:
    return f"{victim.architecture} {victim.protected.recoverable_accuracy:.2f}"


def finding_of(
    architecture: str,
    clean: Sequence[Sequence[Scores]],
    protected: Sequence[Sequence[Scores]],
    hold_out_images: Sequence[int],
) -> VictimFinding:
    """Return what one architecture found.

    Args:
        architecture: its name.
        clean: for each seed, the scores on the way and after the last step, trained on clean images.
        protected: likewise, trained on protected images.
        hold_out_images: clean images of each class that all of it was scored on.
    """
    before, after = _mean([run[-1] for run in clean]), _mean([run[-1] for run in protected])
    peak = _mean([max(run, key=lambda scores: scores.balanced_accuracy) for run in protected])
    recoverable = mean_recall_interval(after.recoverable_accuracy, hold_out_images)
    chance = 1 / len(hold_out_images)
    learned, left = before.balanced_accuracy - chance, recoverable[1] - chance
    return VictimFinding(
        architecture=architecture,
        clean=before,
        protected=after,
        protected_peak=peak,
        accuracy_interval=wilson(after.accuracy, sum(hold_out_images)),
        balanced_interval=mean_recall_interval(after.balanced_accuracy, hold_out_images),
        recoverable_interval=recoverable,
        auc_interval=auc_interval(after.auc, hold_out_images),
        lost=None if learned < LEAST_GAIN else 1 - max(left, 0) / learned,
    )


def _mean(runs: Sequence[Scores]) -> Scores:
    return Scores(**{f.name: float(np.mean([getattr(run, f.name) for run in runs])) for f in fields(Scores)})


def wilson(share: float, images: int) -> Interval:
    """Return the 95 % score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, 209)."""
    middle = (share + _Z**2 / (2 * images)) / (1 + _Z**2 / images)
    half = _Z / (1 + _Z**2 / images) * math.sqrt(share * (1 - share) / images + (_Z / (2 * images)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_recall_interval(mean: float, images: Sequence[int]) -> Interval:
    """Return a 95 % interval of a mean over classes of the share answered correctly.

    The classes' Wilson intervals, added in squares (MOVER: Zou and Donner 2008, Stat. Med. 27, 1693), every class
    taken to have the mean itself as its share: given only the mean, that is where the variance is largest.

    Args:
        mean: of the shares.
        images: of each class.
    """
    ends = [wilson(mean, count) for count in images]
    below = math.hypot(*(mean - low for low, _ in ends)) / len(images)
    above = math.hypot(*(high - mean for _, high in ends)) / len(images)
    return max(0.0, mean - below), min(1.0, mean + above)


def auc_interval(auc: float, images: Sequence[int]) -> Interval:
    """Return a 95 % interval of an AUC, one class against the rest, mean over the classes.

    Hanley and McNeil 1982 (Radiology 143, 29), every class taken to have the mean itself as its AUC. The classes
    share their images, so their errors are averaged and not taken to cancel.

    Args:
        auc: mean over the classes.
        images: of each class.
    """
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    errors = []
    for positive in images:
        negative = sum(images) - positive
        variance = auc * (1 - auc) + (positive - 1) * (q1 - auc**2) + (negative - 1) * (q2 - auc**2)
        errors.append(math.sqrt(max(0.0, variance) / (positive * negative)))
    half = _Z * float(np.mean(errors))
    return max(0.0, auc - half), min(1.0, auc + half)
