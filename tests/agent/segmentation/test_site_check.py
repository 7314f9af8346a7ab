"""The site's own check of a release with masks: U-Nets learn, patients stay apart, the word claims no more."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medveil.agent.engine import Resources
from medveil.agent.imageio import Derivation, DerivedUids, DicomFormat, Item
from medveil.agent.job import Job, Outcome
from medveil.agent.ledger import Ledger
from medveil.agent.protect import protect
from medveil.agent.segmentation.site_check import MaskedFinding, MaskedSiteCheck
from medveil.agent.segmentation.site_check import check as check_module
from medveil.agent.segmentation.site_check.check import MaskedCheckSettings, check_patches
from medveil.agent.segmentation.site_check.networks import ARCHITECTURES, draw_segmenter
from medveil.agent.segmentation.site_check.pairs import MaskedPairs, MaskedReader, of_one_size
from medveil.agent.segmentation.site_check.sample import FEWEST_HOLD_OUT, FEWEST_TRAINING, drawn
from medveil.agent.segmentation.site_check.training import SCHEDULE, Scoring, _AdamW, train_segmenter
from medveil.agent.segmentation.site_check.verdict import finding_of, mean_interval
from medveil.agent.victim_check.runs import OutOfTime
from medveil.agent.victim_check.sample import Candidate
from medveil.models.autodiff.graph import LOGITS
from medveil.models.errors import ConfigurationError, InputError
from medveil.models.methods.contour import band
from medveil.models.methods.oracle import FloatArray
from medveil.models.quality import blurred, constant_mask_dice
from medveil.models.quality.segmentation import LEAST_GAIN

RESOURCES = Resources("cpu", 1, 1 << 28)
SHORT = replace(SCHEDULE, steps=40, batch_size=8, scored=2)
SIDE = 16


def squares(count: int, seed: int, contrast: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Brighter squares on noise."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 0.4, (count, 1, SIDE, SIDE)).astype(np.float32)
    labels = np.zeros((count, SIDE, SIDE), np.int64)
    for image, label in zip(images, labels, strict=True):
        top, left = rng.integers(0, 9, 2)
        image[0, top : top + 7, left : left + 7] += np.float32(contrast)
        label[top : top + 7, left : left + 7] = 1
    return images, labels


def trained(architecture: str, images: np.ndarray, labels: np.ndarray, seed: int = 0) -> Sequence[Scoring]:
    rng = np.random.default_rng(seed)
    graph = draw_segmenter(architecture, shape=(1, SIDE, SIDE), classes=2, rng=rng)
    return train_segmenter(graph, images, labels, squares(12, 9), SHORT, resources=RESOURCES, rng=rng)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_victim_finds_what_is_plain_to_see_and_nothing_that_it_was_not_shown(architecture: str) -> None:
    images, labels = squares(32, 0)
    history = trained(architecture, images, labels)
    assert [at.dice.shape for at in history] == [at.recoverable.shape for at in history] == [(12,), (12,)]
    last = history[-1]
    assert last.dice.mean() > 0.8
    # With two classes the answers are one threshold of many; these are tried on a grid.
    assert last.recoverable.mean() > last.dice.mean() - 0.02
    blind = trained(architecture, *squares(32, 0, contrast=0))[-1]
    assert blind.dice.mean() < last.dice.mean() - 0.15
    assert blind.recoverable.mean() < last.recoverable.mean() - 0.15


def test_a_victim_that_learned_everything_the_wrong_way_round_has_learned_it() -> None:
    images, labels = squares(32, 0)
    last = trained("unet-bn", images, 1 - labels)[-1]
    assert last.dice.mean() < 0.2
    assert last.recoverable.mean() > 0.7


def test_the_same_seed_gives_the_same_victim_and_another_gives_another() -> None:
    images, labels = squares(8, 0)
    first, again, other = (trained("unet-bn", images, labels, seed)[-1] for seed in (0, 0, 1))
    assert first.dice.tobytes() == again.dice.tobytes()
    assert first.recoverable.tobytes() == again.recoverable.tobytes()
    assert first.dice.tobytes() != other.dice.tobytes()


def test_the_optimiser_is_adam_with_decoupled_decay() -> None:
    """Bias-corrected, the first step is the rate in the gradient's direction, whatever its size (arXiv 1412.6980)."""
    optimiser = _AdamW(replace(SHORT, weight_decay=0.5))
    state = {
        "w": np.array([1.0, -2.0, 3.0], np.float32),
        "momentum/w": np.array([1e-3, -5.0, 0.0], np.float32),
        "mean": np.array([7.0], np.float32),
    }
    moved = optimiser.moved(state, 0.1)
    decay = np.array([-0.05, 0.1, -0.15])
    np.testing.assert_allclose(moved["w"] - state["w"], np.array([-0.1, 0.1, 0.0]) + decay, atol=1e-5)
    assert moved["mean"] is state["mean"]
    again = optimiser.moved(moved | {"momentum/w": -state["momentum/w"]}, 0.1)
    first = (0.9 * 0.1 - 0.1) / (1 - 0.9**2)  # of a gradient that turned round, in its own size
    np.testing.assert_allclose(
        again["w"] - moved["w"] + 0.05 * moved["w"], -0.1 * np.array([first, -first, 0]), atol=1e-4
    )


def test_a_victim_gives_up_when_its_time_is_over() -> None:
    rng = np.random.default_rng(0)
    graph = draw_segmenter("unet-bn", shape=(1, SIDE, SIDE), classes=2, rng=rng)
    with pytest.raises(OutOfTime):
        train_segmenter(
            graph, *squares(8, 0), squares(4, 1), SHORT, resources=RESOURCES, rng=rng, until=-np.inf
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_victim_scores_every_pixel_for_every_class(architecture: str) -> None:
    graph = draw_segmenter(architecture, shape=(3, 24, 32), classes=4, rng=np.random.default_rng(0))
    assert (graph.input_shape, graph.output_shape) == ((3, 24, 32), (4, 24, 32))
    assert graph.model.graph.output[0].name == LOGITS
    norms = {node.op_type for node in graph.model.graph.node} & {
        "BatchNormalization",
        "InstanceNormalization",
    }
    assert norms == {"BatchNormalization" if architecture == "unet-bn" else "InstanceNormalization"}


def test_an_unknown_victim_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ConfigurationError, match="unet-bn, unet-in"):
        draw_segmenter("sam", shape=(1, 8, 8), classes=2, rng=np.random.default_rng(0))


# --- the draw -----------------------------------------------------------------------------------------------


def volumes(files: int, per_file: int) -> list[Candidate]:
    """Volumes; their first slice is empty."""
    return [
        Candidate(number, frame, frame, min(frame, 1), f"{number:04x}{frame:04x}{'0' * 56}", True)
        for number in range(files)
        for frame in range(per_file)
    ]


@given(
    files=st.integers(7, 30), per_file=st.integers(2, 12), seed=st.integers(0, 5), most=st.integers(60, 300)
)
def test_no_patient_is_on_both_sides_and_no_empty_slice_takes_part(
    files: int, per_file: int, seed: int, most: int
) -> None:
    # Two files each are one series.
    units = {number: f"series {number // 2}" for number in range(files)}
    candidates = volumes(files, per_file)
    if (files + 1) // 2 < FEWEST_HOLD_OUT + FEWEST_TRAINING:
        with pytest.raises(InputError) as refused:
            drawn(candidates, units, seed=seed, most=most)
        assert refused.value.code == "too-few-images"
        return
    split = drawn(candidates, units, seed=seed, most=most)
    sides = [{units[c.file] for c in side} for side in (split.training, split.hold_out)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) >= FEWEST_TRAINING
    assert len(sides[1]) >= FEWEST_HOLD_OUT
    assert all(c.class_index > 0 for c in (*split.training, *split.hold_out))
    assert drawn(candidates[::-1], units, seed=seed, most=most) == split


def test_a_copy_of_a_slice_counts_once() -> None:
    single = volumes(FEWEST_HOLD_OUT + FEWEST_TRAINING, 2)
    twins = [replace(candidate, file=100 + candidate.file) for candidate in single]
    split = drawn([*single, *twins], {}, seed=0, most=100)
    assert len(split.training) + len(split.hold_out) == len(single) // 2


# --- the patches --------------------------------------------------------------------------------------------


def reader_of(job: Job, outcome: Outcome, ledger: Ledger) -> MaskedReader:
    assert job.class_map is not None
    return MaskedReader(outcome.workspace, ledger, job.source, job.formats, job.class_map)


def test_both_kinds_show_the_same_places_and_differ_where_the_noise_may_go(
    job: Callable[..., Job], tmp_path: Path, rng: np.random.Generator, disc: Any, save_volume: Any
) -> None:
    """Two volumes of 36 x 40 x 6 voxels, marked in three slices each, and one image of the same classes."""
    source = tmp_path / "source"
    for number in range(2):
        labels = np.stack([disc(value=int(1 < z < 5)).T for z in range(6)], axis=2)
        save_volume(source / f"images/{number}.nii.gz", rng.integers(100, 900, (36, 40, 6)).astype(np.int16))
        save_volume(source / f"labels/{number}.nii.gz", labels)
    asked = job(source, tmp_path / "out")
    outcome = protect(asked)
    with Ledger(outcome.workspace.ledger_path) as ledger:
        reader = reader_of(asked, outcome, ledger)
        chosen = [c for c in reader.candidates() if c.class_index]
        assert len(chosen) == 6
        found = reader.patches(chosen, wanted=12, channels=3)
        again = reader.patches(chosen[:2], wanted=4, channels=3)
    assert found.clean.shape == found.protected.shape == (12, 3, 40, 40)
    assert found.units.tolist() == [0] * 6 + [1] * 6
    changed = (found.clean != found.protected).any(axis=1)
    assert not changed[~(found.labels > 0) & ~band(found.labels, 1)].any()
    assert changed.any(axis=(1, 2)).all()
    assert np.abs(found.clean - found.protected).max() <= 4 / 255 + 1e-6
    # What an image gives does not depend on the others.
    np.testing.assert_array_equal(again.protected, found.protected[:4])


def test_the_slices_of_a_series_are_one_patient(
    job: Callable[..., Job], slices: list[Item], segmentation: Any, tmp_path: Path
) -> None:
    mask = np.zeros((6, 7), np.uint8)
    mask[2:4, 2:5] = 1
    segmentation([(1, 1, mask), (1, 2, mask)])
    derivation = Derivation(
        DerivedUids(bytes(32), "alone", "policy"), datetime(2026, 11, 21), "Protected", "0.1.0"
    )
    names = ("background", "liver", "tumour")
    asked = job(slices[0].path.parent, tmp_path / "out", names=names, formats=(DicomFormat(derivation),))
    outcome = protect(asked)
    with Ledger(outcome.workspace.ledger_path) as ledger:
        reader = reader_of(asked, outcome, ledger)
        chosen = [c for c in reader.candidates() if c.class_index]
        found = reader.patches(chosen, wanted=2, channels=1)
    assert set(reader.units.values()) == {"series 0"}
    assert found.clean.shape == (2, 1, 8, 8)
    assert found.units.tolist() == [0, 0]
    assert (found.labels > 0).sum() == 12


def test_small_images_of_two_sizes_give_patches_of_one() -> None:
    small, large = pairs(4, 0, protected=True), pairs(3, 1, protected=True)
    cut = replace(
        small,
        clean=small.clean[..., :12, :12],
        protected=small.protected[..., :12, :12],
        labels=small.labels[..., :12, :12],
    )
    for first, second in (of_one_size(cut, large), of_one_size(large, cut)[::-1]):
        for name in ("clean", "protected", "labels"):
            filled = getattr(first, name)
            np.testing.assert_array_equal(filled[..., :12, :12], getattr(cut, name))
            assert filled.shape[-2:] == (SIDE, SIDE)
            assert not filled[..., 12:, :].any()
            assert not filled[..., 12:].any()
            np.testing.assert_array_equal(getattr(second, name), getattr(large, name))


# --- the word -----------------------------------------------------------------------------------------------


def found(
    architecture: str,
    clean: float,
    protected: float,
    spread: float = 0.0,
    constant: float = 0.0,
    recoverable: float | None = None,
) -> MaskedFinding:
    """What one victim found on twelve patients, in three seeds; the protected one also by moved thresholds."""
    units = np.repeat(np.arange(12), 2)
    noise = np.where(units % 2, spread, -spread)
    return finding_of(
        architecture,
        [[even(clean / 2), even(clean)]] * 3,
        [[even(protected + 0.02), even(protected, recoverable, noise)]] * 3,
        units,
        constant,
    )


def even(dice: float, recoverable: float | None = None, noise: np.ndarray | None = None) -> Scoring:
    """The same on every one of 24 patches, but for the noise; no threshold gives more than the answers themselves."""
    noise = np.zeros(24) if noise is None else noise
    return Scoring(dice + noise, (dice if recoverable is None else recoverable) + noise)


def checked(
    *victims: MaskedFinding, seeds: int = 3, constant_mask_dice: float | None = None
) -> MaskedSiteCheck:
    return MaskedSiteCheck(
        release_sha256="0" * 64,
        seeds=seeds,
        training_patches=240,
        hold_out_patches=24,
        hold_out_units=12,
        victims=victims,
        seconds=1.0,
        constant_mask_dice=constant_mask_dice,
    )


@pytest.mark.parametrize(
    ("victims", "seeds", "verdict", "says"),
    [
        ((found("a", 0.8, 0.1), found("b", 0.8, 0.2)), 3, "protected", "protected (site check: a, b keep"),
        ((found("a", 0.8, 0.1), found("b", 0.8, 0.7)), 3, "in part", "b finds 0.70 of 0.80"),
        ((found("a", 0.97, 0.96), found("b", 0.8, 0.7)), 3, "not protected", "a finds 0.96 of 0.97"),
        ((found("a", 0.8, 0.1), found("b", 0.1, 0.1)), 3, "undecided", "perturbed, not verified"),
        ((found("a", 0.4, 0.1), found("b", 0.4, 0.3, constant=0.5)), 3, "undecided", "not verified"),
        ((found("a", 0.8, 0.1),), 3, "undecided", "perturbed, not verified"),
        ((found("a", 0.8, 0.1), found("b", 0.8, 0.2)), 2, "undecided", "perturbed, not verified"),
        # Half is counted above what takes no image: 0.3 of 0.5 are gone in one case, 0.2 in the other.
        (
            (found("a", 0.8, 0.1, constant=0.3), found("b", 0.8, 0.5, constant=0.3)),
            3,
            "protected",
            "a, b keep",
        ),
        (
            (found("a", 0.8, 0.1, constant=0.3), found("b", 0.8, 0.6, constant=0.3)),
            3,
            "in part",
            "b finds 0.60",
        ),
        # Hardly anything is answered, and a threshold brings it back.
        ((found("a", 0.8, 0.1), found("b", 0.8, 0.1, recoverable=0.7)), 3, "in part", "b finds 0.70 of 0.80"),
        # A mean that holds, with patients so far apart that it might not.
        ((found("a", 0.8, 0.35, 0.3), found("b", 0.8, 0.1)), 3, "in part", "b held"),
    ],
    ids=[
        "both hold",
        "one holds",
        "none holds",
        "one learned nothing",
        "one learned nothing that takes an image",
        "one victim",
        "two seeds",
        "above a constant mask",
        "too little above a constant mask",
        "moved thresholds",
        "wide interval",
    ],
)
def test_the_word_claims_no_more_than_the_victims_showed(
    victims: tuple[MaskedFinding, ...], seeds: int, verdict: str, says: str
) -> None:
    check = checked(*victims, seeds=seeds)
    assert check.verdict == verdict
    assert says in check.word
    assert check.word.startswith("protected") == (verdict == "protected")


@pytest.mark.parametrize(
    ("victims", "verdict"),
    [
        ((found("a", 0.8, 0.1), found("b", 0.8, 0.2)), "protected"),
        ((found("a", 0.8, 0.1), found("b", 0.8, 0.7)), "in part"),
        ((found("a", 0.7, 0.5), found("b", 0.8, 0.75)), "not protected"),
    ],
)
def test_the_word_says_how_its_half_was_counted(victims: tuple[MaskedFinding, ...], verdict: str) -> None:
    check = checked(*victims, constant_mask_dice=0.05)
    assert check.verdict == verdict
    assert check.word.endswith(
        "in Dice under the best thresholds; half is counted above a constant mask's 0.05)"
    )


@pytest.mark.parametrize("protected", [0.1, 0.7])
def test_a_check_kept_before_thresholds_were_moved_still_counts_for_what_it_measured(
    protected: float,
) -> None:
    check = checked(found("a", 0.8, 0.1), found("b", 0.8, protected), constant_mask_dice=0.05)
    earlier = check.model_dump()
    del earlier["constant_mask_dice"]
    for victim in earlier["victims"]:
        del victim["clean_recoverable_dice"], victim["protected_recoverable_dice"]
    loaded = MaskedSiteCheck.model_validate_json(json.dumps(earlier))
    assert loaded.verdict == check.verdict
    assert loaded.word.endswith("in Dice; what a moved threshold recovers was not tried)")
    assert ("b finds 0.70 of 0.80" in loaded.word) == (protected == 0.7)


def test_what_clean_images_teach_is_counted_above_what_takes_none() -> None:
    """By hand: 0.8 - 0.3 = 0.5 are taught."""
    assert found("a", 0.8, 0.4, constant=0.3).lost == pytest.approx(1 - 0.1 / 0.5)
    assert found("a", 0.8, 0.0, constant=0.3, recoverable=0.55).lost == pytest.approx(1 - 0.25 / 0.5)
    for no_better in (0.3, 0.1):
        assert found("a", 0.8, no_better, constant=0.3).lost == 1


@pytest.mark.parametrize(
    ("clean", "constant", "tells"),
    [(0.4, 0.4 - 2 * LEAST_GAIN, True), (0.4, 0.4 - LEAST_GAIN / 2, False), (0.19, 0.0, False)],
    ids=["learned", "hardly more than a constant mask", "hardly anything"],
)
def test_who_learned_nothing_from_clean_images_can_not_tell(
    clean: float, constant: float, tells: bool
) -> None:
    assert (found("a", clean, 0.0, constant=constant).holds is not None) is tells


def test_the_interval_is_of_what_is_recovered_patient_by_patient() -> None:
    dice, recovered = np.zeros(24), np.repeat([0.2, 0.3, 0.4], 8)
    clean = [[Scoring(np.full(24, 0.8), np.full(24, 0.9))]]
    finding = finding_of("a", clean, [[Scoring(dice, recovered)]] * 3, np.repeat([0, 1, 2], 8), 0.1)
    assert finding.interval == pytest.approx(mean_interval(np.array([0.2, 0.3, 0.4])))
    assert finding.protected_dice == 0
    assert (finding.protected_recoverable_dice, finding.clean_recoverable_dice) == pytest.approx((0.3, 0.9))
    assert finding.lost == pytest.approx(1 - (finding.interval[1] - 0.1) / (0.9 - 0.1))


def test_the_seed_that_recovers_most_decides() -> None:
    """Measured: of three instance-norm victims one learned a volume's structures as if nothing were there."""
    units = np.arange(12)
    clean = [[Scoring(np.full(12, 0.8), np.full(12, 0.8))]] * 3
    seeds = [[Scoring(np.full(12, dice), np.full(12, dice))] for dice in (0.03, 0.78, 0.1)]
    finding = finding_of("a", clean, seeds, units, 0.0)
    assert finding.protected_recoverable_dice == pytest.approx(0.78)
    assert finding.protected_dice == pytest.approx((0.03 + 0.78 + 0.1) / 3)
    assert finding.holds is False


def test_the_best_reading_counts_for_who_can_stop_early() -> None:
    assert found("a", 0.8, 0.1).protected_peak_dice == pytest.approx(0.12)


def test_few_patients_give_a_wide_interval_and_one_gives_none() -> None:
    few, many = np.array([0.2, 0.3, 0.4]), np.tile([0.2, 0.3, 0.4], 10)
    (low, high), (near, far) = mean_interval(few), mean_interval(many)
    assert low < near < 0.3 < far < high
    # t(0.975, 2) = 4.303 from any table; the standard error of the three is 0.1 / sqrt(3).
    assert high == pytest.approx(0.3 + 4.303 * 0.1 / np.sqrt(3), abs=1e-3)
    assert mean_interval(np.array([0.4])) == (0.0, 1.0)


def test_patches_of_one_patient_are_one_piece_of_evidence() -> None:
    scores = np.concatenate([np.zeros(20), np.ones(2), np.ones(2)])
    units = np.repeat([0, 1, 2], [20, 2, 2])
    run = [[Scoring(scores, scores / 2)]]
    finding = finding_of("a", run, run, units, 0.0)
    assert (finding.clean_dice, finding.protected_dice) == pytest.approx((2 / 3, 2 / 3))
    assert finding.counted == pytest.approx((1 / 3, 1 / 3))


# --- all of it ----------------------------------------------------------------------------------------------


def pairs(count: int, seed: int, *, protected: bool) -> MaskedPairs:
    """Squares; the protected copies show nothing of them."""
    images, labels = squares(count, seed)
    copies = squares(count, seed, contrast=0)[0] if protected else images
    return MaskedPairs(images, copies, labels, np.arange(count) // 2)


QUICK = MaskedCheckSettings(seeds=3, schedule=SHORT, threads=1)


def test_copies_that_teach_no_more_than_positions_are_called_protected() -> None:
    told: list[tuple[int, int]] = []
    training, hold_out = pairs(32, 0, protected=True), pairs(12, 1, protected=False)
    # Seven patches of one patient, one each of five others.
    hold_out = replace(hold_out, units=np.repeat(np.arange(6), [7, 1, 1, 1, 1, 1]))
    check = check_patches(
        training,
        hold_out,
        classes=2,
        about="0" * 64,
        settings=QUICK,
        progress=lambda done, total: told.append((done, total)),
    )
    assert check.verdict == "protected", check
    assert all(victim.clean_dice > 0.7 for victim in check.victims)
    # Where squares usually lie the copies teach too, and that is more than half of a clean victim's Dice.
    assert any(victim.protected_dice > victim.clean_dice / 2 for victim in check.victims)
    assert (check.seeds, check.hold_out_units, check.training_patches) == (3, 6, 32)
    assert (told[0], told[-1]) == ((0, 18), (18, 18))
    assert sorted(told) == told
    assert check.blurred is not None
    assert check.blurred.architecture == "unet-bn"
    assert not check.undone_by_blur
    constant = constant_mask_dice(training.labels, hold_out.labels, 2)[:, 0]
    assert check.constant_mask_dice == pytest.approx(np.mean([constant[:7].mean(), *constant[7:]]))


@pytest.mark.parametrize("in_time", [True, False])
def test_the_first_victim_learns_and_is_asked_after_a_blur_as_well_if_the_time_reaches(
    in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, hold_out = pairs(8, 0, protected=True), pairs(6, 1, protected=False)
    seen: list[tuple[str, bool]] = []

    def scripted(_: object, images: FloatArray, __: object, tested: Any, *___: object, **____: object) -> Any:
        filtered = np.array_equal(tested[0], blurred(hold_out.clean))
        if filtered and not in_time:
            raise OutOfTime
        kinds = {"clean": training.clean, "protected": training.protected}
        kind = next(
            name
            for name, all_of in kinds.items()
            if np.array_equal(images, blurred(all_of) if filtered else all_of)
        )
        seen.append((kind, filtered))
        dice = 0.1 if (kind, filtered) == ("protected", False) else 0.8
        return (Scoring(np.full(6, dice), np.full(6, dice)),)

    monkeypatch.setattr(check_module, "train_segmenter", scripted)
    check = check_patches(training, hold_out, classes=2, about="0" * 64, settings=QUICK)
    assert check.verdict == "protected"
    assert seen.count(("clean", False)) == seen.count(("protected", False)) == 6
    if in_time:
        assert seen.count(("clean", True)) == seen.count(("protected", True)) == 3
        assert check.undone_by_blur
        assert check.word.startswith("protected from training on the images as they are, not after a blur")
    else:
        assert check.undone_by_blur is None
        assert check.word.startswith("protected (site check:")


def test_time_that_is_too_short_for_one_round_is_an_error_by_name() -> None:
    settings = replace(QUICK, limit_s=-1.0, seeds=1, architectures=("unet-bn",))
    with pytest.raises(ConfigurationError) as refused:
        check_patches(
            pairs(8, 0, protected=False),
            pairs(6, 1, protected=False),
            classes=2,
            about="",
            settings=settings,
        )
    assert refused.value.code == "time-limit"
