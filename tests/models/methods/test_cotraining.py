"""Model and noise taking turns: EM, class-wise EM and REM, and what published code got wrong."""

from __future__ import annotations

from itertools import groupby, islice
from typing import Any

import numpy as np
import pytest

from medveil.models.errors import ConfigurationError, InputError
from medveil.models.methods import Batch, CoTraining, Progress, get
from medveil.models.methods.cotraining import mini_batches
from medveil.models.methods.em import EmSettings
from medveil.models.methods.em_classwise import ClasswiseSettings
from medveil.models.methods.rem import RemSettings

SHAPE = (1, 9, 7)


@pytest.mark.parametrize(
    ("count", "size"), [(2, 128), (3, 2), (127, 128), (129, 128), (255, 128), (500, 128)]
)
def test_no_image_is_dropped_and_no_mini_batch_is_a_single_image(count: int, size: int) -> None:
    parts = max(1, count // size)
    one_pass = list(islice(mini_batches(count, size, np.random.default_rng(0)), parts))
    assert sorted(np.concatenate(one_pass).tolist()) == list(range(count))
    assert min(len(part) for part in one_pass) >= 2


def test_every_pass_has_a_new_order() -> None:
    stream = mini_batches(50, 100, np.random.default_rng(0))
    assert next(stream).tolist() != next(stream).tolist()


def test_every_image_is_trained_on_and_protected(make_batch: Any, softmax: Any) -> None:
    batch = make_batch(7)
    oracle = softmax(3, SHAPE)
    training = CoTraining(batches_per_round=1, batch_size=4, rounds_min=1, rounds_max=1)
    delta = get("em").protect_set(batch, oracle, EmSettings(training=training))
    assert sum(len(images) for images in oracle.trained_on) == 7
    assert delta.any(axis=(1, 2, 3)).all()


def test_the_model_stands_still_while_the_noise_moves(make_batch: Any, softmax: Any) -> None:
    oracle = softmax(3, SHAPE)
    training = CoTraining(batches_per_round=3, rounds_min=2, rounds_max=2)
    get("em").protect_set(make_batch(6), oracle, EmSettings(steps=4, training=training))
    turns = [(name, len(list(calls))) for name, calls in groupby(oracle.calls)]
    # 3 SGD steps; 4 noise steps and one question how far it is; and again.
    assert turns == [("train", 3), ("ask", 5), ("train", 3), ("ask", 5)]


def test_the_model_is_trained_on_images_inside_the_range(make_batch: Any, softmax: Any) -> None:
    oracle = softmax(3, SHAPE)
    training = CoTraining(batches_per_round=2, rounds_min=3, rounds_max=3)
    get("em").protect_set(make_batch(6), oracle, EmSettings(training=training))
    assert min(images.min() for images in oracle.trained_on) >= 0
    assert max(images.max() for images in oracle.trained_on) <= 1


def test_the_model_is_trained_on_the_noise_so_far(make_batch: Any, softmax: Any) -> None:
    batch, oracle = make_batch(6), softmax(3, SHAPE)
    training = CoTraining(batches_per_round=1, rounds_min=2, rounds_max=2)
    get("em").protect_set(batch, oracle, EmSettings(training=training))
    clean = {image.tobytes() for image in batch.images}
    first, second = ({image.tobytes() for image in images} for images in oracle.trained_on)
    assert first == clean
    assert not second & clean


def test_the_seed_decides_the_order_of_training(make_batch: Any, softmax: Any) -> None:
    batch = make_batch(9)
    training = CoTraining(batches_per_round=1, batch_size=3, rounds_min=2, rounds_max=2)

    def trained_on(seed: int) -> Any:
        oracle = softmax(3, SHAPE)
        get("em").protect_set(batch, oracle, EmSettings(seed=seed, training=training))
        return oracle.trained_on[0]

    assert not np.array_equal(trained_on(0), trained_on(1))


class _Perfect:
    """A surrogate whose error is 0 from the start."""

    input_shape, classes = SHAPE, 3

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def loss_and_gradient(self, images: Any, targets: Any) -> Any:
        return np.full(len(images), self.loss, np.float32), np.ones_like(images)

    def train_step(self, images: Any, targets: Any) -> float:
        return self.loss


@pytest.mark.parametrize(("loss", "rounds"), [(0.0, 4), (5.0, 6)])
def test_it_ends_neither_at_the_first_zero_error_nor_never(make_batch: Any, loss: float, rounds: int) -> None:
    seen: list[Progress] = []
    training = CoTraining(rounds_min=4, rounds_max=6)
    get("em").protect_set(make_batch(3), _Perfect(loss), EmSettings(steps=1, training=training), seen.append)
    assert [p.round for p in seen] == list(range(1, rounds + 1))
    assert {p.error for p in seen} == {float(loss > 0)}
    assert seen[-1].rounds_max == 6


def test_an_error_in_the_callback_cancels_and_is_not_swallowed(make_batch: Any, softmax: Any) -> None:
    class CancelledError(Exception):
        pass

    def cancel(_progress: Progress) -> None:
        raise CancelledError

    oracle = softmax(3, SHAPE)
    with pytest.raises(CancelledError):
        get("em").protect_set(
            make_batch(3), oracle, EmSettings(training=CoTraining(batches_per_round=1)), cancel
        )
    assert oracle.calls.count("train") == 1


def test_em_makes_the_loss_small_on_the_model_it_trained(make_batch: Any, softmax: Any) -> None:
    batch = make_batch(12)
    losses: list[float] = []
    training = CoTraining(batches_per_round=2, rounds_min=5, rounds_max=5)
    settings = EmSettings(epsilon=0.1, training=training)
    get("em").protect_set(batch, softmax(3, SHAPE), settings, lambda p: losses.append(p.loss))
    assert losses[-1] < losses[0]


def test_class_wise_noise_is_one_pattern_per_class(make_batch: Any, softmax: Any) -> None:
    batch = make_batch(9)
    middle = Batch(batch.images / 2 + 0.25, batch.labels, batch.keys)
    training = CoTraining(batches_per_round=2, rounds_min=3, rounds_max=3)
    settings = ClasswiseSettings(mask_ratio=0.4, training=training, subset=1.0)
    delta = get("em-classwise").protect_set(middle, softmax(3, SHAPE), settings)
    for label in range(3):
        of_class = delta[middle.labels == label]
        assert of_class.any()
        assert (of_class == of_class[0]).all()
    assert not np.array_equal(delta[0], delta[1])


def test_a_class_pattern_follows_the_mean_gradient_of_its_class() -> None:
    class Given:
        """Each image's gradient is its value's distance from 0.5: -0.4 for one of class 0, +0.1 for two."""

        input_shape, classes = (1, 1, 1), 2

        def loss_and_gradient(self, images: Any, targets: Any) -> Any:
            return np.ones(len(images), np.float32), np.float32(0.1) * (images.round(1) - np.float32(0.5))

        def train_step(self, images: Any, targets: Any) -> float:
            return 1.0

    values = np.array([0.1, 0.6, 0.6, 0.6, 0.6], np.float32).reshape(5, 1, 1, 1)
    batch = Batch(values, np.array([0, 0, 0, 1, 1]), (b"a", b"b", b"c", b"d", b"e"))
    training = CoTraining(batches_per_round=1, rounds_min=1, rounds_max=1)
    delta = get("em-classwise").protect_set(batch, Given(), ClasswiseSettings(training=training, subset=1.0))
    assert np.sign(delta).ravel().tolist() == [1, 1, 1, -1, -1]


def test_sample_wise_noise_is_not_class_wise_by_accident(make_batch: Any, softmax: Any) -> None:
    # Published code looked its noise up by label instead of by image.
    batch = make_batch(6, classes=2)
    training = CoTraining(batches_per_round=2, rounds_min=2, rounds_max=2)
    delta = get("em").protect_set(batch, softmax(3, SHAPE), EmSettings(mask_ratio=0.5, training=training))
    assert len({one.tobytes() for one in delta}) == 6


def test_rem_trains_on_attacked_images_and_em_does_not(make_batch: Any, softmax: Any) -> None:
    batch = make_batch(6)
    training = CoTraining(batches_per_round=1, rounds_min=1, rounds_max=1)
    order = sorted(range(6), key=batch.keys.__getitem__)
    clean = {batch.images[i].tobytes() for i in order}

    def seen_first(name: str, settings: Any) -> set[bytes]:
        oracle = softmax(3, SHAPE)
        get(name).protect_set(batch, oracle, settings)
        return {image.tobytes() for image in oracle.trained_on[0]}

    assert seen_first("em", EmSettings(training=training)) == clean
    attacked = RemSettings(training=training, samples=1, crop_padding=0)
    assert not seen_first("rem", attacked) & clean


def test_rem_pays_for_every_sample_and_attack_step(make_batch: Any, softmax: Any) -> None:
    oracle = softmax(3, SHAPE)
    training = CoTraining(batches_per_round=1, rounds_min=1, rounds_max=1)
    settings = RemSettings(steps=3, samples=2, adversary_steps=4, training=training)
    get("rem").protect_set(make_batch(4), oracle, settings)
    # The mini-batch's attack, samples x steps x (attack + 1), and the question how far it is.
    assert oracle.calls.count("ask") == 4 + 2 * 3 * (4 + 1) + 1


def test_a_set_of_one_image_is_refused(make_batch: Any, softmax: Any) -> None:
    with pytest.raises(InputError) as refused:
        get("em").protect_set(make_batch(1), softmax(3, SHAPE), EmSettings())
    assert refused.value.code == "too-few-images"


@pytest.mark.parametrize(
    "wrong", [{"rounds_min": 9, "rounds_max": 8}, {"batch_size": 1}, {"batches_per_round": 0}]
)
def test_turns_that_make_no_sense_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError):
        CoTraining(**wrong)
