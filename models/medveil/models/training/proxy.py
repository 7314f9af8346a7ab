"""Try the bundle's own noise: protect public images that no surrogate saw, and train small victims on them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from medveil.models import methods
from medveil.models.audit.victims import VictimRun, VictimSettings, train_victim
from medveil.models.bundle.manifest import ProxyCheck, ProxyVictim, RecipeSettings, Scores
from medveil.models.methods import Batch, GradientOracle
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import stored_steps
from medveil.models.quality.fidelity import psnr_db
from medveil.models.training.fit import Examples
from medveil.models.training.plan import Plan
from medveil.models.training.surrogates import LEAST_GAIN, Reporter

__all__ = ["check_noise", "protect"]

# Noise is degenerate unless the victims lose at least this share of what they learn from clean images.
_LEAST_LOSS = 0.5
# The area under the ROC curve of an answer by chance, whatever the number of classes.
_CHANCE_AUC = 0.5
# Images the gradient's speed is measured on, and the fewest that a victim can learn from at all.
_TIMED_IMAGES = 32
_FEWEST_IMAGES = 64


def protect(data: Examples, oracle: GradientOracle, recipe: RecipeSettings) -> FloatArray:
    """Return the images of `data` as a site would store them in 8 bits: protected, rounded, within the budget."""
    settings = recipe.method_settings()
    keys = tuple(hashlib.sha256(image.tobytes()).digest() for image in data.images)
    method = methods.get(recipe.method)
    delta = method.perturb(Batch(data.images, data.labels, keys), oracle, settings)
    return stored_steps(data.images, delta, settings.epsilon)


def check_noise(
    plan: Plan,
    recipe: RecipeSettings,
    oracle: GradientOracle,
    data: Examples,
    test: Examples,
    *,
    seed: int,
    limit_s: float | None,
    reporter: Reporter,
) -> tuple[RecipeSettings, ProxyCheck]:
    """Measure what victims learn from protected images; change the recipe while they learn too much.

    Recipes are screened with one seed. The one that takes most is repeated under the plan's other seeds, and only
    what holds under all of them is called effective.

    Args:
        plan: victims, seeds, and how to change the recipe.
        recipe: where to begin.
        oracle: the ensemble.
        data: public images that no surrogate learned from; these are protected.
        test: other such images, left clean.
        seed: of the first victims; the others' seeds follow it.
        limit_s: seconds for all of it; None: no limit. When it binds, fewer images are protected, fewer recipes
            tried, and fewer seeds; then the noise is not called effective.
        reporter: told of stages.

    Returns:
        The recipe that took most from the victims, and what was measured with it.
    """
    started = perf_counter()

    def out_of_time(next_s: float) -> bool:
        return limit_s is not None and perf_counter() - started + next_s > limit_s

    data = _affordable(_evenly(data, plan.check_images), oracle, recipe, limit_s)
    victims = tuple(_long_enough(settings, len(data), plan.victim_steps) for settings in plan.victims)

    def trained(images: FloatArray, victim_seed: int) -> tuple[VictimRun, ...]:
        return tuple(_victim(settings, data, images, test, victim_seed) for settings in victims)

    reporter.stage("victims on clean images")
    clean = [trained(data.images, seed)]
    victims_s = perf_counter() - started

    tried: list[_Trial] = []
    attempts = [recipe]
    while attempts:
        began = perf_counter()
        attempt = attempts.pop(0)
        reporter.stage(f"noise on held-out images, mask {attempt.mask_ratio:g}")
        images = protect(data, oracle, attempt)
        reporter.stage("victims on protected images")
        tried.append(_Trial(attempt, images, data.classes, [trained(images, seed)]))
        if tried[-1].lost(clean) >= _LEAST_LOSS or out_of_time(perf_counter() - began):
            break
        if len(tried) == 1:
            changes = plan.weakening if _turned_round(tried[0].protected[0]) else plan.strengthening
            attempts = [recipe.model_copy(update=dict(change)) for change in changes]
    best = max(tried, key=lambda trial: trial.lost(clean))  # the first of equals: the least changed

    seeds = [seed]
    # Another seed is worth its time only while all of them so far say yes.
    while len(seeds) < plan.seeds and best.lost(clean) >= _LEAST_LOSS and not out_of_time(2 * victims_s):
        seeds.append(seed + len(seeds))
        reporter.stage(f"victims once more, seed {len(seeds)} of {plan.seeds}")
        clean.append(trained(data.images, seeds[-1]))
        best.protected.append(trained(best.images, seeds[-1]))
    check = ProxyCheck(
        images=len(data),
        epsilon_255=best.recipe.epsilon_255,
        mask_ratio=best.recipe.mask_ratio,
        psnr_db=_median_psnr(data.images, best.images),
        attempts=len(tried),
        effective=len(seeds) == plan.seeds and best.lost(clean) >= _LEAST_LOSS,
        victims=tuple(
            _statement(settings, victim_seed, before, after)
            for victim_seed, *runs in zip(seeds, clean, best.protected, strict=True)
            for settings, before, after in zip(victims, *runs, strict=True)
        ),
    )
    return best.recipe, check


@dataclass(frozen=True, eq=False)
class _Trial:
    """One recipe, tried: its images, and per seed the victims that they made."""

    recipe: RecipeSettings
    images: FloatArray
    classes: int
    protected: list[tuple[VictimRun, ...]]

    def lost(self, clean: Sequence[tuple[VictimRun, ...]]) -> float:
        """Return the share of what victims learn from clean images that this takes from the least affected design.

        By recoverable AUC or recoverable accuracy, whichever lost less, at the end of training; the median over the
        seeds. What a relabelling of the answers brings back was never taken.
        """
        return min(
            _share_lost(
                [getattr(run.last, figure) for run in before],
                [getattr(run.last, figure) for run in after],
                chance,
            )
            for before, after in zip(zip(*clean, strict=True), zip(*self.protected, strict=True), strict=True)
            for figure, chance in (
                ("recoverable_auc", _CHANCE_AUC),
                ("recoverable_accuracy", 1 / self.classes),
            )
        )


def _long_enough(settings: VictimSettings, images: int, steps: int) -> VictimSettings:
    """Return the settings with the epochs that make up so many steps."""
    return replace(settings, epochs=math.ceil(steps / max(1, images // settings.batch_size)))


def _evenly(data: Examples, count: int) -> Examples:
    """Return at most `count` images, drawn evenly over the set."""
    if len(data) <= count:
        return data
    return data.select(np.linspace(0, len(data) - 1, count).astype(np.int64))


def _affordable(
    data: Examples, oracle: GradientOracle, recipe: RecipeSettings, limit_s: float | None
) -> Examples:
    """Return as many of the images as half the time is enough to protect."""
    if limit_s is None or len(data) <= _FEWEST_IMAGES:
        return data
    sample = data.images[:_TIMED_IMAGES]
    targets = np.full((len(sample), data.classes), 1 / data.classes, np.float32)
    start = perf_counter()
    oracle.loss_and_gradient(sample, targets)
    per_image_s = (perf_counter() - start) / len(sample) * (recipe.steps + recipe.warmup_steps)
    return _evenly(data, max(_FEWEST_IMAGES, int(0.5 * limit_s / per_image_s)))


def _victim(
    settings: VictimSettings, data: Examples, images: FloatArray, test: Examples, seed: int
) -> VictimRun:
    return train_victim(
        images, data.labels, test.images, test.labels, settings, classes=data.classes, seed=seed
    )


def _share_lost(clean: Sequence[float], protected: Sequence[float], chance: float) -> float:
    """Return how much of a victim's skill above chance the protection takes, in the median over the seeds.

    A victim that learns nothing from clean images either has nothing to lose: that proves no protection.
    """
    learned = float(np.median(clean)) - chance
    left = float(np.median(protected)) - chance
    return 0.0 if learned < LEAST_GAIN else 1 - max(left, 0) / learned


def _turned_round(protected: Sequence[VictimRun]) -> bool:
    """Return whether victims answer the wrong way round: the noise does more than hide, and less would hide more."""
    return float(np.mean([run.last.auc for run in protected])) < _CHANCE_AUC


def _median_psnr(before: FloatArray, after: FloatArray) -> float | None:
    """Return the median over the images in dB; None when most of them are unchanged and have none."""
    median = float(np.median(psnr_db(before, after)))
    return median if np.isfinite(median) else None


def _statement(settings: VictimSettings, seed: int, clean: VictimRun, protected: VictimRun) -> ProxyVictim:
    return ProxyVictim(
        architecture=settings.architecture,
        seed=seed,
        clean=_scores(clean),
        protected=_scores(protected),
        protected_peak_auc=max(scores.auc for scores in protected.history),
        protected_peak_balanced_accuracy=protected.peak.balanced_accuracy,
        recoverable_accuracy=protected.last.recoverable_accuracy,
        recoverable_auc=protected.last.recoverable_auc,
        recoverable_peak_accuracy=max(scores.recoverable_accuracy for scores in protected.history),
        recoverable_peak_auc=max(scores.recoverable_auc for scores in protected.history),
    )


def _scores(run: VictimRun) -> Scores:
    last = run.last
    return Scores(accuracy=last.accuracy, balanced_accuracy=last.balanced_accuracy, auc=last.auc)
