"""The site's own check: victims learn in onnxruntime, the split is fair, the word claims no more than was shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import numpy_helper
from PIL import Image as PillowImage
from scipy.stats import binomtest

from medveil.agent import check_cli
from medveil.agent.engine import Resources
from medveil.agent.preparation import Wishes
from medveil.agent.release_job import Call, ledger_of, make_release
from medveil.agent.victim_check import SiteCheck, recorded_check
from medveil.agent.victim_check.check import CheckSettings, _image_shape, check_images, check_release
from medveil.agent.victim_check.networks import ARCHITECTURES, draw_network
from medveil.agent.victim_check.pairs import Pairs
from medveil.agent.victim_check.runs import OutOfTime
from medveil.agent.victim_check.sample import Candidate, Split, drawn
from medveil.agent.victim_check.training import Schedule, train_victim
from medveil.agent.victim_check.verdict import (
    LEAST_GAIN,
    LEAST_LOSS,
    auc_interval,
    finding_of,
    mean_recall_interval,
    wilson,
)
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.bundle import (
    ManifestDraft,
    RecipeSettings,
    open_bundle,
    write_bundle,
)
from medveil.models.cli_support import new_app, run_command
from medveil.models.errors import ConfigurationError, InputError
from medveil.models.quality.classification import Scores

SIDE = 12
RESOURCES = Resources("cpu", 1, 1 << 28)
SHORT = Schedule(steps=30, batch_size=16, scored=2)


def halves(count: int, seed: int, contrast: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images; in class 1 the left half is brighter, in class 0 the right one."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = 0.4 + 0.1 * rng.random((count, 1, SIDE, SIDE))
    images[labels == 1, :, :, : SIDE // 2] += contrast
    images[labels == 0, :, :, SIDE // 2 :] += contrast
    return images.astype(np.float32), labels.astype(np.int64)


def veiled(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A perfect veil: without any trace of the class, but for a line that clean images never have."""
    hidden = np.full_like(images, 0.45)
    hidden[labels == 1, :, SIDE // 2, :] = 1.0
    return hidden


def scores(value: float, **others: float) -> Scores:
    return Scores(**{name: others.get(name, value) for name in Scores.__dataclass_fields__})


def finding(
    recoverable: float, *, clean: float = 0.95, name: str = "mlp", images: Sequence[int] = (500, 500)
) -> Any:
    return finding_of(name, [[scores(clean)]] * 3, [[scores(recoverable)]] * 3, images)


def site_check(*found: Any, seeds: int = 3) -> SiteCheck:
    return SiteCheck(
        release_sha256="00" * 32,
        seeds=seeds,
        training_images=100,
        hold_out_images=(500, 500),
        victims=found,
        seconds=1.0,
    )


# -- the draw


def candidates(*counts: int, frames: int = 1) -> list[Candidate]:
    return [
        Candidate(1000 * label + i // frames, i % frames, i % frames, label, f"{label}-{i}", frames > 1)
        for label, count in enumerate(counts)
        for i in range(count)
    ]


def test_the_split_is_the_same_in_any_order_and_another_with_another_seed() -> None:
    found = candidates(60, 90)
    assert drawn(found, seed=1, most=120) == drawn(reversed(found), seed=1, most=120)
    assert drawn(found, seed=1, most=120) != drawn(found, seed=2, most=120)


def test_no_image_is_on_both_sides_and_none_counts_twice() -> None:
    found = candidates(60, 60)
    twins = [Candidate(c.file + 9000, 0, 0, c.class_index, c.digest, False) for c in found[:30]]
    split = drawn([*found, *twins], seed=0, most=1000)
    digests = [c.digest for c in (*split.training, *split.hold_out)]
    assert len(digests) == len(set(digests)) == 120


def test_slices_of_one_volume_stay_on_one_side() -> None:
    split = drawn(candidates(200, 200, frames=5), seed=0, most=1000)
    assert not {c.file for c in split.training} & {c.file for c in split.hold_out}


def test_every_class_is_held_out_in_its_own_share_within_the_limit() -> None:
    def count(split: Split, label: int) -> tuple[int, int]:
        return tuple(sum(c.class_index == label for c in part) for part in (split.training, split.hold_out))  # type: ignore[return-value]

    split = drawn(candidates(90, 300), seed=0, most=1000)
    assert (count(split, 0), count(split, 1)) == ((60, 30), (200, 100))
    fewer = drawn(candidates(90, 300), seed=0, most=195)
    assert len(fewer.training) + len(fewer.hold_out) == 195


@pytest.mark.parametrize(
    ("counts", "code"), [((), "one-class"), ((100,), "one-class"), ((100, 29), "too-few-images")]
)
def test_too_little_to_learn_from_is_refused_by_name(counts: tuple[int, ...], code: str) -> None:
    with pytest.raises(InputError) as caught:
        drawn(candidates(*counts), seed=0, most=1000)
    assert caught.value.code == code


def test_one_volume_per_class_is_too_few() -> None:
    with pytest.raises(InputError, match="too-few-images"):
        drawn(candidates(100, 100, frames=100), seed=0, most=1000)


# -- training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_victim_learns_what_clean_images_teach(architecture: str) -> None:
    rng = np.random.default_rng(0)
    graph = draw_network(architecture, shape=(1, SIDE, SIDE), classes=2, rng=rng)
    images, labels = halves(64, seed=1)
    history = train_victim(graph, images, labels, halves(40, seed=2), SHORT, resources=RESOURCES, rng=rng)
    assert len(history) == SHORT.scored
    assert history[-1].auc > 0.95


def test_the_same_seed_gives_the_same_victim() -> None:
    def run() -> tuple[Scores, ...]:
        rng = np.random.default_rng(3)
        graph = draw_network("inception", shape=(1, SIDE, SIDE), classes=2, rng=rng)
        few = Schedule(steps=6, batch_size=16, scored=2)
        return train_victim(graph, *halves(32, 1), halves(20, 2), few, resources=RESOURCES, rng=rng)

    assert run() == run()


def test_an_unknown_victim_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="architecture"):
        draw_network("alexnet", shape=(1, 8, 8), classes=2, rng=np.random.default_rng(0))


def test_a_victim_gives_up_when_its_time_is_over() -> None:
    rng = np.random.default_rng(0)
    graph = draw_network("mlp", shape=(1, SIDE, SIDE), classes=2, rng=rng)
    with pytest.raises(OutOfTime):
        train_victim(graph, *halves(32, 1), halves(20, 2), SHORT, resources=RESOURCES, rng=rng, until=0.0)


def test_the_learning_rate_rises_once_and_ends_near_nothing() -> None:
    rates = [Schedule().learning_rate(step) for step in range(Schedule().steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == Schedule().peak_rate
    assert rates[-1] < Schedule().peak_rate / 1000


# -- figures and words


@pytest.mark.parametrize(("right", "images"), [(0, 20), (7, 20), (150, 300), (20, 20)])
def test_the_interval_of_a_share_is_wilsons(right: int, images: int) -> None:
    theirs = binomtest(right, images).proportion_ci(method="wilson")
    assert wilson(right / images, images) == pytest.approx((theirs.low, theirs.high))


def test_the_interval_of_a_mean_recall_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    recalls, images = np.array([0.9, 0.5]), (40, 120)
    inside = 0
    for _ in range(400):
        mean = float(np.mean([rng.binomial(n, p) / n for p, n in zip(recalls, images, strict=True)]))
        low, high = mean_recall_interval(mean, images)
        inside += low <= recalls.mean() <= high
    assert inside / 400 > 0.93


def test_the_interval_of_an_auc_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, images = 0.76, (40, 60)  # two normal distributions one standard deviation apart
    inside = 0
    for _ in range(400):
        negative, positive = rng.normal(0, 1, images[0]), rng.normal(1, 1, images[1])
        low, high = auc_interval(float((positive[:, None] > negative).mean()), images)
        inside += low <= truth <= high
    assert inside / 400 > 0.92


def test_the_upper_end_of_the_interval_decides_so_that_a_small_hold_out_proves_nothing() -> None:
    assert finding(0.62, images=(500, 500)).holds is True
    assert finding(0.62, images=(10, 10)).holds is False


def test_a_victim_that_learns_nothing_from_clean_images_cannot_tell() -> None:
    blind = finding(0.5, clean=0.5 + LEAST_GAIN / 2)
    assert blind.holds is None
    assert site_check(blind, blind).verdict == "undecided"


def test_what_is_lost_is_counted_from_chance() -> None:
    full = finding(0.95, images=(10**6, 10**6))
    nothing = finding(0.5, images=(10**6, 10**6))
    assert full.lost == pytest.approx(0, abs=0.01)
    assert nothing.lost == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("found", "seeds", "verdict", "said"),
    [
        ((finding(0.55, name="a"), finding(0.55, name="b")), 3, "protected", "protected (site check: a, b"),
        ((finding(0.55, name="a"), finding(0.91, name="b")), 3, "in part", "b 0.91 still learns"),
        ((finding(0.90, name="a"), finding(0.91, name="b")), 3, "not protected", "not protected"),
        ((finding(0.55, name="a"), finding(0.55, name="b")), 2, "undecided", "not verified"),
        ((finding(0.55, name="a"),), 3, "undecided", "not verified"),
    ],
)
def test_the_word_says_what_was_shown_and_no_more(
    found: tuple[Any, ...], seeds: int, verdict: str, said: str
) -> None:
    check = site_check(*found, seeds=seeds)
    assert check.verdict == verdict
    assert said in check.word
    assert check.word.startswith("protected") == (verdict == "protected")


def test_what_leaves_the_site_are_the_figures_of_the_strongest_victim() -> None:
    check = site_check(finding(0.55, name="weak"), finding(0.80, name="strong"))
    assert check.strongest.architecture == "strong"
    assert check.hold_out == 1000
    assert 0 < check.half_interval < 0.05


@pytest.mark.train
def test_the_gate_is_the_coordinators() -> None:
    pytest.importorskip("torch")
    from medveil.models.training import proxy, surrogates

    assert LEAST_GAIN == surrogates.LEAST_GAIN
    assert LEAST_LOSS == proxy._LEAST_LOSS


# -- the check


def pairs(count: int, seed: int) -> Pairs:
    images, labels = halves(count, seed)
    return Pairs(images, veiled(images, labels), labels)


SMALL = CheckSettings(architectures=("mlp", "inception"), seeds=1, schedule=SHORT, threads=2)


def test_a_veil_is_told_from_no_veil() -> None:
    training, hold_out = pairs(64, 1), pairs(60, 2)
    veil = check_images(training, hold_out, about="00", settings=SMALL)
    bare = Pairs(training.clean, training.clean, training.labels)
    none = check_images(bare, hold_out, about="00", settings=SMALL)
    for with_veil, without in zip(veil.victims, none.victims, strict=True):
        assert without.protected == without.clean  # the same start, order and images: the same victim
        assert with_veil.protected.balanced_accuracy < without.protected.balanced_accuracy - 0.3


def test_the_number_of_threads_changes_nothing_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    quick = CheckSettings(
        architectures=("mlp",), seeds=2, schedule=Schedule(steps=5, batch_size=8, scored=1), threads=1
    )
    training, hold_out = pairs(32, 1), pairs(30, 2)
    alone = check_images(
        training, hold_out, about="00", settings=quick, progress=lambda n, of: told.append((n, of))
    )
    assert told == [(n, 4) for n in range(5)]
    more = CheckSettings(architectures=("mlp",), seeds=2, schedule=quick.schedule, threads=3)
    assert check_images(training, hold_out, about="00", settings=more).victims == alone.victims


def test_without_time_nothing_is_claimed() -> None:
    late = CheckSettings(architectures=("mlp",), schedule=SHORT, limit_s=0.0)
    with pytest.raises(ConfigurationError, match="time-limit"):
        check_images(pairs(32, 1), pairs(20, 2), about="00", settings=late)


# -- on a release

_NET = f"""<ir_version: 10, opset_import: ["": 20]>
net (float[batch, 1, {SIDE}, {SIDE}] image) => (float[batch, 2] logits) <float[{SIDE * SIDE}, 2] w, float[2] b>
{{
    a = Flatten (image)
    logits = Gemm (a, w, b)
}}"""


@pytest.fixture
def bundle(tmp_path: Path, small_draft: Callable[..., ManifestDraft]) -> Path:
    """A signed bundle with one linear surrogate that knows which half is brighter."""
    model = onnx.parser.parse_model(_NET)
    side = np.where(np.arange(SIDE) < SIDE // 2, 1.0, -1.0) * np.ones((SIDE, SIDE))
    weights = np.stack([-side.ravel(), side.ravel()], axis=1)
    for name, values in (("w", weights), ("b", np.zeros(2))):
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    del model.graph.value_info[:]
    draft = small_draft(
        ["linear"],
        SIDE,
        classes=("right", "left"),
        recipe=RecipeSettings(steps=3, step_size=0.5, warmup_steps=2),
    )
    path = tmp_path / "small.medveil"
    write_bundle(
        path,
        draft,
        {"linear": model.SerializeToString()},
        {},
        Ed25519PrivateKey.from_private_bytes(b"\7" * 32),
    )
    return path


@pytest.fixture
def release(tmp_path: Path, bundle: Path) -> Callable[[int], Path]:
    """Protect so many drawn images, half of each class, and return the release folder."""

    def make(count: int) -> Path:
        images, labels = halves(count, seed=5)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = tmp_path / "source" / ("right", "left")[label] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            PillowImage.fromarray(np.rint(255 * image[0]).astype(np.uint8)).save(place)
        out = tmp_path / "release"
        make_release(Call(tmp_path / "source", out, None, None, Wishes(bundle, threads=1)))
        return out

    return make


QUICK = CheckSettings(
    architectures=("mlp",), seeds=1, schedule=Schedule(steps=8, batch_size=8, scored=2), threads=1
)


def test_a_release_is_checked_and_the_check_is_forgotten_when_the_release_changes(
    release: Callable[[int], Path],
) -> None:
    out = release(64)
    check = check_release(out, settings=QUICK)
    assert (check.training_images, check.hold_out_images) == (42, (11, 11))
    workspace = Workspace(out, private_beside(out))
    with ledger_of(out, None) as ledger:
        assert recorded_check(workspace, ledger) == check
    release(66)
    with ledger_of(out, None) as ledger:
        assert recorded_check(workspace, ledger) is None
    assert not list(workspace.private.glob("check-*"))


def test_originals_are_left_as_they_are(release: Callable[[int], Path]) -> None:
    out = release(64)
    source = out.parent / "source"
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.rglob("*.png")}
    check_release(out, settings=QUICK)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.rglob("*.png")} == before


def test_a_copy_or_an_original_that_changed_is_no_evidence(release: Callable[[int], Path]) -> None:
    out = release(64)
    copies = sorted(out.rglob("*.png"))
    kept = [copy.read_bytes() for copy in copies]
    for copy in copies:
        copy.write_bytes(copies[0].read_bytes() + b"\0")
    with pytest.raises(InputError, match="release-changed"):
        check_release(out, settings=QUICK)
    for copy, data in zip(copies, kept, strict=True):
        copy.write_bytes(data)
    for original in (out.parent / "source").rglob("*.png"):
        PillowImage.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(original)
    with pytest.raises(InputError, match="source-changed"):
        check_release(out, settings=QUICK)


def test_too_small_a_release_and_another_bundle_are_refused(
    release: Callable[[int], Path], bundle: Path, tmp_path: Path
) -> None:
    out = release(20)
    with pytest.raises(InputError, match="too-few-images"):
        check_release(out, settings=QUICK)
    other = tmp_path / "other.medveil"
    with ledger_of(out, None) as ledger, ledger.transaction():
        ledger.set_meta("settings", json.dumps({"bundle_sha256": "11" * 32}))
    other.write_bytes(bundle.read_bytes())
    with pytest.raises(ConfigurationError, match="other-bundle"):
        check_release(out, bundle=other, settings=QUICK)


def test_a_release_with_masks_is_refused(bundle: Path) -> None:
    manifest = open_bundle(bundle, trusted=None).manifest
    assert _image_shape(manifest) == (1, SIDE, SIDE)
    with pytest.raises(ConfigurationError, match="task"):
        _image_shape(manifest.model_copy(update={"task": "segmentation"}))


def test_the_command_prints_one_json_object(
    release: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = release(64)
    app = new_app("test")
    app.callback()(lambda: None)
    check_cli.register(app)
    assert (
        run_command(app, "test", ["check", str(out), "--seeds", "1", "--victim", "mlp", "--format", "json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "undecided"  # one victim, one seed
    assert said["protection"].startswith("perturbed, not verified by a victim")
    assert all(math.isfinite(value) for value in said["victims"][0]["protected"].values())
    assert (
        run_command(app, "test", ["check", str(out), "--seeds", "1", "--victim", "mlp", "--minutes", "5"])
        == 0
    )
    assert "status: perturbed" in capsys.readouterr().out
