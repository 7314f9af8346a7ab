from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from medveil.models.errors import InputError
from medveil.models.methods import Batch, SalmSettings, Settings
from medveil.models.methods.base import Need
from medveil.models.methods.generated import bounded, from_perturbation, method_of

SHAPES = [(1, 9, 7), (3, 9, 7)]


def outputs(batch: Any, seed: int = 3) -> tuple[Any, Any]:
    """What an untrained generator might answer."""
    rng = np.random.default_rng(seed)
    count, _, rows, columns = batch.images.shape
    pattern = rng.uniform(-1, 1, batch.images.shape).astype(np.float32)
    return pattern, rng.random((count, 1, rows, columns), np.float32)


@pytest.mark.parametrize("colour", ["luma", "channels"])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_signed_and_keeps_budget_and_range(make_batch: Any, shape: Any, colour: Any) -> None:
    batch = make_batch(6, shape)
    epsilon = 8 / 255
    delta = bounded(batch, *outputs(batch), Settings(epsilon=epsilon, colour=colour))
    assert delta.shape == batch.images.shape
    assert delta.dtype == np.float32
    assert float(np.abs(delta).max()) <= epsilon
    assert (batch.images + delta).min() >= 0
    assert (batch.images + delta).max() <= 1
    assert (delta > 0).any()
    assert (delta < 0).any()


@pytest.mark.parametrize("ratio", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_the_best_scored_pixels_move(make_batch: Any, shape: Any, ratio: float) -> None:
    batch = make_batch(5, shape)
    grey = dataclasses.replace(batch, images=np.full_like(batch.images, 0.5))
    pattern, score = outputs(grey)
    moved = (bounded(grey, pattern, score, Settings(mask_ratio=ratio)) != 0).any(axis=1)
    k = math.ceil(ratio * shape[1] * shape[2])
    for image_moved, image_score in zip(moved, score[:, 0], strict=True):
        assert image_moved.sum() == k
        assert image_score[image_moved].min() >= image_score[~image_moved].max(initial=0)


def test_what_is_not_editable_stays(make_batch: Any) -> None:
    batch = make_batch(4)
    editable = np.ones((4, 1, 9, 7), bool)
    editable[:, :, :4] = False
    delta = bounded(dataclasses.replace(batch, editable=editable), *outputs(batch), Settings(mask_ratio=0.5))
    assert not delta[:, :, :4].any()
    assert delta[:, :, 4:].any()


def test_luma_moves_the_channels_of_a_pixel_together(make_batch: Any) -> None:
    batch = make_batch(4, (3, 9, 7))
    delta = bounded(batch, *outputs(batch), Settings(colour="luma"))
    assert delta.any()
    assert (delta == delta[:, :1]).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_one_output_says_the_same_at_any_scale(make_batch: Any, scale: float) -> None:
    batch = make_batch(5, (3, 9, 7))
    pattern, score = outputs(batch)
    settings = Settings(mask_ratio=0.3)
    expected = from_perturbation(batch, pattern * score, settings)
    assert (from_perturbation(batch, np.float32(scale) * pattern * score, settings) == expected).all()


def test_one_output_spends_all_of_epsilon_where_it_is_largest(make_batch: Any) -> None:
    batch = make_batch(5)
    grey = dataclasses.replace(batch, images=np.full_like(batch.images, 0.5))
    pattern, score = outputs(grey)
    delta = from_perturbation(grey, pattern * score, Settings(mask_ratio=0.3))
    moved = delta != 0
    assert np.abs(delta[moved]) == pytest.approx(8 / 255)
    assert (np.sign(delta[moved]) == np.sign(pattern[moved])).all()
    assert np.abs(pattern * score)[moved].min() > 0
    for one, wish in zip(moved, np.abs(pattern * score), strict=True):
        assert wish[one].min() >= wish[~one].max()


def test_an_image_gets_the_same_noise_in_any_company(make_batch: Any) -> None:
    batch = make_batch(6)
    pattern, score = outputs(batch)
    whole = bounded(batch, pattern, score, Settings(mask_ratio=0.4))
    alone = [
        bounded(batch.select(np.array([i])), pattern[i : i + 1], score[i : i + 1], Settings(mask_ratio=0.4))
        for i in range(6)
    ]
    assert np.concatenate(alone).tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("pattern", "score", "code"),
    [
        (lambda p: np.where(p > 0.9, np.nan, p), lambda s: s, "not-finite"),
        (lambda p: p, lambda s: np.where(s > 0.9, np.inf, s), "not-finite"),
        (lambda p: 1.5 * p, lambda s: s, "generator-range"),
        (lambda p: p, lambda s: s - 0.5, "generator-range"),
        (lambda p: p[:, :, 1:], lambda s: s, "batch-shape"),
        (lambda p: p, lambda s: s[:-1], "batch-shape"),
    ],
)
def test_what_a_generator_may_not_say_is_refused(
    make_batch: Any, pattern: Any, score: Any, code: str
) -> None:
    batch = make_batch(6)
    p, s = outputs(batch)
    with pytest.raises(InputError) as caught:
        bounded(batch, pattern(p), score(s), Settings())
    assert caught.value.code == code


def test_one_output_of_another_shape_is_refused(make_batch: Any) -> None:
    batch = make_batch(3)
    with pytest.raises(InputError, match="batch-shape"):
        from_perturbation(batch, np.zeros((3, 1, 9, 8), np.float32), Settings())


def test_the_mask_passes_over_pixels_without_room_towards_the_pattern() -> None:
    images = np.array([1, 1, 1, 0.5], np.float32).reshape(1, 1, 2, 2)
    batch = Batch(images, np.zeros(1, np.int64), (b"key",))
    score = np.array([9, 8, 7, 1], np.float32).reshape(1, 1, 2, 2)
    delta = bounded(batch, np.ones_like(images), score, Settings(epsilon=0.1, mask_ratio=0.25))
    assert delta.ravel() == pytest.approx([0, 0, 0, 0.1])


class Remembering:
    """A generator that answers with the image itself and remembers what it was told."""

    input_shape = (1, 9, 7)

    def __init__(self, takes_target: bool) -> None:
        self.takes_target = takes_target
        self.told: Any = "nothing yet"

    def perturbation(self, images: Any, targets: Any = None) -> Any:
        self.told = targets
        return images


@pytest.mark.parametrize("takes_target", [True, False])
def test_a_generator_as_a_method_is_told_the_permuted_class_if_it_asks(
    make_batch: Any, takes_target: bool
) -> None:
    batch, generator = make_batch(4), Remembering(takes_target)
    method = method_of(generator, classes=3)
    assert method.needs == {Need.NOTHING}
    method.perturb(batch, None, SalmSettings(permutation=(2, 0, 1)))
    if takes_target:
        assert generator.told.argmax(axis=1).tolist() == [(2, 0, 1)[label] for label in batch.labels]
    else:
        assert generator.told is None


def test_a_generator_refuses_images_of_another_size(make_batch: Any) -> None:
    with pytest.raises(InputError) as refused:
        method_of(Remembering(True), classes=3).perturb(make_batch(2, (1, 9, 8)), None, SalmSettings())
    assert refused.value.code == "generator-size"
