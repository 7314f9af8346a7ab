"""`medveil-agent` with a signed segmentation bundle: two tiny generators, real masks, the whole command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as PillowImage

from medveil.models.bundle import (
    ManifestDraft,
    RecipeSettings,
    write_bundle,
)
from medveil.models.bundle.manifest import (
    GeneratorUse,
    SegmentationCheck,
    SegmentationContract,
    SegmentationVictim,
)

TILE, HALO = 16, 2


def _generator(seed: int) -> bytes:
    """Return two convolutions of 3x3 and a tanh as ONNX: a tile in, answers in [-1, 1] of its shape."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((3 * rng.normal(size=shape)).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["c2"], ["noise"]),
    ]
    graph = helper.make_graph(
        nodes,
        "generator",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, TILE, TILE])],
        [helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", 1, TILE, TILE])],
        [weight("w1", 4, 1, 3, 3), weight("w2", 1, 4, 3, 3)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


@pytest.fixture
def masked_bundle(tmp_path: Path, small_draft: Callable[..., ManifestDraft]) -> Callable[..., Path]:
    """Write a bundle for the class `lesion`; its coordinator measured the given overlap of a victim."""

    def write(protected_dice: float = 0.1) -> Path:
        graphs = {part: _generator(seed) for seed, part in enumerate(("contour", "texture"))}
        victim = SegmentationVictim(
            architecture="unet-bn",
            seed=1,
            clean_dice=0.8,
            clean_iou=0.7,
            protected_dice=protected_dice,
            protected_iou=0.0,
            protected_peak_dice=protected_dice,
        )
        draft = small_draft(
            graphs,
            TILE,
            classes=("background", "lesion"),
            role="generator",
            task="segmentation",
            recipe=RecipeSettings(method="umed", objective="label", epsilon_255=4.0, mask_ratio=1.0),
            segmentation=SegmentationContract(
                generators=tuple(GeneratorUse(part=part, graph=part) for part in graphs),
                band_radius=2,
                texture_bound=True,
                target="labels",
                halo=HALO,
                alignment=4,
            ),
            segmentation_check=SegmentationCheck(
                images=10,
                epsilon_255=4.0,
                psnr_db=46.0,
                roi_psnr_db=38.0,
                attempts=1,
                effective=protected_dice < 0.4,
                victims=(victim,),
            ),
        )
        path = tmp_path / f"masked-{protected_dice}.medveil"
        write_bundle(path, draft, graphs, {}, Ed25519PrivateKey.from_private_bytes(b"\7" * 32))
        return path

    return write


@pytest.fixture
def masked_source(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Four grey PNGs of 50x42 and their masks, under this site's own name for the structure."""
    root = tmp_path / "site"
    row, column = np.mgrid[:50, :42]
    for number in range(4):
        for folder, pixels in (
            ("images", rng.integers(40, 210, (50, 42), np.uint8)),
            ("GTV", 255 * ((row - 25) ** 2 + (column - 20) ** 2 < (8 + number) ** 2).astype(np.uint8)),
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            PillowImage.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


def policy(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return path


ALIASES = '[segmentation]\naliases = { GTV = "lesion" }\n'


def test_a_site_protects_masked_images_with_one_command(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    rules = policy(tmp_path, ALIASES)
    out = tmp_path / "out"
    answer = agent(
        *("protect", masked_source, "--out", out, "--bundle", masked_bundle(), "--policy", rules),
        *("--format", "json"),
    )
    assert answer.code == 0, answer.stderr
    report = answer.json
    assert (report["images"], report["verified"]) == (4, 4)
    assert report["protection"] == "perturbed, not verified by a victim"
    assert "unet-bn 0.80 -> 0.10" in report["proxy_check"]
    assert Path(report["contact_sheet"]).is_file()
    for number in range(4):
        clean, written = (
            np.asarray(PillowImage.open(f / f"images/{number}.png")).astype(int) for f in (masked_source, out)
        )
        assert 0 < np.abs(clean - written).max() <= 4
        mask = f"GTV/{number}.png"
        assert (out / mask).read_bytes() == (masked_source / mask).read_bytes()
    back = agent("restore", out, "--out", tmp_path / "back", "--format", "json")
    assert back.code == 0
    assert back.json["restored"] == 8


def test_doctor_tries_masked_images_before_the_first_run(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    rules = policy(tmp_path, ALIASES)
    answer = agent(
        *("doctor", masked_source, "--bundle", masked_bundle(), "--policy", rules, "--format", "json"),
    )
    assert answer.code == 0, answer.stdout
    assert answer.json["forecast"]["images"] == 4


def test_noise_that_hindered_no_victim_is_marked_as_such_or_refused_by_policy(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    weak = masked_bundle(0.78)
    arguments = ("protect", masked_source, "--bundle", weak, "--format", "json")
    marked = agent(*arguments, "--out", tmp_path / "a", "--policy", policy(tmp_path, ALIASES))
    assert marked.code == 0
    assert marked.json["protection"].startswith(
        "perturbed, not verified: the coordinator's own victims learned"
    )
    rules = policy(tmp_path, f'{ALIASES}unproven = "refuse"\n')
    refused = agent(*arguments, "--out", tmp_path / "b", "--policy", rules)
    assert refused.code == 2
    assert refused.json["error"]["code"] == "unproven"
    assert not (tmp_path / "b").exists()
    proven = agent(
        *("protect", masked_source, "--bundle", masked_bundle(), "--out", tmp_path / "c", "--policy", rules)
    )
    assert proven.code == 0


def test_an_alias_for_a_class_that_the_bundle_does_not_have_is_a_mistake_in_the_policy(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    rules = policy(tmp_path, '[segmentation]\naliases = { GTV = "tumour" }\n')
    answer = agent(
        "protect", masked_source, "--out", tmp_path / "out", "--bundle", masked_bundle(), "--policy", rules
    )
    assert answer.code == 2
    assert "alias" in answer.stderr
