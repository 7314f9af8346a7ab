"""A bundle that carries a noise generator: one pass per image, under the same budget, only where the site says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as PillowImage

from medveil.agent.preparation import Wishes, prepare
from medveil.agent.release_job import Call, make_release, recorded_call
from medveil.models.bundle import (
    ManifestDraft,
    RecipeSettings,
    generate_key,
    write_bundle,
)
from medveil.models.errors import ConfigurationError, ExitCode

SIDE = 8
BundleWith = Callable[..., Path]


def generator() -> bytes:
    """One convolution over the image, whose sign the target turns: (batch, 1, 8, 8), (batch, 2) -> an image."""
    rng = np.random.default_rng(11)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["seen"], pads=[1, 1, 1, 1]),
        helper.make_node("Gemm", ["target", "turn"], ["sign"]),
        helper.make_node("Reshape", ["sign", "shape"], ["sign4"]),
        helper.make_node("Mul", ["seen", "sign4"], ["perturbation"]),
    ]
    image = ["batch", 1, SIDE, SIDE]
    graph = helper.make_graph(
        nodes,
        "generator",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, image),
            helper.make_tensor_value_info("target", TensorProto.FLOAT, ["batch", 2]),
        ],
        [helper.make_tensor_value_info("perturbation", TensorProto.FLOAT, image)],
        [
            numpy_helper.from_array(rng.normal(size=(1, 1, 3, 3)).astype(np.float32), "w"),
            numpy_helper.from_array(np.array([[1], [-1]], np.float32), "turn"),
            numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture
def bundle_with(tmp_path: Path, small_draft: Callable[..., ManifestDraft]) -> BundleWith:
    """Write a signed bundle with as many generators as asked for, and no surrogate."""

    def write(generators: int = 1, method: str = "salm") -> Path:
        graphs = {f"generator-{i}": generator() for i in range(generators)}
        draft = small_draft(
            graphs,
            SIDE,
            classes=("normal", "pneumonia"),
            role="generator",
            recipe=RecipeSettings(method=method, mask_ratio=0.25),
        )
        path = tmp_path / f"{method}-{generators}.medveil"
        write_bundle(path, draft, graphs, {}, generate_key())
        return path

    return write


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """Write a policy that allows the given methods."""

    def write(methods: Sequence[str]) -> Path:
        path = tmp_path / "policy.toml"
        path.write_text(f"allowed_methods = {json.dumps(list(methods))}\n")
        return path

    return write


def pixels(path: Path) -> np.ndarray:
    with PillowImage.open(path) as image:
        return np.asarray(image).astype(int)


def test_a_generator_protects_without_a_surrogate_and_within_the_budget(
    bundle_with: BundleWith, policy: Callable[..., Path], folder_source: Path, tmp_path: Path
) -> None:
    wishes = Wishes(bundle_with(), policy(["salm", "generated"]), threads=1, noise="generated")
    out = tmp_path / "out"
    report = make_release(Call(folder_source, out, None, None, wishes)).summary
    assert (report["exit_code"], report["verified"], report["method"]) == (ExitCode.OK, 6, "generated")
    assert "was not measured" in str(report["proxy_check"])
    for source in folder_source.rglob("*.png"):
        change = pixels(out / source.relative_to(folder_source)) - pixels(source)
        assert np.abs(change).max() == 8
        assert (change != 0).sum() == 16  # a quarter of 64
    assert recorded_call(out, None).wishes.noise == "generated"


def test_images_of_two_classes_are_pushed_opposite_ways(
    bundle_with: BundleWith, policy: Callable[..., Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    source, out = tmp_path / "twins", tmp_path / "out"
    twin = rng.integers(30, 220, (SIDE, SIDE), np.uint8)
    for name in ("normal", "pneumonia"):
        (source / name).mkdir(parents=True)
        PillowImage.fromarray(twin).save(source / name / "twin.png")
    wishes = Wishes(bundle_with(), policy(["salm", "generated"]), threads=1, noise="generated")
    make_release(Call(source, out, None, None, wishes))
    normal, pneumonia = (pixels(out / name / "twin.png") - twin for name in ("normal", "pneumonia"))
    assert normal.any()
    assert np.array_equal(normal, -pneumonia)


def test_images_of_another_size_are_quarantined_by_name_and_the_rest_goes_on(
    bundle_with: BundleWith, policy: Callable[..., Path], folder_source: Path, tmp_path: Path
) -> None:
    PillowImage.fromarray(np.full((9, SIDE), 90, np.uint8)).save(folder_source / "normal" / "tall.png")
    wishes = Wishes(bundle_with(), policy(["salm", "generated"]), threads=1, noise="generated")
    report = make_release(Call(folder_source, tmp_path / "out", None, None, wishes)).summary
    assert report["verified"] == 6
    assert report["quarantined_by_reason"] == {"generator-size": 1}


@pytest.mark.parametrize(
    ("methods", "generators", "method", "code"),
    [
        (["salm"], 1, "salm", "method-not-allowed"),
        (["salm", "generated"], 2, "salm", "no-generator"),
        (["tap", "generated"], 1, "tap", "no-generator"),
    ],
    ids=["policy", "two of them", "another method's"],
)
def test_nobody_gets_a_generator_that_policy_and_bundle_do_not_both_offer(
    bundle_with: BundleWith,
    policy: Callable[..., Path],
    methods: list[str],
    generators: int,
    method: str,
    code: str,
) -> None:
    wishes = Wishes(bundle_with(generators, method), policy(methods), threads=1, noise="generated")
    with pytest.raises(ConfigurationError) as refused:
        prepare(wishes)
    assert refused.value.code == code


def test_without_asking_the_bundle_needs_a_surrogate_as_before(bundle_with: BundleWith) -> None:
    with pytest.raises(ConfigurationError) as refused:
        prepare(Wishes(bundle_with(), threads=1))
    assert refused.value.code == "no-surrogate"
