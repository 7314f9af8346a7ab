from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medveil.models.bundle import check_answers
from medveil.models.errors import ConfigurationError, InputError, SelfTestError

torch = pytest.importorskip("torch")
from medveil.models.audit.segmentation_victims import (  # noqa: E402 (needs torch)
    SegmentationRun,
    SegmentationVictimScores,
    SegmentationVictimSettings,
)
from medveil.models.datasets.masked import Patches  # noqa: E402
from medveil.models.methods.segmentation import SegmentationSettings, get_segmentation  # noqa: E402
from medveil.models.quality import blurred as smooth  # noqa: E402
from medveil.models.quality import constant_mask_dice  # noqa: E402
from medveil.models.training import (  # noqa: E402
    TrainingState,
    segmentation_check,
    segmentation_drawn,
)
from medveil.models.training.fit import Diverged  # noqa: E402
from medveil.models.training.segmentation import (  # noqa: E402
    PLANS,
    GeneratorPlan,
    GeneratorTraining,
    _turn,
    answers,
    foreground_everywhere,
    keyed,
    overlap_loss,
    protect_patches,
)
from medveil.models.training.segmentation_check import check_segmentation, roi_psnr_db  # noqa: E402
from medveil.models.training.segmentation_drawn import DrawnPlan, gentlest_that_holds  # noqa: E402
from medveil.models.training.segmentation_em import error_minimised  # noqa: E402
from medveil.models.training.segmentation_golden import golden_answers  # noqa: E402
from medveil.models.training.segmentation_seeds import best_generators  # noqa: E402
from medveil.models.training.segmentation_views import blurred, compressed, random_view  # noqa: E402

pytestmark = pytest.mark.train

EPSILON = 4 / 255


def squares(count: int = 12, side: int = 16, seed: int = 0, classes: int = 2) -> Patches:
    """Bright squares on noise, 8 bits; with three classes every second square is of the second kind."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (count, 1, side, side)) / np.float32(255)
    labels = np.zeros((count, side, side), np.int64)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        top, left = rng.integers(1, side - 8, 2)
        image[0, top : top + 7, left : left + 7] += np.float32(80 / 255)
        label[top : top + 7, left : left + 7] = 1 + number % (classes - 1)
    return Patches(images.astype(np.float32), labels, classes)


def plan(name: str = "umed-plus", **changes: Any) -> GeneratorPlan:
    small = {"iterations": 8, "batch_size": 4, "settings": SegmentationSettings(band_radius=1)}
    clean_steps = min(2, PLANS[name].clean_steps)
    return replace(PLANS[name], **{**small, "clean_steps": clean_steps, **changes})


def trained(chosen: GeneratorPlan, data: Patches, seed: int = 0) -> GeneratorTraining:
    training = GeneratorTraining(chosen, data, seed)
    while not training.finished:
        training.step()
    return training


@pytest.mark.parametrize("name", ["umed", "umed-plus", "umed-targeted"])
def test_what_is_released_keeps_the_budget_and_the_gate(name: str) -> None:
    data, chosen = squares(), plan(name)
    images = protect_patches(data, name, chosen.settings, trained(chosen, data).generators)
    steps = (images - data.images) * 255
    assert np.abs(steps - np.rint(steps)).max() < 1e-3, "a site stores whole steps"
    assert np.abs(np.rint(steps)).max() <= 4
    gate = get_segmentation(name).gate(keyed(data), chosen.settings)
    assert not steps[~gate].any()
    assert steps[gate].any()


def test_the_trainer_composes_the_noise_as_a_site_does() -> None:
    data, chosen = squares(), plan("umed", settings=SegmentationSettings(band_radius=2))
    training = trained(chosen, data)
    for net in training.generators.values():
        net.eval()
    index = torch.arange(len(data))
    with torch.no_grad():
        released, _ = training._released(training._drawn(index, lambda x: x))
    delta = get_segmentation("umed").perturb(
        keyed(data), answers(training.generators, data.images), chosen.settings
    )
    np.testing.assert_allclose(released.numpy(), data.images + delta, atol=1e-6)


def test_the_same_seed_gives_the_same_generators_and_another_gives_others() -> None:
    data, chosen = squares(), plan()
    first, again, other = (
        protect_patches(data, chosen.method, chosen.settings, trained(chosen, data, seed).generators)
        for seed in (0, 0, 1)
    )
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_a_training_that_was_put_away_ends_where_it_would_have(tmp_path: Path) -> None:
    data, chosen = squares(), plan(surrogates=("unet-batch", "unet-instance"))
    state = TrainingState(tmp_path, "identity")
    begun = GeneratorTraining(chosen, data, 0)
    for _ in range(5):
        begun.step()
    state.keep("training", begun.state())
    continued = GeneratorTraining(chosen, data, 0)
    kept = state.load("training")
    assert kept is not None
    continued.restore(kept)
    while not continued.finished:
        continued.step()
    straight = trained(chosen, data)
    for part, net in straight.generators.items():
        for one, two in zip(net.parameters(), continued.generators[part].parameters(), strict=True):
            assert torch.equal(one, two)


def test_four_of_five_iterations_belong_to_the_generators() -> None:
    training = GeneratorTraining(plan("umed", iterations=10), squares(), 0)
    surrogate = training._surrogates[0]
    moved = []
    for _ in range(10):
        before = [p.clone() for p in surrogate.parameters()]
        training.step()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, surrogate.parameters(), strict=True)))
    assert moved == [True, False, False, False, False] * 2


def test_frozen_surrogates_learn_clean_images_first_and_stand_still_then() -> None:
    chosen = plan(target="permuted", hardened=False, clean_steps=3, iterations=4)
    training = GeneratorTraining(chosen, squares(), 0)
    assert chosen.all_iterations == 7
    surrogate, generator = training._surrogates[0], training.generators["contour"]
    moved = []
    while not training.finished:
        before = [[p.clone() for p in net.parameters()] for net in (surrogate, generator)]
        training.step()
        moved.append(
            tuple(
                any(not torch.equal(a, b) for a, b in zip(old, net.parameters(), strict=True))
                for old, net in zip(before, (surrogate, generator), strict=True)
            )
        )
    assert moved == [(True, False)] * 3 + [(False, True)] * 4


def test_a_batch_is_turned_and_mirrored_as_one() -> None:
    """A limit or a label that stays behind its image would teach the generators to move the wrong pixels."""
    data = squares()
    marked = replace(data, images=(data.labels[:, None] / 2).astype(np.float32))
    settings = SegmentationSettings(band_radius=0, texture_bound=False)
    training = GeneratorTraining(plan(settings=settings), marked, 0)
    seen = set()
    for draw in range(40):
        turn = _turn(np.random.default_rng(draw), square=True)
        batch = training._drawn(torch.arange(4), turn)
        inside = batch.labels > 0
        assert torch.equal(batch.images[:, 0] > 0, inside)
        assert torch.equal(batch.limits["texture"][:, 0] > 0, inside)
        seen.add(batch.labels.numpy().tobytes())
    assert len(seen) == 8, "the eight orientations of a square"


def test_a_permuted_target_moves_every_class_to_the_next() -> None:
    data = squares(classes=3)
    training = GeneratorTraining(plan(target="permuted"), data, 0)
    assert np.array_equal(training._aims.numpy(), (data.labels + 1) % 3)


def test_noise_that_is_no_number_ends_the_training() -> None:
    training = GeneratorTraining(plan(), squares(), 0)
    with torch.no_grad():
        training.generators["contour"].net.head.weight.fill_(float("nan"))
    with pytest.raises(Diverged):
        training.step()


def test_volumes_train_voxshield_within_the_foreground() -> None:
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (4, 1, 8, 8, 8)) / np.float32(255)).astype(np.float32)
    labels = np.zeros((4, 8, 8, 8), np.int64)
    labels[:, 2:6, 2:6, 2:6] = 1
    data = Patches(images, labels, 2)
    chosen = plan("voxshield", iterations=3, batch_size=2)
    released = protect_patches(data, "voxshield", chosen.settings, trained(chosen, data).generators)
    changed = released != images
    assert changed.any()
    assert not changed[:, 0][labels == 0].any()


def test_all_foreground_is_the_nearest_class_and_ones_without_any() -> None:
    labels = np.zeros((2, 5, 9), np.int64)
    labels[0, 2, 1], labels[0, 2, 7] = 1, 2
    filled = foreground_everywhere(labels)
    assert filled[0, 0, 0] == 1
    assert filled[0, 4, 8] == 2
    assert (filled[1] == 1).all()
    binary = foreground_everywhere((labels > 0).astype(np.int64))
    assert (binary == 1).all()


def test_the_loss_is_least_where_every_pixel_is_right() -> None:
    labels = torch.tensor([[[0, 1], [1, 2]]])
    right = 20 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    assert float(overlap_loss(right, labels)) < 1e-4
    assert float(overlap_loss(right.roll(1, 1), labels)) > 10


@pytest.mark.parametrize("change", [{"iterations": 0}, {"batch_size": 1}, {"surrogates": ()}, {"rate": 0.0}])
def test_a_plan_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        plan(**change)


def test_a_method_without_generators_is_refused() -> None:
    with pytest.raises(ConfigurationError) as refused:
        GeneratorPlan(method="roi-random")
    assert refused.value.code == "setting"


# --- views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 20, 18), (2, 1, 6, 8, 8)])
def test_every_view_keeps_the_shape_and_lets_gradients_through(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape).requires_grad_(True)
    seen = set()
    for seed in range(40):
        view = random_view(images, np.random.default_rng(seed))
        assert view.shape == images.shape
        (gradient,) = torch.autograd.grad(view.sum(), images)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
        seen.add(round(float((view - images).detach().abs().mean()), 6))
    assert len(seen) > 5


def test_a_blur_keeps_a_flat_image_and_jpeg_keeps_it_within_a_step() -> None:
    flat = torch.full((1, 2, 20, 18), 0.5)
    torch.testing.assert_close(blurred(flat, 1.0), flat)
    torch.testing.assert_close(compressed(flat, 75), flat, rtol=0, atol=16 / 255)


def test_compression_is_the_harder_the_lower_its_quality() -> None:
    torch.manual_seed(0)
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 34, 34), 3, 1)
    errors = [float((compressed(image, quality) - image).abs().mean()) for quality in (10, 50, 95)]
    assert errors[0] > errors[1] > errors[2] > 0


# --- baselines, seeds and check -----------------------------------------------------------------------------


def test_error_minimising_noise_keeps_to_its_foreground() -> None:
    data = squares(6)
    released = error_minimised(data, EPSILON, foreground_only=True, seed=0)
    changed = np.rint((released - data.images) * 255)
    assert np.abs(changed).max() <= 4
    assert changed.any()
    assert not changed[:, 0][data.labels == 0].any()


VICTIM = SegmentationVictimSettings(architecture="unet-bn", steps=4, batch_size=4, readings=2)


def test_the_check_states_both_sides_and_the_foregrounds_own_psnr() -> None:
    data, test = squares(8, classes=3), squares(4, seed=9, classes=3)
    images = protect_patches(data, "roi-random", SegmentationSettings(epsilon=EPSILON))
    check = check_segmentation(
        data, images, test, test.images, [VICTIM], epsilon_255=4, attempts=1, seeds=[0, 1]
    )
    first, second = check.victims
    assert (first.seed, second.seed) == (0, 1)
    victim = first
    assert 0 <= victim.protected_dice <= victim.protected_peak_dice <= 1
    assert victim.release_dice == victim.clean_dice, "what it reads here is the clean test itself"
    assert check.constant_mask_dice == constant_mask_dice(data.labels, test.labels, 3).mean()
    assert check.psnr_db is not None
    assert check.roi_psnr_db == roi_psnr_db(data, images)
    # Signs of full size everywhere in the foreground: 20 log10(255 / 4), wherever nothing was clipped.
    assert check.roi_psnr_db == pytest.approx(36.1, abs=0.1)
    assert check.psnr_db > check.roi_psnr_db + 3


def test_a_victim_that_learns_nothing_from_clean_images_proves_no_protection() -> None:
    data, test = squares(8), squares(4, seed=9)
    blank = Patches(np.zeros_like(data.images), data.labels, 2)
    check = check_segmentation(
        blank, blank.images, test, test.images, [VICTIM], epsilon_255=4, attempts=1, seeds=[0]
    )
    assert not check.effective


def test_a_victim_that_learns_no_more_than_positions_proves_no_protection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The square lies where it always lies: one constant mask finds it without a look at the image."""
    data = squares(4)
    same = replace(data, labels=np.repeat(data.labels[:1], 4, axis=0))

    def scripted(
        held: Patches, images: Any, test: Patches, settings: Any, *, seed: int, **_: Any
    ) -> SegmentationRun:
        dice = 0.9 if images is same.images else 0.1
        return SegmentationRun((dice,), SegmentationVictimScores(dice, dice, 0.0, 0, dice, dice))

    monkeypatch.setattr(segmentation_check, "dice_left", scripted)
    check = check_segmentation(
        same, same.images + 0, same, same.images, [VICTIM], epsilon_255=4, attempts=1, seeds=[0]
    )
    assert check.constant_mask_dice == 1
    assert not check.effective


def test_what_a_moved_threshold_recovers_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A victim that answers too seldom, or the wrong way round, has learned."""
    data = squares(4)

    def scripted(
        held: Patches, images: Any, test: Patches, settings: Any, *, seed: int, **_: Any
    ) -> SegmentationRun:
        dice = 0.9 if images is data.images else 0.0
        return SegmentationRun((dice,), SegmentationVictimScores(dice, dice, 0.0, 0, 0.9, dice))

    monkeypatch.setattr(segmentation_check, "dice_left", scripted)
    check = check_segmentation(
        data, data.images + 0, data, data.images, [VICTIM], epsilon_255=4, attempts=1, seeds=[0]
    )
    assert check.victims[0].protected_dice == 0
    assert check.victims[0].recoverable_dice == 0.9
    assert not check.effective


@pytest.mark.parametrize(
    ("protected", "effective"),
    [((0.1, 0.2, 0.3), True), ((0.1, 0.1, 0.78), False), ((0.1, 0.78, 0.78), False)],
    ids=["all hold", "one seed escapes", "two seeds escape"],
)
def test_the_word_follows_the_seed_that_recovers_most(
    protected: tuple[float, ...], effective: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = squares(4), []

    def scripted(
        held: Patches, images: Any, test: Patches, settings: Any, *, seed: int, **_: Any
    ) -> SegmentationRun:
        dice = 0.8 if images is data.images else protected[seed]
        return SegmentationRun((dice,), SegmentationVictimScores(dice, dice, 0.0, 0, dice, dice))

    monkeypatch.setattr(segmentation_check, "dice_left", scripted)
    check = check_segmentation(
        data,
        data.images + 0,
        data,
        data.images,
        [VICTIM],
        epsilon_255=4,
        attempts=1,
        seeds=[0, 1, 2],
        advance=seen.append,
    )
    assert check.effective is effective
    assert len(seen) == 6 + 6
    assert sum(seen) == pytest.approx(1)


@pytest.mark.parametrize(("after_blur", "holds"), [(0.2, True), (0.75, False)])
def test_the_check_tries_a_blur_of_training_and_test_images_alike(
    after_blur: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, test = squares(4), squares(4, seed=1)
    protected = np.clip(data.images + np.float32(EPSILON), 0, 1)
    soft, soft_test = smooth(data.images), smooth(test.images)

    def scripted(
        held: Patches, images: Any, tested: Patches, settings: Any, *, seed: int, protected_test: Any
    ) -> SegmentationRun:
        filtered = np.array_equal(tested.images, soft_test)
        assert filtered or np.array_equal(tested.images, test.images)
        assert (protected_test is None) is filtered
        clean = soft if filtered else data.images
        dice = 0.8 if np.array_equal(images, clean) else after_blur if filtered else 0.1
        if filtered and dice == after_blur:
            assert np.array_equal(images, smooth(protected))
        return SegmentationRun((dice,), SegmentationVictimScores(dice, dice, 0.0, 0, dice, dice))

    monkeypatch.setattr(segmentation_check, "dice_left", scripted)
    check = check_segmentation(
        data, protected, test, test.images, [VICTIM], epsilon_255=4, attempts=1, seeds=[0, 1, 2]
    )
    assert check.effective
    assert check.holds_after_blur is holds
    assert [victim.seed for victim in check.blurred_victims] == [0, 1, 2]


# --- drawn noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "chosen"),
    [((0.1, 0.1, 0.1), 0), ((0.79, 0.2, 0.1), 1), ((0.79, 0.79, 0.79), 2)],
    ids=["the first holds", "the second holds", "none holds"],
)
def test_the_gentlest_budget_that_holds_is_kept_and_no_victim_trained_twice(
    left: tuple[float, ...], chosen: int, tmp_path: Path, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, test = squares(6), squares(4, seed=1)
    budgets = tuple(SegmentationSettings(epsilon=e / 255, band_radius=0) for e in (2, 4, 8))
    runs = []

    def scripted(held: Patches, images: Any, *_: Any, **__: Any) -> SegmentationRun:
        change = round(255 * float(np.abs(images - held.images).max()))
        runs.append(change)
        dice = {0: 0.8, 2: left[0], 4: left[1], 8: left[2]}[change]
        return SegmentationRun((dice,), SegmentationVictimScores(dice, dice, 0.0, 0, dice, dice))

    monkeypatch.setattr(segmentation_drawn, "dice_left", scripted)

    def run() -> Any:
        return gentlest_that_holds(
            DrawnPlan(method="grating", budgets=budgets),
            tried,
            test,
            VICTIM,
            seed=5,
            state=TrainingState(tmp_path, "identity"),
            reporter=silent,
            seconds=1.0,
        )

    noise = run()
    assert noise.settings == budgets[chosen]
    assert noise.attempts == chosen + 1
    assert noise.generators == {}
    assert runs == [0, 2, 4, 8][: chosen + 2]
    assert run().images.tobytes() == noise.images.tobytes()
    assert len(runs) == chosen + 2


def test_a_drawn_plan_takes_methods_that_draw_and_some_budget() -> None:
    for method, budgets in (("umed", (SegmentationSettings(),)), ("grating", ())):
        with pytest.raises(ConfigurationError) as refused:
            DrawnPlan(method=method, budgets=budgets)
        assert refused.value.code == "setting"


def test_golden_answers_are_the_generators_own_and_another_generator_gives_others() -> None:
    first, other = (trained(plan(), squares(), seed).generators["contour"] for seed in (0, 1))
    golden = golden_answers(first, squares().images[0], (1, 40, 24))
    assert golden.images.shape == golden.answers.shape == (1, 1, 40, 24)
    assert np.abs(golden.answers).max() <= 1

    def session(net: torch.nn.Module) -> Any:
        return SimpleNamespace(perturbation=lambda images: answers({"contour": net}, images)["contour"])

    check_answers(session(first), golden, name="contour")
    with pytest.raises(SelfTestError):
        check_answers(session(other), golden, name="contour")


def test_the_seed_that_leaves_least_is_kept_and_its_training_not_repeated(
    tmp_path: Path, silent: Any
) -> None:
    data, tried, test = squares(12), squares(8, seed=1), squares(4, seed=2)
    state = TrainingState(tmp_path, "identity")

    def run() -> Any:
        return best_generators(
            plan(iterations=30),
            data,
            tried,
            test,
            VICTIM,
            seeds=[3, 4],
            state=state,
            reporter=silent,
            seconds=1.0,
        )

    best = run()
    kept = {n: state.load(f"seed{n}.tried") for n in (1, 2)}
    dices = {n: value["dice"] for n, value in kept.items() if value is not None}
    assert best.dice == min(dices.values())
    assert best.attempts == 2
    again = run()
    assert again.seed == best.seed
    assert again.images.tobytes() == best.images.tobytes()


def test_generators_that_died_with_every_seed_are_refused(tmp_path: Path, silent: Any) -> None:
    data = squares(8)
    blank = Patches(data.images, np.zeros_like(data.labels), 2)
    with pytest.raises(InputError) as refused:
        best_generators(
            plan(iterations=2),
            data,
            blank,
            data,
            VICTIM,
            seeds=[0],
            state=TrainingState(tmp_path, "identity"),
            reporter=silent,
            seconds=1.0,
        )
    assert refused.value.code == "degenerate-generator"
