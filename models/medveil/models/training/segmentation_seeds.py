"""Train generators with several seeds and keep the best: one seed's noise may protect where another's does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from medveil.models.audit.segmentation_victims import SegmentationVictimSettings
from medveil.models.datasets.masked import Patches
from medveil.models.errors import InputError
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.segmentation import SegmentationSettings, get_segmentation
from medveil.models.nets.segmentation import Generator
from medveil.models.training.fit import Diverged
from medveil.models.training.segmentation import GeneratorPlan, GeneratorTraining, keyed, protect_patches
from medveil.models.training.segmentation_check import dice_left
from medveil.models.training.state import TrainingState
from medveil.models.training.surrogates import Reporter

__all__ = ["ChosenNoise", "best_generators", "seconds_per_iteration"]

# Iterations between two files on disk: a minute's work on a slow core.
_KEPT_EVERY = 100
# Generators whose noise uses less of epsilon than this, on average over the gate, have died (our choice: trained ones
# use half and more, untrained ones about a tenth).
_LEAST_USED = 0.1
_TIMED = 6  # iterations: both sides of the alternation are among them


@dataclass(frozen=True, eq=False)
class ChosenNoise:
    """The noise that was kept of several that were tried.

    Attributes:
        settings: its budget and geometry.
        generators: by part of the method; none for a method that draws its noise.
        images: the patches that it was tried on, protected.
        seed: of the generators, or of the victim that drawn noise was tried on.
        attempts: seeds, or budgets of drawn noise, that were tried.
        dice: what the proxy victim still found.
    """

    settings: SegmentationSettings
    generators: Mapping[str, Generator]
    images: FloatArray
    seed: int
    attempts: int
    dice: float


def seconds_per_iteration(plan: GeneratorPlan, data: Patches) -> float:
    """Return what one iteration takes here and now: a few of a throw-away training, timed."""
    sample = data.select(np.arange(min(len(data), 2 * plan.batch_size)))
    timed = replace(plan, iterations=_TIMED, clean_steps=min(1, plan.clean_steps))
    training = GeneratorTraining(timed, sample, seed=0)
    training.step()  # also pays for torch's own warm-up
    started = perf_counter()
    while not training.finished:
        training.step()
    return (perf_counter() - started) / (timed.all_iterations - 1)


def best_generators(
    plan: GeneratorPlan,
    data: Patches,
    tried: Patches,
    test: Patches,
    victim: SegmentationVictimSettings,
    *,
    seeds: Sequence[int],
    state: TrainingState,
    reporter: Reporter,
    seconds: float,
) -> ChosenNoise:
    """Train generators from each seed, and keep those whose noise leaves a proxy victim the least.

    Args:
        plan: what to train.
        data: public patches that the generators learn from.
        tried: other ones, that the victim learns from when they are protected.
        test: other ones, that it is tested on.
        victim: the proxy victim.
        seeds: one training each; a degenerate one counts as tried.
        state: where progress is kept.
        reporter: told of stages and of work done.
        seconds: per iteration, for the reporter.

    Raises:
        InputError: "degenerate-generator": no seed gave noise.
    """
    best: ChosenNoise | None = None
    for number, seed in enumerate(seeds, start=1):
        reporter.stage(f"generators, seed {number} of {len(seeds)}")
        generators = _trained(plan, data, seed, number, state, reporter, seconds)
        if generators is None:
            continue
        images = protect_patches(tried, plan.method, plan.settings, generators)
        if _used(plan, tried, images) < _LEAST_USED:
            continue
        reporter.stage(f"proxy victim on the noise of seed {number}")
        kept = state.load(f"seed{number}.tried")
        dice = (
            float(kept["dice"]) if kept else dice_left(tried, images, test, victim, seed=seeds[0]).last.dice
        )
        state.keep(f"seed{number}.tried", {"dice": dice})
        if best is None or dice < best.dice:
            best = ChosenNoise(plan.settings, generators, images, seed, len(seeds), dice)
    if best is None:
        raise InputError(
            "degenerate-generator",
            f"The generators learned no noise from this data with {len(seeds)} seeds; "
            "check the masks, or train on more images.",
        )
    return best


def _trained(
    plan: GeneratorPlan,
    data: Patches,
    seed: int,
    number: int,
    state: TrainingState,
    reporter: Reporter,
    seconds: float,
) -> Mapping[str, Generator] | None:
    """Return the generators of one seed, from where they were last kept on; None if they diverged."""
    name = f"seed{number}.generators"
    training = GeneratorTraining(plan, data, seed)
    kept = state.load(name)
    if kept is not None:
        training.restore(kept)
        reporter.advance(seconds * training.iteration)
    while not training.finished:
        try:
            training.step()
        except Diverged:
            return None
        reporter.advance(seconds)
        if training.iteration % _KEPT_EVERY == 0 or training.finished:
            state.keep(name, training.state())
    return training.generators


def _used(plan: GeneratorPlan, data: Patches, images: FloatArray) -> float:
    """Return the mean share of epsilon that is used where the noise may go; 0 where it may go nowhere."""
    gate = get_segmentation(plan.method).gate(keyed(data), plan.settings)
    inside = np.broadcast_to(gate, images.shape)
    if not inside.any():
        return 0.0
    return float(np.abs(images - data.images)[inside].mean() / plan.settings.epsilon)
