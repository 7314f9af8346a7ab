"""What every method of the registry promises, whatever it does inside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medveil.models.errors import ConfigurationError, InputError
from medveil.models.methods import REGISTRY, Batch, CoTraining, FloatArray, Method, Need, Settings, get

SHAPES = [(1, 9, 7), (3, 9, 7)]
FORMS = [
    pytest.param(name, form, id=f"{name}-{form}")
    for name, method in REGISTRY.items()
    for form in ("perturb", "protect_set")
    if (form == "protect_set") == (method.needs == {Need.TRAINING}) or len(method.needs) == 2
]
FROZEN = [name for name, method in REGISTRY.items() if method.needs != {Need.TRAINING}]


def settings_for(method: Method[Any], **changes: Any) -> Settings:
    """Few steps and rounds: the promises do not depend on their number."""
    names = {f.name for f in dataclasses.fields(method.settings)}
    if "training" in names:
        changes.setdefault(
            "training", CoTraining(batches_per_round=2, batch_size=4, rounds_min=2, rounds_max=3)
        )
    if "patch" in names:
        changes.setdefault("patch", 3)
    if "samples" in names:
        changes.update(samples=2, adversary_steps=2)
    changes = {"steps": 4, "step_size": 0.5, **changes}
    return method.settings(**changes)


@pytest.fixture
def run(softmax: Any) -> Callable[..., FloatArray]:
    """Run one form of a method with a fresh oracle."""

    def run_form(name: str, form: str, batch: Batch, **changes: Any) -> FloatArray:
        method = get(name)
        oracle = softmax(3, batch.images.shape[1:])
        delta: FloatArray = getattr(method, form)(batch, oracle, settings_for(method, **changes))
        return delta

    return run_form


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_noise_is_signed_and_keeps_budget_and_range(
    run: Any, make_batch: Any, name: str, form: str, shape: tuple[int, int, int]
) -> None:
    batch = make_batch(11, shape)
    epsilon = 8 / 255
    delta = run(name, form, batch, epsilon=epsilon, mask_ratio=1.0)
    assert delta.shape == batch.images.shape
    assert delta.dtype == np.float32
    assert np.isfinite(delta).all()
    assert float(np.abs(delta).max()) <= epsilon
    released = batch.images + delta
    assert released.min() >= 0
    assert released.max() <= 1
    for one in delta:
        assert (one > 0).any(), "the positive half is missing"
        assert (one < 0).any(), "the negative half is missing (dropped by published code)"


@pytest.mark.parametrize("ratio", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_outside_the_mask_nothing_moves(
    run: Any, make_batch: Any, name: str, form: str, shape: tuple[int, int, int], ratio: float
) -> None:
    batch = make_batch(7, shape)
    grey = dataclasses.replace(batch, images=np.full_like(batch.images, 0.5) + batch.images / 8)
    changed = (run(name, form, grey, mask_ratio=ratio, colour="channels") != 0).any(axis=1)
    k = math.ceil(ratio * shape[1] * shape[2])
    per_image = changed.reshape(7, -1).sum(axis=1)
    assert per_image.max() <= k
    # Away from 0 and 1 the mask is used, but for values that several steps have brought back to 0.
    assert per_image.min() >= 0.7 * k


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_what_is_not_editable_stays(run: Any, make_batch: Any, name: str, form: str) -> None:
    batch = make_batch(6)
    editable = np.ones((6, 1, 9, 7), bool)
    editable[:, :, :4] = False
    delta = run(name, form, dataclasses.replace(batch, editable=editable), mask_ratio=0.5)
    assert not delta[:, :, :4].any()
    assert delta[:, :, 4:].any()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_luma_moves_the_channels_of_a_pixel_together(run: Any, make_batch: Any, name: str, form: str) -> None:
    delta = run(name, form, make_batch(5, (3, 9, 7)), colour="luma")
    assert delta.any()
    assert (delta == delta[:, :1]).all()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_same_input_gives_the_same_bytes(run: Any, make_batch: Any, name: str, form: str) -> None:
    batch = make_batch(9)
    assert (
        run(name, form, batch, mask_ratio=0.4).tobytes() == run(name, form, batch, mask_ratio=0.4).tobytes()
    )


@pytest.mark.parametrize(("name", "form"), [f for f in FORMS if f.values[1] == "protect_set"])
def test_the_order_of_the_set_does_not_matter(run: Any, make_batch: Any, name: str, form: str) -> None:
    batch = make_batch(9)
    order = np.array([3, 8, 0, 1, 7, 2, 6, 5, 4])
    assert run(name, form, batch.select(order)).tobytes() == run(name, form, batch)[order].tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FROZEN)
def test_an_image_gets_the_same_noise_in_any_company(
    run: Any, make_batch: Any, name: str, shape: tuple[int, int, int]
) -> None:
    batch = make_batch(13, shape)
    whole = run(name, "perturb", batch, mask_ratio=0.4)
    order = np.random.default_rng(1).permutation(13)
    assert run(name, "perturb", batch.select(order), mask_ratio=0.4).tobytes() == whole[order].tobytes()
    # The last partial batch counts, down to a batch of one.
    parts = [batch.select(np.arange(a, b)) for a, b in [(0, 6), (6, 12), (12, 13)]]
    apart = np.concatenate([run(name, "perturb", part, mask_ratio=0.4) for part in parts])
    assert apart.tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", FROZEN)
def test_an_empty_batch_gives_empty_noise(run: Any, make_batch: Any, name: str) -> None:
    assert run(name, "perturb", make_batch(3).select(np.arange(0))).shape == (0, 1, 9, 7)


@pytest.mark.parametrize("name", ["lsp", "ar"])
def test_drawn_noise_belongs_to_the_key_and_not_to_index_or_label_alone(
    run: Any, make_batch: Any, name: str
) -> None:
    batch = make_batch(2, classes=1)
    same_image = dataclasses.replace(batch, images=np.full_like(batch.images, 0.5))
    first, second = run(name, "perturb", same_image)
    assert not np.array_equal(first, second), "two images of a class share their noise: that is class-wise"
    assert np.array_equal(run(name, "perturb", same_image.select(np.array([1])))[0], second)
    assert not np.array_equal(run(name, "perturb", same_image, seed=1)[0], first)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_one_class_alone_and_two_images_are_enough(run: Any, make_batch: Any, name: str, form: str) -> None:
    assert run(name, form, make_batch(2, classes=1)).any()


@pytest.mark.parametrize("name", [n for n in FROZEN if Need.GRADIENT in REGISTRY[n].needs])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_gradient_that_is_not_a_number_is_refused(
    softmax: Any, make_batch: Any, name: str, poison: float
) -> None:
    oracle = softmax(3, (1, 9, 7))
    oracle.loss_and_gradient = lambda images, targets: (
        np.zeros(len(images), np.float32),
        np.full_like(images, poison),
    )
    with pytest.raises(InputError) as refused:
        get(name).perturb(make_batch(2), oracle, settings_for(get(name)))
    assert refused.value.code == "not-finite"


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ConfigurationError, match="salm, em, em-classwise, rem, tap, lsp, ar") as refused:
        get("slam")
    assert refused.value.code == "unknown-method"


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_says_what_a_screen_needs(name: str) -> None:
    method = REGISTRY[name]
    assert method.info.name == name
    assert method.info.title
    assert "arXiv" in method.info.source
    assert method.info.task == "classification"
    assert method.info.version >= 1
    assert method.needs


def test_needs_follow_from_the_forms() -> None:
    assert REGISTRY["salm"].needs == {Need.GRADIENT, Need.TRAINING}
    assert REGISTRY["tap"].needs == {Need.GRADIENT}
    assert REGISTRY["rem"].needs == {Need.TRAINING}
    assert REGISTRY["ar"].needs == {Need.NOTHING}


@pytest.mark.parametrize(
    ("name", "form", "oracle_shape", "settings", "code"),
    [
        ("tap", "protect_set", (1, 9, 7), None, "no-training-form"),
        ("rem", "perturb", (1, 9, 7), None, "no-frozen-form"),
        ("salm", "perturb", None, None, "oracle-missing"),
        ("salm", "perturb", (1, 9, 8), None, "batch-shape"),
        ("salm", "perturb", (1, 9, 7), Settings(), "wrong-settings"),
        ("salm", "perturb", (1, 9, 7), {"permutation": (0, 2, 1)}, "permutation"),
        ("salm", "perturb", (1, 9, 7), {"permutation": (1, 0)}, "permutation"),
        ("lsp", "perturb", (1, 9, 7), {"mask_ratio": 0.5, "mask_score": "gradient"}, "setting"),
    ],
)
def test_a_wrong_call_is_refused_by_name(
    softmax: Any,
    make_batch: Any,
    name: str,
    form: str,
    oracle_shape: tuple[int, ...] | None,
    settings: Any,
    code: str,
) -> None:
    method = get(name)
    oracle = None if oracle_shape is None else softmax(3, oracle_shape)
    chosen = settings if isinstance(settings, Settings) else settings_for(method, **(settings or {}))
    with pytest.raises((ConfigurationError, InputError)) as refused:
        getattr(method, form)(make_batch(4), oracle, chosen)
    assert refused.value.code == code


def test_a_label_outside_the_taxonomy_is_refused(softmax: Any, make_batch: Any) -> None:
    with pytest.raises(InputError) as refused:
        get("tap").perturb(make_batch(4, classes=4), softmax(3, (1, 9, 7)), settings_for(get("tap")))
    assert refused.value.code == "unknown-class"
