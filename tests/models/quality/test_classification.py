"""Scores of victims: known cases, and the ways in which accuracy alone would flatter a protection."""

from __future__ import annotations

import numpy as np
import pytest

from medveil.models.quality import classification as metrics


def _logits(labels: np.ndarray, classes: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    return strength * np.eye(classes)[labels] + rng.normal(size=(len(labels), classes))


@pytest.fixture
def labels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 3, 600)


def test_auc_equals_the_share_of_pairs_in_the_right_order(rng: np.random.Generator) -> None:
    score, positive = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert metrics.auc(score, positive) == pytest.approx(np.mean(pairs))


def test_auc_without_one_of_the_groups_is_not_a_number() -> None:
    assert np.isnan(metrics.auc(np.arange(3.0), np.ones(3, bool)))


def test_a_relabelled_classifier_is_as_good_as_the_original_to_an_attacker(
    labels: np.ndarray, rng: np.random.Generator
) -> None:
    logits = _logits(labels, 3, 4.0, rng)
    permuted = logits[:, [1, 2, 0]]
    honest = metrics.evaluate(logits, labels, np.random.default_rng(1))
    fooled = metrics.evaluate(permuted, labels, np.random.default_rng(1))
    assert fooled.accuracy < 0.2
    assert fooled.recoverable_accuracy == pytest.approx(honest.recoverable_accuracy, abs=0.02)
    assert fooled.recoverable_auc == pytest.approx(honest.recoverable_auc, abs=0.02)


def test_a_shifted_threshold_is_recovered_by_fifty_clean_images(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 500)
    logits = _logits(labels, 2, 3.0, rng) + np.array([50.0, 0.0])
    scores = metrics.evaluate(logits, labels, rng)
    assert scores.balanced_accuracy == pytest.approx(0.5)
    assert scores.recoverable_accuracy > 0.85


def test_logits_without_information_recover_nothing(labels: np.ndarray, rng: np.random.Generator) -> None:
    scores = metrics.evaluate(rng.normal(size=(len(labels), 3)), labels, rng)
    assert scores.recoverable_auc < 0.57
    assert scores.recoverable_accuracy < 0.42


def test_two_class_recoverable_auc_is_the_larger_of_auc_and_its_mirror(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 300)
    logits = -_logits(labels, 2, 1.0, rng)
    score = metrics.auc(logits[:, 1] - logits[:, 0], labels == 1)
    assert score < 0.5
    assert metrics.recoverable_auc(logits, labels) == pytest.approx(1 - score)


def test_balanced_accuracy_does_not_reward_the_majority_class() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    assert metrics.balanced_accuracy(np.zeros(100, int), labels) == 0.5


def test_scores_refuse_logits_that_are_not_numbers(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite"):
        metrics.evaluate(np.full((len(labels), 3), np.nan), labels, np.random.default_rng(0))
