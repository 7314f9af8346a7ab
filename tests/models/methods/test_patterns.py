"""Noise that needs no gradient (LSP, AR), and TAP's restarts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medveil.models.errors import ConfigurationError
from medveil.models.methods import Batch, get
from medveil.models.methods.ar import ArSettings, coefficients
from medveil.models.methods.lsp import LspSettings
from medveil.models.methods.tap import TapSettings


def grey(count: int, classes: int, side: int = 24) -> Batch:
    labels = (np.arange(count) % classes).astype(np.int64)
    keys = tuple(i.to_bytes(4, "big") for i in range(count))
    return Batch(np.full((count, 1, side, side), 0.5, np.float32), labels, keys)


@pytest.mark.parametrize("classes", [2, 7])
def test_lsp_noise_is_linearly_separable_on_images_not_fitted_on(classes: int) -> None:
    batch = grey(60, classes)
    noise = get("lsp").perturb(batch, None, LspSettings(epsilon=0.2)).reshape(60, -1)
    first, second = np.arange(60) < 30, np.arange(60) >= 30
    hot = np.eye(classes)[batch.labels]
    weights = np.linalg.lstsq(noise[first], hot[first], rcond=None)[0]
    assert ((noise[second] @ weights).argmax(axis=1) == batch.labels[second]).all()


def test_lsp_has_one_value_per_patch_and_the_stated_size() -> None:
    settings = LspSettings(epsilon=0.5, patch=8)
    delta = get("lsp").perturb(grey(4, 2), None, settings)
    tiles = delta.reshape(4, 3, 8, 3, 8)
    assert (tiles == tiles[:, :, :1, :, :1]).all()
    assert np.sqrt(np.square(delta).mean(axis=(1, 2, 3))) == pytest.approx(settings.rms, rel=1e-5)


def test_a_class_keeps_its_corner_whatever_other_classes_there_are() -> None:
    batch = grey(10, 5)
    few = batch.select(np.flatnonzero(batch.labels < 2))
    whole = get("lsp").perturb(batch, None, LspSettings())
    assert np.array_equal(whole[batch.labels < 2], get("lsp").perturb(few, None, LspSettings()))


@pytest.mark.parametrize("seed", range(5))
def test_as_many_classes_as_corners_get_a_corner_each(seed: int) -> None:
    batch = Batch(np.full((4, 1, 8, 16), 0.5, np.float32), np.arange(4), tuple(bytes([i]) for i in range(4)))
    delta = get("lsp").perturb(batch, None, LspSettings(seed=seed))
    assert len({tuple(np.sign(one[0, 0, [0, 8]])) for one in delta}) == 4


def test_patches_too_large_to_tell_classes_apart_are_refused() -> None:
    with pytest.raises(ConfigurationError):
        get("lsp").perturb(grey(3, 3, side=4), None, LspSettings(patch=8))


@pytest.mark.parametrize("side", [5, 24, 96])
def test_ar_noise_obeys_its_class_recurrence(side: int) -> None:
    delta = get("ar").perturb(grey(4, 2, side), None, ArSettings(epsilon=0.9))[:, 0].astype(float)
    for one, label in zip(delta, [0, 1, 0, 1], strict=True):
        beta = coefficients(label, 1, 0)[0]
        before = [one[i : side - 2 + i, j : side - 2 + j] for i in range(3) for j in range(3)][:8]
        predicted = sum(b * values for b, values in zip(beta, before, strict=True))
        assert predicted == pytest.approx(one[2:, 2:], abs=1e-4)


def test_no_class_of_forty_overflows_into_a_black_image() -> None:
    # Published coefficients of one class gave NaN, and its images were shipped black.
    delta = get("ar").perturb(grey(40, 40, side=36), None, ArSettings())
    rms = np.sqrt(np.square(delta).mean(axis=(1, 2, 3)))
    assert np.isfinite(delta).all()
    assert rms.min() > 0.5 * min(ArSettings().rms, 8 / 255)


def test_ar_coefficients_differ_by_class_and_channel_and_sum_to_one() -> None:
    first, second = coefficients(0, 3, 0), coefficients(1, 3, 0)
    assert first.shape == (3, 8)
    assert first.sum(axis=1) == pytest.approx(1)
    assert not np.allclose(first, second)
    assert not np.allclose(first[0], first[1])


def test_restarts_never_make_tap_worse_and_belong_to_the_image(make_batch: Any, softmax: Any) -> None:
    batch, oracle = make_batch(6), softmax(3, (1, 9, 7))

    class Wavy:
        """A loss with many valleys: where a descent starts matters."""

        input_shape, classes = (1, 9, 7), 3

        def loss_and_gradient(self, images: Any, targets: Any) -> Any:
            losses, gradient = oracle.loss_and_gradient(images, targets)
            waves = np.sin(150 * images)
            return losses + waves.sum(axis=(1, 2, 3)) / 10, gradient + 15 * np.cos(150 * images)

    settings = {"steps": 10, "step_size": 0.1, "epsilon": 0.1}
    targets = np.eye(3, dtype=np.float32)[(batch.labels + 1) % 3]

    def losses(restarts: int) -> Any:
        delta = get("tap").perturb(batch, Wavy(), TapSettings(restarts=restarts, **settings))
        return Wavy().loss_and_gradient(batch.images + delta, targets)[0]

    assert (losses(4) <= losses(1)).all()
    assert (losses(4) < losses(1)).any()
    whole = get("tap").perturb(batch, Wavy(), TapSettings(restarts=3, **settings))
    alone = get("tap").perturb(batch.select(np.array([4])), Wavy(), TapSettings(restarts=3, **settings))
    assert np.array_equal(alone[0], whole[4])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TapSettings(restarts=0),
        lambda: LspSettings(patch=0),
        lambda: ArSettings(crop=1),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError):
        wrong()
