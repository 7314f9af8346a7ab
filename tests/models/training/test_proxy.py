from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from medveil.models.audit.victims import VictimRun, VictimSettings  # noqa: E402
from medveil.models.bundle.manifest import RecipeSettings  # noqa: E402
from medveil.models.quality.classification import Scores  # noqa: E402 (needs torch)
from medveil.models.training import DEFAULT_PLAN, Plan, TorchOracle, check_noise, fit, protect, proxy  # noqa: E402

pytestmark = pytest.mark.train

RECIPE = RecipeSettings(steps=3, warmup_steps=2, mask_ratio=0.25)
PLAN = Plan(
    members=(),
    recipe=RECIPE,
    strengthening=({"mask_ratio": 0.5}, {"mask_ratio": 1.0}),
    weakening=({"mask_ratio": 0.1},),
    victims=(VictimSettings(architecture="mobilenet"), VictimSettings(architecture="inception")),
    victim_steps=1,
    check_images=80,
)


@pytest.fixture
def oracle(examples: Callable[..., Any]) -> TorchOracle:
    return TorchOracle(fit.new_net("mlp", examples(2), 0), (1, 16, 16), 2)


class Victims:
    """Victims of given figures, two designs at a time, in the order in which they are trained.

    Every figure is `figures[i]`, or a pair: what the victim shows, and what of it can be recovered.
    """

    def __init__(self, *figures: float | tuple[float, float]) -> None:
        self._left = [figure for figure in figures for _ in PLAN.victims]
        self.seeds: list[int] = []

    def __call__(self, *_: object, seed: int, **__: object) -> VictimRun:
        self.seeds.append(seed)
        figure = self._left.pop(0)
        shown, recovered = figure if isinstance(figure, tuple) else (figure, figure)
        scores = Scores(
            accuracy=shown,
            balanced_accuracy=shown,
            auc=shown,
            recoverable_accuracy=recovered,
            recoverable_auc=recovered,
        )
        early = replace(scores, balanced_accuracy=0.95, recoverable_auc=0.96, recoverable_accuracy=0.97)
        return VictimRun((early, scores))


def check(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, limit_s: float | None = None
) -> Any:
    data, test = examples(80), examples(16, seed=2)
    return check_noise(PLAN, RECIPE, oracle, data, test, seed=0, limit_s=limit_s, reporter=silent)


def test_protected_images_are_stored_values_within_budget_and_mask(
    examples: Callable[..., Any], oracle: TorchOracle
) -> None:
    data = examples(6)
    data = replace(data, images=np.rint(data.images * 255).astype(np.float32) / np.float32(255))
    for epsilon in (8.0, 2.5):
        images = protect(data, oracle, RECIPE.model_copy(update={"epsilon_255": epsilon}))
        change = images * 255 - data.images * 255
        assert np.abs(images * 255 - np.rint(images * 255)).max() < 1e-3
        assert np.abs(change).max() <= epsilon + 1e-3
        assert (np.abs(change) > 0.5).sum(axis=(1, 2, 3)).max() <= 64
        assert change.min() < 0 < change.max()
        assert images.min() >= 0
        assert images.max() <= 1


def test_effective_noise_is_kept_and_repeated_under_every_seed(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    victims = Victims(0.9, 0.5, 0.9, 0.6, 0.9, 0.5)
    monkeypatch.setattr(proxy, "train_victim", victims)
    recipe, result = check(examples, oracle, silent)
    assert recipe == RECIPE
    assert (result.effective, result.attempts, result.images) == (True, 1, 80)
    assert [(v.architecture, v.seed) for v in result.victims] == [
        (name, seed) for seed in (0, 1, 2) for name in ("mobilenet", "inception")
    ]
    assert result.victims[2].clean.balanced_accuracy == 0.9
    assert result.victims[2].protected.balanced_accuracy == 0.6
    assert 30 < result.psnr_db < 60


def test_last_and_best_epochs_are_both_on_record(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", Victims(*[0.9, (0.5, 0.55)] * 3))
    victim = check(examples, oracle, silent)[1].victims[0]
    assert (victim.protected.auc, victim.recoverable_auc, victim.recoverable_accuracy) == (0.5, 0.55, 0.55)
    assert victim.protected_peak_balanced_accuracy == 0.95
    assert (victim.recoverable_peak_auc, victim.recoverable_peak_accuracy) == (0.96, 0.97)


def test_what_holds_under_one_seed_only_is_not_called_effective(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", Victims(0.9, 0.6, 0.9, 0.9))
    _, result = check(examples, oracle, silent)
    assert not result.effective
    assert {victim.seed for victim in result.victims} == {0, 1}  # the median already says no


def test_one_design_that_keeps_learning_is_enough_to_refuse(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    victims = Victims(0.9, 0.5, 0.9, 0.9)
    victims._left[3] = 0.9  # the second design, on protected images
    monkeypatch.setattr(proxy, "train_victim", victims)
    _, result = check(examples, oracle, silent)
    assert not result.effective


def test_degenerate_noise_is_strengthened_until_it_works(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", Victims(0.9, 0.85, 0.6, 0.9, 0.6, 0.9, 0.6))
    recipe, result = check(examples, oracle, silent)
    assert (recipe.mask_ratio, result.mask_ratio) == (0.5, 0.5)
    assert (result.effective, result.attempts) == (True, 2)


def test_answers_that_can_be_turned_back_call_for_less_noise_not_more(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = (0.1, 0.9)
    monkeypatch.setattr(proxy, "train_victim", Victims(0.9, turned, (0.4, 0.6), *[0.9, (0.4, 0.6)] * 2))
    recipe, result = check(examples, oracle, silent)
    assert (recipe.mask_ratio, result.attempts, result.effective) == (0.1, 2, True)


def test_noise_that_never_works_is_recorded_as_such(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", Victims(0.9, 0.9, 0.8, 0.85))
    recipe, result = check(examples, oracle, silent)
    assert (recipe.mask_ratio, result.mask_ratio) == (0.5, 0.5)  # the best of three
    assert (result.effective, result.attempts, len(result.victims)) == (False, 3, 2)


def test_victims_that_learn_nothing_from_clean_images_prove_nothing(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", Victims(0.51, 0.5, 0.5, 0.5))
    _, result = check(examples, oracle, silent)
    assert not result.effective


def test_the_default_plan_asks_what_the_word_protected_asks() -> None:
    members = {member.architecture for member in DEFAULT_PLAN.members}
    victims = {victim.architecture for victim in DEFAULT_PLAN.victims}
    assert len(victims) >= 2
    assert not members & victims
    assert DEFAULT_PLAN.seeds >= 3


def test_every_victim_takes_the_planned_steps_however_few_the_images() -> None:
    settings = VictimSettings(architecture="mobilenet", batch_size=32)
    for images in (20, 64, 400, 5000):
        epochs = proxy._long_enough(settings, images, 300).epochs
        assert 300 <= epochs * max(1, images // 32) < 300 + max(1, images // 32)


def test_a_binding_time_limit_means_fewer_images_and_attempts(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", Victims(0.9, 0.9))
    _, result = check(examples, oracle, silent, limit_s=1e-6)
    assert (result.images, result.attempts, result.effective) == (64, 1, False)


def test_without_time_for_every_seed_nothing_is_called_effective(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    victims = Victims(0.9, 0.5)
    monkeypatch.setattr(proxy, "train_victim", victims)
    _, result = check(examples, oracle, silent, limit_s=1e-6)
    assert not result.effective
    assert set(victims.seeds) == {0}
