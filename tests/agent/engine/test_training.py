"""A surrogate learns in plain onnxruntime, and answers with what it has learnt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import numpy_helper

from medveil.agent.engine import OnnxOracle, OnnxTrainableOracle, Resources, TrainingSettings
from medveil.agent.engine.opening import prove
from medveil.models.autodiff.admission import AdmittedGraph
from medveil.models.errors import ConfigurationError, SelfTestError

Admitted = Callable[..., AdmittedGraph]
RESOURCES = Resources("cpu", 2, 1 << 30)


def task(count: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images whose left or right half is brighter, off centre on purpose: batch norm has something to do."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = 0.6 + 0.1 * rng.random((count, 1, 8, 8))
    images[:, :, :, :4] += 0.2 * labels[:, None, None, None]
    images[:, :, :, 4:] += 0.2 * (1 - labels[:, None, None, None])
    return images.astype(np.float32), np.eye(2, dtype=np.float32)[labels]


def trained(graph: AdmittedGraph, steps: int, resources: Resources = RESOURCES) -> OnnxTrainableOracle:
    oracle = OnnxTrainableOracle("s", graph, resources)
    for step in range(steps):
        oracle.train_step(*task(seed=step))
    return oracle


def test_before_training_it_answers_as_the_frozen_surrogate(admitted: Admitted) -> None:
    graph = admitted("normalised")
    images, targets = task()
    frozen = OnnxOracle("s", graph, RESOURCES).loss_and_gradient(images, targets)
    for ours, theirs in zip(trained(graph, 0).loss_and_gradient(images, targets), frozen, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_training_lowers_the_loss_of_unseen_images(admitted: Admitted) -> None:
    oracle = OnnxTrainableOracle("s", admitted("normalised"), RESOURCES)
    first = oracle.train_step(*task(seed=0))
    for step in range(1, 40):
        last = oracle.train_step(*task(seed=step))
    unseen = oracle.loss_and_gradient(*task(seed=999))[0].mean()
    assert last < first / 4
    assert unseen < first / 4


def test_the_gradient_after_training_is_that_of_the_new_weights(admitted: Admitted) -> None:
    oracle = trained(admitted("normalised"), 10)
    prove(oracle.freeze(), None)
    undecided = task()[0], np.full((32, 2), 0.5, np.float32)
    before = oracle.loss_and_gradient(*undecided)[1]
    oracle.train_step(*task(seed=77))
    assert (oracle.loss_and_gradient(*undecided)[1] != before).any()


def test_evaluation_statistics_are_those_of_the_latest_batches(admitted: Admitted) -> None:
    graph = admitted("normalised")
    settings = TrainingSettings(calibration_batches=3)
    oracle = OnnxTrainableOracle("s", graph, RESOURCES, settings)
    for step in range(5):
        oracle.train_step(*task(seed=step))
    statistics = oracle._calibrated_statistics()
    batches = [task(seed=step)[0] for step in (2, 3, 4)]
    np.testing.assert_allclose(statistics["mean"], [np.mean([b.mean() for b in batches])], rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], [np.mean([b.var(ddof=1) for b in batches])], rtol=1e-3)


def test_young_running_averages_do_not_spoil_the_answers(admitted: Admitted) -> None:
    """One step after the start, running averages still are what the export said: nonsense for these images."""
    oracle = trained(admitted("normalised"), 1)
    in_training = oracle.train_step(*task(seed=1))
    assert oracle.loss_and_gradient(*task(seed=1))[0].mean() < 2 * in_training


def test_the_same_steps_give_the_same_bits_on_any_number_of_threads(admitted: Admitted) -> None:
    graph = admitted("normalised")
    answers = [
        trained(graph, 5, Resources("cpu", threads, 1 << 30)).loss_and_gradient(*task())[1].tobytes()
        for threads in (1, 2, 1)
    ]
    assert len(set(answers)) == 1


def test_training_leaves_the_admitted_graph_as_it_is(admitted: Admitted) -> None:
    graph = admitted("normalised")
    before = graph.model.SerializeToString(deterministic=True)
    trained(graph, 3).loss_and_gradient(*task())
    assert graph.model.SerializeToString(deterministic=True) == before
    assert {t.name for t in graph.model.graph.initializer} >= {"w1", "w2"}
    assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in graph.model.graph.initializer)


def test_a_batch_that_does_not_fit_is_refused(admitted: Admitted) -> None:
    images, targets = task()
    oracle = OnnxTrainableOracle("s", admitted("normalised"), RESOURCES)
    with pytest.raises(ConfigurationError, match="oracle-input"):
        oracle.train_step(images[:, :, :4], targets)
    with pytest.raises(ConfigurationError, match="oracle-input"):
        oracle.train_step(images, targets[:3])


def test_training_that_diverges_is_an_error_not_a_surrogate(admitted: Admitted) -> None:
    oracle = OnnxTrainableOracle("s", admitted("normalised"), RESOURCES, TrainingSettings(learning_rate=1e30))
    with pytest.raises(SelfTestError, match="non-finite"):
        [oracle.train_step(*task(seed=step)) for step in range(5)]
