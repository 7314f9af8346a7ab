from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import onnxruntime
import pytest
import typer

from medveil.models.autodiff.admission import admit
from medveil.models.bundle import check_answers, generate_key, open_bundle
from medveil.models.datasets.masked import load_masked
from medveil.models.errors import ConfigurationError, InputError, SelfTestError
from medveil.models.methods.oracle import FloatArray

torch = pytest.importorskip("torch")
from medveil.coordinator import cli  # noqa: E402 (needs torch)
from medveil.coordinator import train_segmentation as train_segmentation_module  # noqa: E402
from medveil.coordinator.train_segmentation import (  # noqa: E402
    DEFAULT_VOLUMES,
    SegmentationPlan,
    SegmentationRequest,
    train_segmentation,
)
from medveil.models.training import state_folder  # noqa: E402
from medveil.models.training.segmentation import PLANS, GeneratorTraining  # noqa: E402
from medveil.models.training.segmentation_drawn import DRAWN_PLANS, DrawnPlan  # noqa: E402
from medveil.models.training.segmentation_seeds import ChosenNoise  # noqa: E402

pytestmark = pytest.mark.train

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
SMALL = SegmentationPlan(
    noise=replace(PLANS["umed-plus"], iterations=20, batch_size=4),
    patch=16,
    patches=24,
    attempts=2,
    victim_steps=4,
)


class Silent:
    """A reporter that adds up what it is told."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.left_s = seconds

    def stage(self, text: str) -> None:
        pass

    def advance(self, seconds: float) -> None:
        self.left_s -= seconds


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Bright squares on noise, as an NPZ."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 100, (10, 24, 20), np.uint8)
    masks = np.zeros_like(images)
    masks[:, 6:15, 5:14] = 255
    np.savez(tmp_path / "squares.npz", images=np.where(masks > 0, images + 90, images), masks=masks)
    return tmp_path / "squares.npz"


class Session:
    """A graph in plain onnxruntime."""

    def __init__(self, graph: bytes) -> None:
        self._session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def perturbation(self, images: FloatArray, targets: FloatArray | None = None) -> FloatArray:
        answer: FloatArray = self._session.run(None, {"image": images})[0]
        return answer


def request(data: Path, **changes: object) -> SegmentationRequest:
    out = data.with_name("squares.medveil")
    return replace(SegmentationRequest(data=data, out=out, created=NOON), **changes)


def test_a_bundle_says_how_a_site_applies_its_generators(data: Path) -> None:
    asked = request(data, class_names=("outside", "square"), name="drawn squares")
    manifest = train_segmentation(asked, generate_key(), Silent, SMALL)
    bundle = open_bundle(asked.out, trusted=None)
    assert bundle.manifest == manifest
    assert manifest.task == "segmentation"
    assert manifest.recipe.method == "umed-plus"
    assert manifest.recipe.epsilon_255 == pytest.approx(4)
    assert manifest.taxonomy.names == ("outside", "square")
    assert [c.stored_value for c in manifest.taxonomy.classes] == [0, 255]
    contract = manifest.segmentation
    assert contract is not None
    assert {use.part for use in contract.generators} == {"contour", "texture"}
    assert contract.band_radius == 2
    settings = contract.method_settings(epsilon_255=manifest.recipe.epsilon_255)
    assert settings.epsilon == pytest.approx(4 / 255)
    for use in contract.generators:
        graph = admit(bundle.graph(use.graph), role="generator")
        assert graph.input_shape == manifest.input.shape
        golden = bundle.golden_answers(use.graph)
        assert golden is not None
        check_answers(Session(bundle.graph(use.graph)), golden, name=use.graph)
    exchanged = bundle.golden_answers("contour")
    assert exchanged is not None
    with pytest.raises(SelfTestError) as refused:
        check_answers(Session(bundle.graph("texture")), exchanged, name="texture")
    assert refused.value.code == "golden"
    check = manifest.segmentation_check
    assert check is not None
    assert check.attempts == 2
    tried = [(v.architecture, v.seed) for v in check.victims]
    assert len(set(tried)) == len(tried) == 6
    assert {design for design, _ in tried} == {"unet-bn", "unet-in"}
    assert "contour band" in bundle.card
    assert not state_folder(asked.out).exists()


@pytest.fixture
def plain_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the weights themselves: what the graphs say is another test's business, and exporting takes its time."""

    def packed(best: ChosenNoise, shape: tuple[int, ...]) -> dict[str, bytes]:
        return {
            part: b"".join(p.detach().numpy().tobytes() for p in net.parameters())
            for part, net in best.generators.items()
        }

    monkeypatch.setattr(train_segmentation_module, "_export", packed)


class KilledError(Exception):
    """The process is gone."""


@pytest.mark.usefixtures("plain_export")
def test_a_killed_training_ends_with_the_same_graphs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train_segmentation(request(data), generate_key(), Silent, SMALL)
    step, steps = GeneratorTraining.step, []

    def dying(self: GeneratorTraining) -> float:
        steps.append(self.iteration)
        # Past the timing run and the first seed: in the middle of the second.
        if len(steps) == 6 + 20 + 7:
            raise KilledError
        return step(self)

    again = request(data, out=data.with_name("again.medveil"))
    with monkeypatch.context() as patched:
        patched.setattr(GeneratorTraining, "step", dying)
        with pytest.raises(KilledError):
            train_segmentation(again, generate_key(), Silent, SMALL)
    assert state_folder(again.out).exists()
    assert not again.out.exists()
    continued = train_segmentation(again, generate_key(), Silent, SMALL)
    assert [g.sha256 for g in continued.graphs] == [g.sha256 for g in straight.graphs]
    assert continued.segmentation_check == straight.segmentation_check


def test_another_seed_may_not_continue_an_unfinished_training(data: Path) -> None:
    asked = request(data)
    state = state_folder(asked.out)
    state.mkdir()
    (state / "plan.json").write_text('{"identity": "of another", "epochs": {"iterations": 3}}')
    with pytest.raises(ConfigurationError) as refused:
        train_segmentation(asked, generate_key(), Silent, SMALL)
    assert refused.value.code == "other-training"


def test_too_few_images_and_too_little_time_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    with np.load(data) as archive:
        np.savez(tmp_path / "few.npz", images=archive["images"][:4], masks=archive["masks"][:4])
    with pytest.raises(InputError) as few:
        train_segmentation(request(tmp_path / "few.npz"), generate_key(), Silent, SMALL)
    assert few.value.code == "too-few-images"
    with pytest.raises(ConfigurationError) as short:
        train_segmentation(request(data, minutes=0.001), generate_key(), Silent, SMALL)
    assert short.value.code == "minutes"
    assert re.search(r"--minutes [1-9]", short.value.public), "it says how many would do"


@pytest.mark.parametrize("method", ["voxshield", "grating-volume", "roi-random"])
def test_a_method_that_does_not_fit_the_data_is_refused(method: str, data: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        train_segmentation(request(data, method=method), generate_key(), Silent)
    assert refused.value.code == "method"


# --- volumes ------------------------------------------------------------------------------------------------


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Eight NIfTI volumes of 14 x 20 x 18 voxels with a bright block, and their label maps."""
    rng = np.random.default_rng(0)
    root = tmp_path / "volumes"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for number in range(8):
        voxels, marks = rng.normal(100, 15, (14, 20, 18)).astype(np.float32), np.zeros((14, 20, 18), np.uint8)
        marks[4:10, 6:14, 5 : 12 + number % 3] = 1
        voxels += 40 * marks
        for kind, array in (("images", voxels), ("labels", marks)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / kind / f"{number}.nii.gz")
    return root


@pytest.mark.usefixtures("plain_export")
def test_voxshield_is_trained_with_tiles_of_slices(volumes: Path) -> None:
    asked = request(volumes, out=volumes.with_suffix(".medveil"))
    plan = replace(
        DEFAULT_VOLUMES,
        noise=replace(PLANS["voxshield"], iterations=12, batch_size=4),
        patches=16,
        attempts=1,
        victim_steps=3,
    )
    manifest = train_segmentation(asked, generate_key(), Silent, plan)
    assert manifest.recipe.method == "voxshield"
    assert manifest.input.shape == (1, 64, 64, 64)
    assert manifest.segmentation is not None
    assert [use.part for use in manifest.segmentation.generators] == ["roi"]
    assert manifest.training_data.train_counts[1] > 0
    check = manifest.segmentation_check
    assert check is not None
    assert len(check.victims) == 6
    bundle = open_bundle(asked.out, trusted=None)
    assert "64 slices" in bundle.card
    assert "foreground only" in bundle.card
    golden = bundle.golden_answers("roi")
    assert golden is not None
    assert golden.images.shape == (1, 1, 64, 64, 64)


def test_volumes_get_gratings_across_slices_without_a_graph(volumes: Path) -> None:
    asked = request(volumes, out=volumes.with_suffix(".medveil"))
    tried = DrawnPlan(method="grating-volume", budgets=DRAWN_PLANS["grating-volume"].budgets[:1])
    plan = replace(DEFAULT_VOLUMES, noise=tried, patches=16, victim_steps=3)
    manifest = train_segmentation(asked, generate_key(), Silent, plan)
    assert (manifest.recipe.method, manifest.graphs) == ("grating-volume", ())
    assert manifest.input.shape == (1, 64, 64, 64)
    bundle = open_bundle(asked.out, trusted=None)
    assert "64 slices" in bundle.card
    assert "nothing was trained" in bundle.card


def test_the_data_decides_between_images_and_volumes(data: Path, volumes: Path) -> None:
    for path, method, depth in ((data, "umed-targeted", None), (volumes, "grating-volume", 32)):
        plan = train_segmentation_module._default(request(path), load_masked(path))
        assert (plan.noise.method, plan.depth) == (method, depth)
    sliced = train_segmentation_module._default(request(volumes, method="umed"), load_masked(volumes))
    assert (sliced.noise.method, sliced.depth) == ("umed", None)


@pytest.mark.parametrize(("method", "radius"), [("umed", 1), ("umed-plus", 2), ("umed-targeted", 4)])
def test_small_images_get_the_band_that_was_measured_on_them(data: Path, method: str, radius: int) -> None:
    masked = load_masked(data)
    plan = train_segmentation_module._fitted(
        train_segmentation_module._default(request(data, method=method), masked), masked
    )
    assert plan.noise.settings.band_radius == radius


def test_a_bundle_of_gratings_has_no_graph_and_says_what_was_tried(data: Path) -> None:
    asked = request(data, method="grating")
    tried = DrawnPlan(method="grating", budgets=DRAWN_PLANS["grating"].budgets[:2])
    small = replace(SMALL, noise=tried)
    reporter = Silent()
    manifest = train_segmentation(asked, generate_key(), lambda seconds: told(reporter, seconds), small)
    bundle = open_bundle(asked.out, trusted=None)
    assert manifest.graphs == ()
    assert manifest.recipe.method == "grating"
    assert round(manifest.recipe.epsilon_255, 6) in (3, 4)
    assert manifest.segmentation is not None
    assert manifest.segmentation.target is None
    check = manifest.segmentation_check
    assert check is not None
    assert check.attempts in (1, 2)
    assert len(check.victims) == 6
    assert [victim.architecture for victim in check.blurred_victims] == ["unet-bn"] * 3
    assert asked.out.stat().st_size < 20_000
    assert "nothing was trained" in bundle.card
    assert reporter.left_s == pytest.approx(0, abs=1e-6)
    assert not state_folder(asked.out).exists()


def told(reporter: Silent, seconds: float) -> Silent:
    reporter.left_s = seconds
    return reporter


def test_gratings_ask_for_the_time_that_their_victims_take(data: Path) -> None:
    asked = request(data, method="grating", minutes=1e-6)
    with pytest.raises(ConfigurationError, match="allow --minutes") as refused:
        train_segmentation(asked, generate_key(), Silent)
    assert refused.value.code == "minutes"


def test_the_command_offers_every_method_that_bundles_are_made_for() -> None:
    command = typer.main.get_command(cli.app).commands["train"]  # type: ignore[attr-defined]
    offered = next(option.type.choices for option in command.params if option.name == "method")
    assert set(offered) == set(train_segmentation_module.METHODS)


def test_images_beside_volumes_are_refused_by_name(volumes: Path) -> None:
    for kind in ("images", "labels"):
        pixels = np.zeros((20, 20), np.uint8)
        pixels[4:9, 4:9] = 1
        (volumes / kind / "flat.png").write_bytes(imagecodecs.png_encode(pixels))
    with pytest.raises(InputError) as refused:
        train_segmentation(request(volumes), generate_key(), Silent)
    assert refused.value.code == "data-format"
