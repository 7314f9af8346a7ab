"""SALM: where the answer is known in closed form, and the traps of section 2 of its reconstruction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medveil.models.errors import ConfigurationError
from medveil.models.methods import Batch, CoTraining, EnsembleOracle, Hardening, SalmSettings, get

EPSILON = 0.1


@pytest.fixture
def grey() -> Batch:
    """Two 4x4 images of value 0.5; with centres above and below it, the best noise is known."""
    return Batch(np.full((2, 1, 4, 4), 0.5, np.float32), np.array([0, 1]), (b"a", b"b"))


@pytest.fixture
def centres() -> Any:
    """Class 0 wants 0.1 everywhere; class 1 wants 0.9, and the more the lower the row and the column."""
    ramp = 0.6 + 0.02 * np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    return np.stack([np.full((1, 4, 4), 0.1, np.float32), ramp])


def test_noise_goes_all_the_way_towards_the_permuted_class(grey: Batch, centres: Any, quadratic: Any) -> None:
    settings = SalmSettings(epsilon=EPSILON, mask_ratio=1.0)
    delta = get("salm").perturb(grey, quadratic(centres), settings)
    assert delta[0] == pytest.approx(EPSILON)  # label 0 is pushed to class 1, which lies above
    assert delta[1] == pytest.approx(-EPSILON)  # label 1 to class 0, below


@pytest.mark.parametrize(("target", "sign"), [("permuted", 1), ("label", -1), ("away", 1)])
def test_the_target_decides_the_direction(
    grey: Batch, centres: Any, quadratic: Any, target: Any, sign: int
) -> None:
    settings = SalmSettings(epsilon=EPSILON, mask_ratio=1.0, target=target)
    assert get("salm").perturb(grey, quadratic(centres), settings)[0] == pytest.approx(sign * EPSILON)


def test_the_mask_is_where_gradients_are_largest(grey: Batch, centres: Any, quadratic: Any) -> None:
    settings = SalmSettings(epsilon=EPSILON, mask_ratio=0.25)
    delta = get("salm").perturb(grey, quadratic(centres), settings)
    assert np.flatnonzero(delta[0]).tolist() == [12, 13, 14, 15]


def test_the_mask_is_fixed_while_the_noise_accumulates(make_batch: Any, softmax: Any) -> None:
    # Choosing pixels anew at each step leaves noise of one step's size (reference, point 2).
    batch = make_batch(5)
    settings = SalmSettings(epsilon=EPSILON, mask_ratio=0.2, step_size=0.1, steps=20)
    middle = Batch(batch.images / 2 + 0.25, batch.labels, batch.keys)
    delta = get("salm").perturb(middle, softmax(3, (1, 9, 7)), settings)
    assert np.median(np.abs(delta[delta != 0])) == pytest.approx(EPSILON, rel=1e-5)


def test_accumulation_sees_pixels_that_the_first_gradient_does_not() -> None:
    # Pixel 1 matters only once pixel 0 has moved: its first gradient is zero.
    class Late:
        input_shape, classes = (1, 1, 3), 2

        def loss_and_gradient(self, images: Any, targets: Any) -> Any:
            moved = np.abs(images[:, 0, 0, 0] - 0.5)
            gradient = np.zeros_like(images)
            gradient[:, 0, 0, 0] = 0.1
            gradient[:, 0, 0, 1] = 100 * moved
            gradient[:, 0, 0, 2] = 0.05
            return np.zeros(len(images), np.float32), gradient

    batch = Batch(np.full((1, 1, 1, 3), 0.5, np.float32), np.array([0]), (b"a",))

    def touched(score: Any) -> list[int]:
        settings = SalmSettings(epsilon=EPSILON, mask_ratio=1 / 3, mask_score=score)
        return np.flatnonzero(get("salm").perturb(batch, Late(), settings)).tolist()

    assert touched("gradient") == [0]
    # Masked to pixel 1 alone, pixel 0 never moves and so its own gradient stays zero: nothing may change.
    assert touched("accumulated") == []


def test_every_warm_up_step_has_the_same_say() -> None:
    # The first step's gradient is a thousand times larger and points at pixel 0, the others' at pixel 1.
    class Fading:
        input_shape, classes = (1, 1, 2), 2

        def loss_and_gradient(self, images: Any, targets: Any) -> Any:
            first = np.abs(images - 0.5).max() == 0
            gradient = np.array([[[[1000, 1]]]] if first else [[[[0.1, 0.2]]]], np.float32)
            return np.zeros(len(images), np.float32), gradient

    batch = Batch(np.full((1, 1, 1, 2), 0.5, np.float32), np.array([0]), (b"a",))
    settings = SalmSettings(epsilon=EPSILON, mask_ratio=0.5, warmup_steps=6)
    assert np.flatnonzero(get("salm").perturb(batch, Fading(), settings)).tolist() == [1]


def test_hardening_changes_what_the_surrogate_is_asked(grey: Batch, centres: Any, quadratic: Any) -> None:
    plain, hard = quadratic(centres), quadratic(centres)
    hardening = Hardening(shifts=((0, 1),), adversary_radius=0.01, adversary_steps=2)
    get("salm").perturb(grey, plain, SalmSettings(steps=5, warmup_steps=2))
    get("salm").perturb(grey, hard, SalmSettings(steps=5, warmup_steps=2, hardening=hardening))
    assert hard.asked == plain.asked * 2 * 3  # two views, each attacked in two steps and asked once more


def test_soft_amplitude_spends_in_proportion_to_significance(
    grey: Batch, centres: Any, quadratic: Any
) -> None:
    settings = SalmSettings(epsilon=EPSILON, mask_ratio=0.5, amplitude="soft")
    delta = get("salm").perturb(grey, quadratic(centres), settings)[0].ravel()
    assert not delta[:8].any()
    assert (np.diff(delta[8:]) > 0).all()
    assert delta[15] == pytest.approx(EPSILON)


def test_the_psnr_floor_holds(make_batch: Any, softmax: Any) -> None:
    settings = SalmSettings(epsilon=EPSILON, mask_ratio=0.5, psnr_floor_db=36.0)
    delta = get("salm").perturb(make_batch(6), softmax(3, (1, 9, 7)), settings)
    psnr = -10 * np.log10(np.square(delta, dtype=np.float64).mean(axis=(1, 2, 3)))
    assert psnr.min() >= 36.0 - 1e-4
    assert psnr.min() < 36.1, "the floor was never reached: the test says nothing"


def test_an_ensemble_and_hardening_keep_company_independence(make_batch: Any, softmax: Any) -> None:
    batch = make_batch(7)
    oracle = EnsembleOracle([softmax(3, (1, 9, 7), seed=s) for s in range(3)])
    hardening = Hardening(blur_sigmas=(0.7,), shifts=((0, 1),), scales=(0.5,), adversary_radius=0.02)
    settings = SalmSettings(steps=3, warmup_steps=2, hardening=hardening)
    whole = get("salm").perturb(batch, oracle, settings)
    alone = [get("salm").perturb(batch.select(np.array([i])), oracle, settings) for i in range(7)]
    assert np.concatenate(alone).tobytes() == whole.tobytes()


def test_the_cost_is_warm_up_plus_steps(grey: Batch, centres: Any, quadratic: Any) -> None:
    oracle = quadratic(centres)
    get("salm").perturb(grey, oracle, SalmSettings(steps=7, warmup_steps=3))
    assert oracle.asked == 10


def test_co_training_fixes_the_mask_in_the_first_round() -> None:
    class Wandering:
        """After each SGD step another pixel has the largest gradient."""

        input_shape, classes, trained = (1, 2, 4), 2, 0

        def loss_and_gradient(self, images: Any, targets: Any) -> Any:
            gradient = np.full_like(images, 0.1)
            gradient.reshape(len(images), -1)[:, self.trained % 8] = 1
            return np.ones(len(images), np.float32), gradient

        def train_step(self, images: Any, targets: Any) -> float:
            self.trained += 1
            return 1.0

    batch = Batch(np.full((2, 1, 2, 4), 0.5, np.float32), np.array([0, 1]), (b"a", b"b"))
    training = CoTraining(batches_per_round=1, rounds_min=4, rounds_max=4)
    settings = SalmSettings(mask_ratio=1 / 8, steps=3, training=training)
    delta = get("salm").protect_set(batch, Wandering(), settings)
    assert [np.flatnonzero(one).tolist() for one in delta] == [[1], [1]]  # as after the first step
    assert delta.min() == pytest.approx(-settings.epsilon)


@pytest.mark.parametrize(
    "wrong",
    [
        {"confidence": 0.0},
        {"epsilon": 8},
        {"mask_ratio": 0.0},
        {"mask_ratio": 1.1},
        {"steps": 0},
        {"step_size": 0.0},
        {"warmup_steps": 0},
        {"seed": -1},
        {"target": "away", "hardening": Hardening(adversary_radius=0.01)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as refused:
        SalmSettings(**wrong)
    assert refused.value.code == "setting"
