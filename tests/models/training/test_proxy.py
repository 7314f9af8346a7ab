from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from medveil.models.audit.metrics import Scores  # noqa: E402 (needs torch)
from medveil.models.audit.victims import VictimRun, VictimSettings  # noqa: E402
from medveil.models.bundle.manifest import RecipeSettings  # noqa: E402
from medveil.models.training import Plan, TorchOracle, check_noise, fit, protect, proxy  # noqa: E402

pytestmark = pytest.mark.train

RECIPE = RecipeSettings(steps=3, warmup_steps=2, mask_ratio=0.25)
PLAN = Plan(
    members=(),
    recipe=RECIPE,
    strengthening=({"mask_ratio": 0.5}, {"mask_ratio": 1.0}),
    victims=(VictimSettings(architecture="mobilenet"),),
    victim_steps=1,
    check_images=80,
)


@pytest.fixture
def oracle(examples: Callable[..., Any]) -> TorchOracle:
    return TorchOracle(fit.new_net("mlp", examples(2), 0), (1, 16, 16), 2)


def victims_that_score(balanced: Sequence[float]) -> Callable[..., VictimRun]:
    """Victims of the given balanced accuracies, in the order in which they are trained."""
    left = list(balanced)

    def train(*_: object, **__: object) -> VictimRun:
        value = left.pop(0)
        scores = Scores(
            accuracy=value,
            balanced_accuracy=value,
            auc=value,
            recoverable_accuracy=value,
            recoverable_auc=value,
        )
        return VictimRun((scores,))

    return train


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


def test_effective_noise_is_kept_as_it_is(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", victims_that_score([0.9, 0.5]))
    recipe, result = check(examples, oracle, silent)
    assert recipe == RECIPE
    assert (result.effective, result.attempts, result.images) == (True, 1, 80)
    assert result.victims[0].clean.balanced_accuracy == 0.9
    assert result.victims[0].protected.balanced_accuracy == 0.5
    assert 30 < result.psnr_db < 60


def test_degenerate_noise_is_strengthened_until_it_works(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", victims_that_score([0.9, 0.85, 0.6]))
    recipe, result = check(examples, oracle, silent)
    assert (recipe.mask_ratio, result.mask_ratio) == (0.5, 0.5)
    assert (result.effective, result.attempts) == (True, 2)


def test_noise_that_never_works_is_recorded_as_such(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", victims_that_score([0.9, 0.9, 0.8, 0.85]))
    recipe, result = check(examples, oracle, silent)
    assert (recipe.mask_ratio, result.mask_ratio) == (0.5, 0.5)  # the best of three
    assert (result.effective, result.attempts) == (False, 3)


def test_victims_that_learn_nothing_from_clean_images_prove_nothing(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", victims_that_score([0.51, 0.3, 0.5, 0.5]))
    _, result = check(examples, oracle, silent)
    assert not result.effective


def test_every_victim_takes_the_planned_steps_however_few_the_images() -> None:
    settings = VictimSettings(architecture="mobilenet", batch_size=32)
    for images in (20, 64, 400, 5000):
        epochs = proxy._long_enough(settings, images, 300).epochs
        assert 300 <= epochs * max(1, images // 32) < 300 + max(1, images // 32)


def test_a_binding_time_limit_means_fewer_images_and_attempts(
    examples: Callable[..., Any], oracle: TorchOracle, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "train_victim", victims_that_score([0.9, 0.9]))
    _, result = check(examples, oracle, silent, limit_s=1e-6)
    assert (result.images, result.attempts, result.effective) == (64, 1, False)
