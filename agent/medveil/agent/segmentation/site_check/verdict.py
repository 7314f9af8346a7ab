"""What the victims' overlap means: figures with intervals, and the word that a release has earned. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from medveil.agent.segmentation.site_check.training import DiceArray
from medveil.agent.victim_check.verdict import Finding, Interval, JudgedRelease

__all__ = ["LEAST_LEARNED", "MaskedFinding", "MaskedSiteCheck", "finding_of", "mean_interval"]

LEAST_LEARNED: Final = 0.2
"""Dice below which a victim learned too little from clean images to have anything to lose: the coordinator's gate
(`medveil.models.training.segmentation_check`), as is `Finding.holds`."""

_CONFIDENCE: Final = 0.95
_Share = Annotated[float, Field(ge=0, le=1)]


class MaskedFinding(Finding):
    """One architecture, trained on clean and on protected patches, scored on clean ones; means over the seeds.

    Attributes:
        clean_dice: after the last step, trained on clean images.
        protected_dice: after the last step, trained on protected images.
        protected_peak_dice: at each seed's best scoring on the way: an attacker who can stop early by clean images.
        interval: 95 %, of `protected_dice` (see `mean_interval`).
        lost: share of `clean_dice` that the protected victim lacks, by the upper end of `interval`; None where the
            clean one learned nothing.
    """

    clean_dice: _Share
    protected_dice: _Share
    protected_peak_dice: _Share
    interval: Interval


class MaskedSiteCheck(JudgedRelease):
    """What a site found out about its own release with masks.

    Attributes:
        release_sha256: digest of the protected copies that the check is about.
        seeds: finished ones; every architecture trained with each of them.
        training_patches: clean or protected patches that each victim trained on.
        hold_out_patches: clean patches that it was scored on.
        hold_out_units: volumes, series or single images that these are from.
        victims: in the order of the tables.
        seconds: what the check took.
    """

    training_patches: Annotated[int, Field(ge=1)]
    hold_out_patches: Annotated[int, Field(ge=1)]
    hold_out_units: Annotated[int, Field(ge=1)]
    victims: Annotated[tuple[MaskedFinding, ...], Field(min_length=1)]

    @property
    def word(self) -> str:
        """The status of the release in one sentence."""
        held = ", ".join(victim.architecture for victim in self.victims if victim.holds)
        learning = ", ".join(
            f"{victim.architecture} finds {victim.protected_dice:.2f} of {victim.clean_dice:.2f}"
            for victim in self.victims
            if victim.holds is False
        )
        match self.verdict:
            case "protected":
                return (
                    f"protected (site check: {held} find less than half of what clean images teach, in Dice)"
                )
            case "in part":
                return f"perturbed, protected in part (site check: {held} held; {learning}, in Dice)"
            case "not protected":
                return f"perturbed, not protected (site check: {learning}, in Dice)"
        return "perturbed, not verified by a victim (site check: too little was trained to tell)"


def finding_of(
    architecture: str,
    clean: Sequence[Sequence[DiceArray]],
    protected: Sequence[Sequence[DiceArray]],
    units: npt.NDArray[np.int64],
) -> MaskedFinding:
    """Return what one architecture found.

    Args:
        architecture: its name.
        clean: for each seed, the Dice of every hold-out patch at each scoring, trained on clean images.
        protected: likewise, trained on protected images.
        units: ``(N,)`` which volume, series or image each hold-out patch is from, counted from 0.
    """
    before = float(np.mean([_by_unit(run[-1], units).mean() for run in clean]))
    after = np.mean([_by_unit(run[-1], units) for run in protected], axis=0)
    peak = float(np.mean([max(_by_unit(scored, units).mean() for scored in run) for run in protected]))
    interval = mean_interval(after)
    return MaskedFinding(
        architecture=architecture,
        clean_dice=before,
        protected_dice=float(after.mean()),
        protected_peak_dice=peak,
        interval=interval,
        lost=None if before < LEAST_LEARNED else 1 - interval[1] / before,
    )


def mean_interval(values: npt.NDArray[np.float64]) -> Interval:
    """Return a 95 % interval of a mean of shares, by Student's t: few values give a wide one.

    Args:
        values: ``(n,)`` independent ones: of patients, not of their patches.
    """
    from scipy import stats

    if len(values) < 2:
        return (0.0, 1.0)
    reach = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))
    half = reach * float(values.std(ddof=1)) / math.sqrt(len(values))
    middle = float(values.mean())
    return max(0.0, middle - half), min(1.0, middle + half)


def _by_unit(scores: DiceArray, units: npt.NDArray[np.int64]) -> DiceArray:
    """Return the mean of each unit's patches: patches of one patient are no independent evidence."""
    return np.asarray(np.bincount(units, scores) / np.bincount(units), np.float64)
