"""What the victims' overlap means: figures with intervals, and the word that a release has earned. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from medveil.agent.segmentation.site_check.training import DiceArray, Scoring
from medveil.agent.victim_check.verdict import Finding, Interval, JudgedRelease
from medveil.models.quality.segmentation import share_lost

__all__ = [
    "MaskedFinding",
    "MaskedSiteCheck",
    "by_unit",
    "finding_of",
    "mean_interval",
]

_CONFIDENCE: Final = 0.95
_Share = Annotated[float, Field(ge=0, le=1)]


class MaskedFinding(Finding):
    """One architecture, trained on clean and on protected patches, scored on clean ones; means over the seeds.

    What decides is the seed that recovered most: who trains again keeps the best.

    Attributes:
        clean_dice: after the last step, trained on clean images.
        protected_dice: after the last step, trained on protected images.
        protected_peak_dice: at each seed's best scoring on the way: an attacker who can stop early by clean images.
        interval: 95 %, of `protected_recoverable_dice` over volumes, series or images (see `mean_interval`); in
            checks made before that was recorded, of `protected_dice`.
        lost: share of what can be recovered from the clean victim above the constant mask that can't be from the
            protected one, by the upper end of `interval`; None where the clean one learned nothing, or nothing that
            takes an image. (Earlier checks: share of `clean_dice` that the protected victim lacks.)
        clean_recoverable_dice: after the last step, trained on clean images, with the thresholds that serve best on
            the hold-out: for whoever has a few clean images with masks. None in earlier checks.
        protected_recoverable_dice: likewise, trained on protected images, in the seed that recovered most (in checks
            before this rule: mean over the seeds).
    """

    clean_dice: _Share
    protected_dice: _Share
    protected_peak_dice: _Share
    interval: Interval
    clean_recoverable_dice: _Share | None = None
    protected_recoverable_dice: _Share | None = None

    @property
    def counted(self) -> tuple[float, float]:
        """The Dice, trained on protected and on clean images, that `lost` compares."""
        if self.protected_recoverable_dice is None or self.clean_recoverable_dice is None:
            return self.protected_dice, self.clean_dice
        return self.protected_recoverable_dice, self.clean_recoverable_dice


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
        constant_mask_dice: what a mask that is the same for every patch finds on the hold-out, learned from the label
            maps of the training patches alone; mean over units, as every victim's Dice. None in checks made before
            it was recorded.
        blurred: the first victim again, on training and hold-out patches that were all blurred before
            (`medveil.models.quality.filters`). None where the time did not reach, and in earlier checks.
    """

    training_patches: Annotated[int, Field(ge=1)]
    hold_out_patches: Annotated[int, Field(ge=1)]
    hold_out_units: Annotated[int, Field(ge=1)]
    victims: Annotated[tuple[MaskedFinding, ...], Field(min_length=1)]
    constant_mask_dice: _Share | None = None
    blurred: MaskedFinding | None = None

    @property
    def undone_by_blur(self) -> bool | None:
        """Whether the simplest filter undoes the protection; None where that was not tried, or can't be told."""
        return None if self.blurred is None or self.blurred.holds is None else not self.blurred.holds

    @property
    def word(self) -> str:
        """The status of the release in one sentence."""
        held = ", ".join(victim.architecture for victim in self.victims if victim.holds)
        learning = ", ".join(_told(victim) for victim in self.victims if victim.holds is False)
        measure = self._measure()
        match self.verdict:
            case "protected":
                told = f"{held} keep less than half of what clean images teach, {measure}"
                if self.undone_by_blur:
                    return f"protected from training on the images as they are, not after a blur (site check: {told})"
                return f"protected (site check: {told})"
            case "in part":
                return f"perturbed, protected in part (site check: {held} held; {learning}, {measure})"
            case "not protected":
                return f"perturbed, not protected (site check: {learning}, {measure})"
        return "perturbed, not verified by a victim (site check: too little was trained to tell)"

    def _measure(self) -> str:
        """Return how the half was counted; earlier checks asked less."""
        constant = self.constant_mask_dice
        if constant is None or any(victim.protected_recoverable_dice is None for victim in self.victims):
            return "in Dice; what a moved threshold recovers was not tried"
        return f"in Dice under the best thresholds; half is counted above a constant mask's {constant:.2f}"


def _told(victim: MaskedFinding) -> str:
    kept, taught = victim.counted
    return f"{victim.architecture} finds {kept:.2f} of {taught:.2f}"


def finding_of(
    architecture: str,
    clean: Sequence[Sequence[Scoring]],
    protected: Sequence[Sequence[Scoring]],
    units: npt.NDArray[np.int64],
    constant_mask_dice: float,
) -> MaskedFinding:
    """Return what one architecture found.

    Args:
        architecture: its name.
        clean: for each seed, what it found in the hold-out at each scoring, trained on clean images.
        protected: likewise, trained on protected images.
        units: ``(N,)`` which volume, series or image each hold-out patch is from, counted from 0.
        constant_mask_dice: what a constant mask finds there: what takes no image is no loss and no gain.
    """
    learned = float(np.mean([by_unit(run[-1].dice, units).mean() for run in clean]))
    peak = float(np.mean([max(by_unit(at.dice, units).mean() for at in run) for run in protected]))
    taught = float(np.mean([by_unit(run[-1].recoverable, units).mean() for run in clean]))
    kept = max((by_unit(run[-1].recoverable, units) for run in protected), key=np.mean)
    interval = mean_interval(kept)
    return MaskedFinding(
        architecture=architecture,
        clean_dice=learned,
        protected_dice=float(np.mean([by_unit(run[-1].dice, units).mean() for run in protected])),
        protected_peak_dice=peak,
        interval=interval,
        lost=share_lost(learned, taught, interval[1], constant_mask_dice),
        clean_recoverable_dice=taught,
        protected_recoverable_dice=float(kept.mean()),
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


def by_unit(scores: DiceArray, units: npt.NDArray[np.int64]) -> DiceArray:
    """Return the mean of each unit's patches: patches of one patient are no independent evidence."""
    return np.asarray(np.bincount(units, scores) / np.bincount(units), np.float64)
