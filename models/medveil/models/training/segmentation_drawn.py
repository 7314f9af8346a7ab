"""Noise that nobody trains: of a method's budgets, from the gentlest on, the first that a hard victim cannot pass.

A grating is the same in every image, so there is nothing to learn for the coordinator; what public images tell is
how strong it must be on images of this kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medveil.models.audit.segmentation_victims import SegmentationVictimSettings
from medveil.models.datasets.masked import Patches
from medveil.models.errors import ConfigurationError
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.segmentation import SegmentationSettings, get_segmentation
from medveil.models.quality.segmentation import LEAST_LOSS, constant_mask_dice, share_lost
from medveil.models.training.segmentation import protect_patches
from medveil.models.training.segmentation_check import dice_left
from medveil.models.training.segmentation_seeds import ChosenNoise
from medveil.models.training.state import TrainingState
from medveil.models.training.surrogates import Reporter

__all__ = ["DRAWN_PLANS", "DrawnPlan", "gentlest_that_holds"]

_EIGHT_BIT_MAX = 255


@dataclass(frozen=True, kw_only=True)
class DrawnPlan:
    """Which budgets of a method are tried.

    Attributes:
        method: name in `SEGMENTATION_METHODS`; it must draw its noise.
        budgets: from the gentlest to the strongest.
    """

    method: str
    budgets: tuple[SegmentationSettings, ...]

    def __post_init__(self) -> None:
        if get_segmentation(self.method).generators:
            raise ConfigurationError("setting", f"The method {self.method} needs generators.")
        if not self.budgets:
            raise ConfigurationError("setting", "Drawn noise needs at least one budget.")


def _gratings(*epsilons_255: int, beyond: int) -> tuple[SegmentationSettings, ...]:
    return tuple(
        SegmentationSettings(epsilon=epsilon / 255, band_radius=beyond, texture_bound=False)
        for epsilon in epsilons_255
    )


# Vessels need 3/255, hippocampus slices 8/255, the customary most; white cells need more (bench/segmentation.py).
# A coarse wave has no room on a structure of its own length, and goes a pixel beyond it.
DRAWN_PLANS: Mapping[str, DrawnPlan] = {
    "grating": DrawnPlan(method="grating", budgets=_gratings(3, 4, 6, 8, beyond=0)),
    "grating-coarse": DrawnPlan(method="grating-coarse", budgets=_gratings(6, 8, beyond=1)),
    "grating-volume": DrawnPlan(method="grating-volume", budgets=_gratings(4, 6, 8, beyond=0)),
}


def gentlest_that_holds(
    plan: DrawnPlan,
    tried: Patches,
    test: Patches,
    victim: SegmentationVictimSettings,
    *,
    seed: int,
    state: TrainingState,
    reporter: Reporter,
    seconds: float,
) -> ChosenNoise:
    """Return the noise at the first budget that holds against one victim; at the last one if none does.

    Args:
        plan: what to try.
        tried: patches that the victim learns from, clean and protected.
        test: other ones, that it is tested on.
        victim: the one that is hardest to keep from learning.
        seed: of the victim.
        state: where progress is kept.
        reporter: told of stages and of work done.
        seconds: that one victim takes, for the reporter.
    """
    constant = float(constant_mask_dice(tried.labels, test.labels, tried.classes).mean())

    def scored(name: str, images: FloatArray) -> tuple[float, float]:
        """Return Dice and recoverable Dice of the victim, from disk where it was trained before."""
        kept = state.load(name)
        if kept is None:
            last = dice_left(tried, images, test, victim, seed=seed).last
            kept = {"dice": last.dice, "recoverable": last.recoverable_dice}
            state.keep(name, kept)
        reporter.advance(seconds)
        return kept["dice"], kept["recoverable"]

    reporter.stage("victim on clean images")
    learned, taught = scored("clean.tried", tried.images)
    for number, settings in enumerate(plan.budgets, start=1):
        images = protect_patches(tried, plan.method, settings)
        reporter.stage(f"victim on noise of {_EIGHT_BIT_MAX * settings.epsilon:.0f}/255")
        dice, left = scored(f"budget{number}.tried", images)
        lost = share_lost(learned, taught, left, constant)
        if number == len(plan.budgets) or (lost is not None and lost >= LEAST_LOSS):
            reporter.advance(seconds * (len(plan.budgets) - number))
            break
    return ChosenNoise(settings, {}, images, seed, number, dice)
