"""The segmentation benchmark gives each attacker what its row says, repeats nothing, and shows only what it may."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image as PillowImage

pytest.importorskip("torch")
pytestmark = pytest.mark.train

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("segmentation")
    monkeypatch.setattr(module, "_read", {})  # the images that an earlier run read
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty-four drawn cells with their nuclei, laid out as the real set, under a licence."""
    rng, root = np.random.default_rng(20261121), tmp_path / "data"
    for kind in ("images", "masks"):
        (root / "seg_wbc1" / kind).mkdir(parents=True)
    for number in range(24):
        image = rng.integers(20, 90, (56, 60, 3), np.uint8)
        mask = np.zeros((56, 60), np.uint8)
        mask[14:40, 16:44], mask[22:32, 24:36] = 1, 2
        image += 60 * mask[..., None]
        for kind, pixels in (("images", image), ("masks", mask)):
            file = root / "seg_wbc1" / kind / f"{number:03}.png"
            file.write_bytes(imagecodecs.png_encode(pixels))
    (root / "seg_wbc1/PROVENANCE.md").write_text("# Cells\n\n- Licence as stated upstream: MIT (LICENSE).\n")
    return root


@pytest.fixture
def run(
    bench: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Run the benchmark in this process, its rows limited to a few; return them."""

    def once(rows: list[tuple[str, list[Any]]], *arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(bench, "GROUPS", {"first": rows})
        work = ["--data", str(data), "--work", str(tmp_path / "work"), "--sets", "wbc", "--seeds", "0"]
        monkeypatch.setattr(sys, "argv", ["segmentation.py", "--quick", *work, *arguments])
        bench.main()
        figures: list[dict[str, Any]] = json.loads((tmp_path / "work/segmentation.json").read_text())["rows"]
        return figures

    return once


def test_a_finished_row_is_not_measured_again_and_the_table_is_no_result(
    bench: ModuleType, run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    results = BENCH / "results" / "segmentation.json"
    before = results.read_bytes()
    rows = [("clean", [bench.Attack("unet-bn")]), ("umed 4/255", [bench.Attack("unet-bn")])]
    first = run(rows)
    assert [(row["protection"], row["psnr_db"] is None) for row in first] == [
        ("clean", True),
        ("umed 4/255", False),
    ]
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "work/runs").iterdir()}
    again = run([*rows, ("clean", [bench.Attack("unet-in")])])
    assert again[:2] == first
    assert again[2]["attack"] == "unet-in"
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert results.read_bytes() == before


def test_a_row_that_two_groups_ask_for_counts_once(
    bench: ModuleType, run: Callable[..., list[dict[str, Any]]]
) -> None:
    row = ("clean", [bench.Attack("unet-bn")])
    assert len(run([row, row])) == 1


@pytest.fixture
def given(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What each victim is given to train on and to be scored on; none is trained."""
    seen: list[tuple[Any, ...]] = []

    def victim(*arguments: Any, **keywords: Any) -> Any:
        seen.append(arguments)
        raise _SeenError

    monkeypatch.setattr(bench, "train_segmentation_victim", victim)
    return seen


class _SeenError(Exception):
    """The victim was reached."""


def test_a_countermeasure_meets_training_and_test_images_alike(
    bench: ModuleType, run: Callable[..., Any], given: list[tuple[Any, ...]]
) -> None:
    """A transform at training time alone only spoils the test, and would pass for protection."""
    with pytest.raises(_SeenError):
        run([("clean", [bench.Attack("unet-bn", transform="4 bits")])])
    images, _, test_images, _, _ = given[0]
    for seen in (images, test_images):
        steps = seen * 15
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)


@pytest.mark.parametrize(
    ("holds", "clean", "protected"),
    [("all", 0, 12), ("one site open", 4, 8), ("open site alone", 4, 0)],
)
def test_an_attacker_holds_what_its_row_says(
    holds: str,
    clean: int,
    protected: int,
    bench: ModuleType,
    run: Callable[..., Any],
    data: Path,
    given: list[tuple[Any, ...]],
) -> None:
    with pytest.raises(_SeenError):
        run([("random 4/255, foreground", [bench.Attack("unet-bn", holds=holds)])])
    images, labels, test_images, test_labels, _ = given[0]
    union = bench._cohort("wbc", data).union
    originals = {
        image.tobytes(): label.tobytes() for image, label in zip(union.images, union.labels, strict=True)
    }
    untouched = [image.tobytes() in originals for image in images]
    assert (sum(untouched), len(images) - sum(untouched)) == (clean, protected)
    assert not {image.tobytes() for image in test_images} & set(originals)
    assert len(labels) == len(images)
    assert len(test_labels) == len(test_images) == 6


def test_generators_from_elsewhere_never_see_the_sites_images(
    bench: ModuleType, run: Callable[..., Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned_from = []
    training = bench.GeneratorTraining

    def recorded(plan: Any, patches: Any, seed: int) -> Any:
        learned_from.append(patches)
        return training(plan, patches, seed)

    monkeypatch.setattr(bench, "GeneratorTraining", recorded)
    run([("umed-targeted 8/255, generators from elsewhere", [bench.Attack("unet-bn")])])
    sites = {image.tobytes() for image in bench._cohort("wbc", data).union.images}
    assert not {image.tobytes() for image in learned_from[0].images} & sites


def test_pictures_say_their_licence_and_sets_without_one_are_not_drawn(
    run: Callable[..., Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([], "--pictures", "--protections", "random 4/255, foreground")
    sheet = tmp_path / "work/segmentation.png"
    with PillowImage.open(sheet) as picture:
        assert picture.width > 8 * picture.height / 2
        assert "wbc (MIT (LICENSE).)" in picture.info["Description"]
    page = (tmp_path / "work/segmentation.md").read_text()
    assert "![sheet](segmentation.png)" in page
    assert "MIT (LICENSE)" in page
    sheet.unlink()
    for stated in ("NOT STATED in the repository.", "GPL-3.0 (LICENSE)."):
        (data / "seg_wbc1/PROVENANCE.md").write_text(f"- Licence as stated upstream: {stated}\n")
        run([], "--pictures", "--protections", "random 4/255, foreground")
        assert not sheet.exists()
        assert "nothing is drawn" in capsys.readouterr().err


@pytest.mark.slow
def test_victims_learn_little_from_drawn_lesions_under_noise_of_generators_that_never_saw_them_and_under_gratings(
    bench: ModuleType, tmp_path: Path
) -> None:
    """What `umed-targeted` is for, at a quarter of its training, and `grating`; on images that need no folder."""
    plan = dataclasses.replace(
        bench.PLANS["umed-targeted"],
        surrogates=("unet-batch", "unet-instance"),
        clean_steps=150,
        iterations=200,
    )
    shortened = bench.Protection("shortened", plan, elsewhere=True, settings=plan.settings)

    def left(protection: Any, victim: str) -> float:
        attack = bench.Attack(victim)
        row = bench.Task("drawn", protection, attack, 0, 150, tmp_path, tmp_path).run()
        return float(row["dice"])

    for victim in ("unet-bn", "unet-in"):
        clean = left(bench.CLEAN, victim)
        assert clean > 0.5
        assert left(shortened, victim) < clean / 2
        assert left(bench.PROTECTIONS["grating 8/255"], victim) < clean / 2


def test_who_takes_volumes_apart_trains_and_is_tested_on_their_fullest_planes(bench: ModuleType) -> None:
    volumes = np.arange(2 * 12 * 4, dtype=np.float32).reshape(2, 1, 12, 2, 2)
    labels = np.zeros((2, 12, 2, 2), np.int64)
    labels[:, 3], labels[:, 7:10, 0] = 1, 2
    images, masks = bench.planes_of(volumes, labels)
    assert images.shape == (6, 1, 2, 2)
    np.testing.assert_array_equal(images[0], volumes[0][:, 3])
    np.testing.assert_array_equal(masks[0], labels[0][3])
    np.testing.assert_array_equal(images[3], volumes[1][:, 3])
    assert bench.Attack("unet-bn", sliced=True).label == "unet-bn, slice by slice"
