"""`medveil-agent` with a signed segmentation bundle: two tiny generators, real masks, the whole command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import pydicom
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as PillowImage
from pydicom import uid as uids

from medveil.agent.check_call import CheckCall
from medveil.agent.engine import open_generator
from medveil.agent.release_job import ledger_of
from medveil.agent.segmentation.site_check import recorded_masked_check
from medveil.agent.segmentation.site_check.check import MaskedCheckSettings, check_masked_release, has_masks
from medveil.agent.segmentation.site_check.command import run_check
from medveil.agent.segmentation.site_check.training import SCHEDULE
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.bundle import (
    GoldenAnswers,
    InputContract,
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
from medveil.models.cli_support import OutputFormat
from medveil.models.errors import ConfigurationError, ExitCode, InputError

TILE, HALO = (16, 16), 2
SLAB = (8, 16, 16)
"""A tile of a volume: it has fewer slices than the volumes here, so every volume takes several slabs."""


def _generator(seed: int, tile: tuple[int, ...]) -> bytes:
    """Return two convolutions of 3 a side and a tanh as ONNX: a tile in, answers in [-1, 1] of its shape."""
    rng = np.random.default_rng(seed)
    kernel = (3,) * len(tile)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((3 * rng.normal(size=shape)).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], pads=[1, 1] * len(tile)),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1] * len(tile)),
        helper.make_node("Tanh", ["c2"], ["noise"]),
    ]
    graph = helper.make_graph(
        nodes,
        "generator",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, *tile])],
        [helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", 1, *tile])],
        [weight("w1", 4, 1, *kernel), weight("w2", 1, 4, *kernel)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


@pytest.fixture
def masked_bundle(tmp_path: Path, small_draft: Callable[..., ManifestDraft]) -> Callable[..., Path]:
    """Write a bundle for the class `lesion`; its coordinator measured the given overlap of a victim.

    ``drawn``: a method that needs no generator; give no parts then.
    """

    def write(
        protected_dice: float = 0.1,
        *,
        parts: tuple[str, ...] = ("contour", "texture"),
        tile: tuple[int, ...] = TILE,
        drawn: str = "",
        golden: Mapping[str, GoldenAnswers] | None = None,
    ) -> Path:
        graphs = {part: _generator(seed, tile) for seed, part in enumerate(parts)}
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
            TILE[0],
            classes=("background", "lesion"),
            role="generator",
            task="segmentation",
            input=InputContract(
                channels=1,
                rows=tile[-2],
                columns=tile[-1],
                slices=tile[0] if len(tile) == 3 else None,
                channel_meaning="grey",
            ),
            recipe=RecipeSettings(
                method=drawn or ("umed" if len(tile) == 2 else "voxshield"),
                objective="label",
                epsilon_255=4.0,
                mask_ratio=1.0,
            ),
            segmentation=SegmentationContract(
                generators=tuple(GeneratorUse(part=part, graph=part) for part in graphs),
                band_radius=2 if len(tile) == 2 and not drawn else 0,
                texture_bound=True,
                target=None if drawn else "labels",
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
        path = tmp_path / f"masked-{protected_dice}-{len(tile)}{drawn}.medveil"
        write_bundle(path, draft, graphs, golden or {}, Ed25519PrivateKey.from_private_bytes(b"\7" * 32))
        return path

    return write


@pytest.fixture
def volume_bundle(masked_bundle: Callable[..., Path]) -> Path:
    """A bundle whose generator looks across slices."""
    return masked_bundle(parts=("roi",), tile=SLAB)


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
    assert report["surrogates"] == "none needed: the bundle's generators make the noise"
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


def test_a_site_protects_with_gratings_and_needs_no_graph(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    rules = policy(tmp_path, ALIASES)
    bundle = masked_bundle(parts=(), drawn="grating")
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        answer = agent(
            *("protect", masked_source, "--out", out, "--bundle", bundle, "--policy", rules),
            *("--format", "json"),
        )
        assert answer.code == 0, answer.stderr
        assert answer.json["verified"] == 4
        assert answer.json["surrogates"] == "none needed: the method draws its noise"
    row, column = np.mgrid[:50, :42]
    for number in range(4):
        name = f"images/{number}.png"
        clean = np.asarray(PillowImage.open(masked_source / name)).astype(int)
        written = np.asarray(PillowImage.open(outs[0] / name)).astype(int)
        inside = np.asarray(PillowImage.open(masked_source / f"GTV/{number}.png")) > 0
        # Pixel by pixel the full budget, one way and the other in turn; nothing outside of the mask.
        assert np.array_equal((written - clean)[inside], (4 - 8 * ((row + column) % 2))[inside])
        assert not (written - clean)[~inside].any()
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    told = agent("doctor", masked_source, "--bundle", bundle, "--policy", rules)
    assert told.code == 0, told.stderr
    assert "the method draws its noise" in " ".join(told.stdout.split())


def test_doctor_tries_masked_images_before_the_first_run(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    rules = policy(tmp_path, ALIASES)
    answer = agent(
        *("doctor", masked_source, "--bundle", masked_bundle(), "--policy", rules, "--format", "json"),
    )
    assert answer.code == 0, answer.stdout
    assert answer.json["forecast"]["images"] == 4
    (found,) = [check["detail"] for check in answer.json["checks"] if check["name"] == "source"]
    assert found.startswith("4 images in 4 files, 4 files beside them")


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


# --- the site's own check -----------------------------------------------------------------------------------

SHORT = MaskedCheckSettings(
    seeds=1,
    schedule=replace(SCHEDULE, steps=4, batch_size=4, scored=2),
    training_patches=8,
    hold_out_patches=6,
)


def test_a_site_tries_its_own_release_and_the_result_counts_until_the_release_changes(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    _more(masked_source, range(4, 8))
    rules, out = policy(tmp_path, ALIASES), tmp_path / "out"
    call = ("protect", masked_source, "--out", out, "--bundle", masked_bundle(), "--policy", rules)
    assert agent(*call).code == 0
    assert has_masks(out)
    check = check_masked_release(out, settings=SHORT)
    assert (check.seeds, check.hold_out_units, check.verdict) == (1, 3, "undecided")
    assert check.word.startswith("perturbed, not verified")
    workspace = Workspace(out, private_beside(out))
    with ledger_of(out, None) as ledger:
        assert recorded_masked_check(workspace, ledger) == check
    _more(masked_source, range(8, 9))
    assert agent(*call).code == 0
    with ledger_of(out, None) as ledger:
        assert recorded_masked_check(workspace, ledger) is None
    assert not list(workspace.private.glob("check-*"))


def test_too_small_a_release_or_another_bundle_is_no_ground_for_a_check(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    rules, out = policy(tmp_path, ALIASES), tmp_path / "out"
    agent("protect", masked_source, "--out", out, "--bundle", masked_bundle(), "--policy", rules)
    with pytest.raises(InputError) as few:
        check_masked_release(out, settings=SHORT)
    assert few.value.code == "too-few-images"
    with pytest.raises(ConfigurationError) as other:
        check_masked_release(out, bundle=masked_bundle(0.2), settings=SHORT)
    assert other.value.code == "other-bundle"


def test_the_check_prints_what_it_found_and_refuses_by_policy(
    agent: Callable[..., Any],
    masked_bundle: Callable[..., Path],
    masked_source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _more(masked_source, range(4, 8))
    strict, out = policy(tmp_path, f'{ALIASES}unproven = "refuse"\n'), tmp_path / "out"
    agent("protect", masked_source, "--out", out, "--bundle", masked_bundle(), "--policy", strict)
    capsys.readouterr()

    def check(output: OutputFormat, rules: Path | None = None) -> ExitCode:
        asked = CheckCall(out, None, None, rules, 5, 1, ("unet-bn",), 1, output)
        return run_check(asked, schedule=SHORT.schedule)

    assert check(OutputFormat.JSON) is ExitCode.REFUSED
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["refused_by_policy"]) == ("undecided", True)
    victim, (low, high) = said["victims"][0], said["victims"][0]["interval"]
    assert victim["architecture"] == "unet-bn"
    assert 0 < said["constant_mask_dice"] < 1
    assert 0 <= low <= victim["protected_recoverable_dice"] <= high <= 1
    (tmp_path / "lenient").mkdir()
    assert check(OutputFormat.TABLE, policy(tmp_path / "lenient", ALIASES)) is ExitCode.OK
    shown = capsys.readouterr().out
    assert "status: perturbed, not verified by a victim" in shown
    assert "do not share" not in shown
    assert f"{victim['protected_recoverable_dice']:.2f} / {victim['clean_recoverable_dice']:.2f}" in shown
    assert f"the same for every image, finds {said['constant_mask_dice']:.2f}" in shown


def _more(source: Path, numbers: range) -> None:
    """Add images like the first ones, each a little larger, so that a draw by halves meets two sizes."""
    rng = np.random.default_rng(numbers.start)
    for number in numbers:
        row, column = np.mgrid[: 44 + 2 * number, :42]
        disc = (row - 20 - number) ** 2 + (column - 20) ** 2 < 90
        for folder, pixels in (
            ("images", rng.integers(40, 210, row.shape, np.uint8)),
            ("GTV", 255 * disc.astype(np.uint8)),
        ):
            PillowImage.fromarray(pixels).save(source / folder / f"{number}.png")


def test_the_command_checks_masks_with_segmentation_victims_and_the_summary_says_the_word(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    _more(masked_source, range(4, 8))
    rules, out = policy(tmp_path, ALIASES), tmp_path / "out"
    call = ("protect", masked_source, "--out", out, "--bundle", masked_bundle(), "--policy", rules)
    agent(*call)
    word = check_masked_release(out, settings=SHORT).word
    assert agent(*call, "--format", "json").json["protection"] == word
    unknown = agent("check", out, "--victim", "mobilenet", "--format", "json")
    assert (unknown.code, unknown.json["error"]["code"]) == (2, "architecture")
    late = agent("check", out, "--victim", "unet-bn", "--seeds", "1", "--minutes", "0", "--format", "json")
    assert (late.code, late.json["error"]["code"]) == (2, "time-limit")


def test_a_generator_that_answers_otherwise_than_at_the_coordinator_is_refused(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    rules = policy(tmp_path, ALIASES)
    image = np.random.default_rng(3).random((1, 1, *TILE), np.float32)
    said = {
        part: open_generator(_generator(seed, TILE), threads=1, memory_budget_bytes=2**28).perturbation(image)
        for seed, part in enumerate(("contour", "texture"))
    }

    def protect(name: str, answers: Mapping[str, np.ndarray]) -> Any:
        golden = {part: GoldenAnswers(images=image, answers=answer) for part, answer in answers.items()}
        bundle = masked_bundle(golden=golden)
        return agent(
            *("protect", masked_source, "--out", tmp_path / name, "--bundle", bundle, "--policy", rules),
            *("--format", "json"),
        )

    assert protect("as-signed", said).code == 0
    refused = protect("otherwise", {**said, "texture": np.float32(0.99) * said["texture"]})
    assert (refused.code, refused.json["error"]["code"]) == (5, "golden")
    assert "'texture'" in refused.json["error"]["message"]
    assert not (tmp_path / "otherwise").exists()


# --- volumes ------------------------------------------------------------------------------------------------

DEPTH = 20
MARKED = slice(5, 15)
"""Slices of a volume that hold some of the structure: more than one slab of the generator."""


def _oblique() -> np.ndarray:
    """Return an affine of 0.7 x 0.9 x 3 mm voxels, turned about two axes."""
    turn, tilt = 0.3, 0.2
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([0.7, 0.9, 3.0])
    affine[:3, 3] = (-31.5, 12.25, 80.0)
    return affine


def _volume(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and their label map, ``(x, y, z)``."""
    voxels = rng.integers(100, 900, (26, 30, DEPTH)).astype(np.int16)
    labels = np.zeros(voxels.shape, np.uint8)
    labels[6:18, 8:20, MARKED] = 1
    return voxels, labels


def _save_volume(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, _oblique() if affine is None else affine), path)


def test_a_drawn_volume_alternates_from_slice_to_slice_also_where_slabs_meet(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    source, out = tmp_path / "site", tmp_path / "out"
    voxels, labels = _volume(rng)
    voxels[labels > 0] = 500  # no change is cut by the window
    _save_volume(source / "imagesTr/1.nii.gz", voxels)
    _save_volume(source / "labelsTr/1.nii.gz", labels)
    bundle = masked_bundle(parts=(), drawn="grating-volume", tile=SLAB)
    answer = agent("protect", source, "--out", out, "--bundle", bundle, "--format", "json")
    assert answer.code == 0, answer.stdout
    moved = np.asarray(nibabel.load(out / "imagesTr/1.nii.gz").dataobj).astype(int) - voxels
    assert not moved[labels == 0].any()
    inside = moved[6:18, 8:20, MARKED]
    assert np.array_equal(np.sign(inside[..., 1:]), -np.sign(inside[..., :-1]))
    assert np.abs(inside).min() > 0


def test_volumes_are_protected_in_slabs_and_their_labels_and_places_stay_what_they_were(
    agent: Callable[..., Any], volume_bundle: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    source, out = tmp_path / "site", tmp_path / "out"
    voxels, labels = _volume(rng)
    _save_volume(source / "imagesTr/1.nii.gz", voxels)
    _save_volume(source / "labelsTr/1.nii.gz", labels)
    answer = agent("protect", source, "--out", out, "--bundle", volume_bundle, "--format", "json")
    assert answer.code == 0, answer.stdout
    assert (answer.json["images"], answer.json["verified"], answer.json["method"]) == (20, 20, "voxshield")
    assert 0 < answer.json["epsilon_max"] <= 4
    written = nibabel.load(out / "imagesTr/1.nii.gz")
    changed = np.asarray(written.dataobj) != voxels
    assert not changed[labels == 0].any()
    assert changed[:, :, MARKED].any(axis=(0, 1)).all()
    np.testing.assert_array_equal(written.affine, nibabel.load(source / "imagesTr/1.nii.gz").affine)
    np.testing.assert_allclose(written.header.get_zooms(), (0.7, 0.9, 3.0), rtol=1e-6)
    label = "labelsTr/1.nii.gz"
    assert (out / label).read_bytes() == (source / label).read_bytes()
    back = agent("restore", out, "--out", tmp_path / "back", "--format", "json")
    assert back.code == 0
    np.testing.assert_array_equal(
        np.asarray(nibabel.load(tmp_path / "back/imagesTr/1.nii.gz").dataobj), voxels
    )


def test_a_series_is_protected_as_one_volume_and_its_contours_stay_where_they_were(
    agent: Callable[..., Any], volume_bundle: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    values, labels = _volume(rng)
    stacked, marks = values.transpose(2, 1, 0), labels.transpose(2, 1, 0)
    study = tmp_path / "series"
    _save_series(study, stacked, marks)
    out = tmp_path / "out"
    rules = policy(tmp_path, "[windows]\nchoice = 'presets'\npresets = { CT = [[511.5, 1024]] }\n")
    answer = agent(
        *("protect", study, "--out", out, "--bundle", volume_bundle, "--policy", rules, "--format", "json"),
    )
    assert answer.code == 0, answer.stdout
    assert (answer.json["images"], answer.json["verified"]) == (DEPTH, DEPTH)
    found = np.stack([pydicom.dcmread(out / f"{n:02}.dcm").pixel_array.astype(int) for n in range(DEPTH)])
    change = found - stacked
    assert not change[marks == 0].any()
    assert change[MARKED].any(axis=(1, 2)).all()
    contours, copied = (pydicom.dcmread(folder / "rtstruct.dcm") for folder in (study, out))
    for ours, theirs in zip(
        *(d.ROIContourSequence[0].ContourSequence for d in (contours, copied)), strict=True
    ):
        assert ours.ContourData == theirs.ContourData


# --- bad input ----------------------------------------------------------------------------------------------


def test_every_bad_picture_or_mask_is_named_and_the_rest_is_protected(
    agent: Callable[..., Any], masked_bundle: Callable[..., Path], masked_source: Path, tmp_path: Path
) -> None:
    rng, good = np.random.default_rng(1), np.asarray(PillowImage.open(masked_source / "GTV/0.png"))
    cases: dict[str, tuple[np.ndarray | None, str]] = {
        "alone": (None, "missing-mask"),
        "other-size": (good[:, :-1], "mask-size"),
        "empty": (np.zeros_like(good), "empty-mask"),
        "everything": (np.full_like(good, 255), "full-mask"),
        "colourful": (rng.integers(0, 255, (50, 42, 3), np.uint8), "mask-colour"),
    }
    for number, (name, (mask, _)) in enumerate(cases.items()):
        picture = rng.integers(40, 210, (50, 42), np.uint8)
        picture[0, 0] = number
        PillowImage.fromarray(picture).save(masked_source / "images" / f"{name}.png")
        if mask is not None:
            PillowImage.fromarray(mask).save(masked_source / "GTV" / f"{name}.png")
    # Values stand for classes in a folder that isn't called after one.
    (masked_source / "masks").mkdir()
    PillowImage.fromarray(rng.integers(40, 210, (50, 42), np.uint8)).save(
        masked_source / "images/value-7.png"
    )
    PillowImage.fromarray(good // 255 * 7).save(masked_source / "masks/value-7.png")
    expected = {f"images/{name}.png": reason for name, (_, reason) in cases.items()}
    _is_named(
        agent, masked_source, masked_bundle(), tmp_path, expected | {"images/value-7.png": "unknown-class"}, 4
    )


def test_every_bad_volume_is_named_and_the_rest_is_protected(
    agent: Callable[..., Any], volume_bundle: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    source = tmp_path / "site"
    voxels, labels = _volume(rng)
    damaged = voxels.astype(np.float32)
    damaged[3, 4, 5] = np.nan
    shifted = _oblique()
    shifted[:3, 3] += 40
    cases: dict[str, tuple[np.ndarray, np.ndarray | None, np.ndarray | None, str]] = {
        "four-axes": (np.stack([voxels, voxels], axis=3), labels, None, "4d"),
        "nan": (damaged, labels, None, "not-finite"),
        "alone": (voxels + 1, None, None, "missing-mask"),
        "shorter": (voxels + 2, labels[:, :, :-2], None, "mask-size"),
        "elsewhere": (voxels + 3, labels, shifted, "mask-grid"),
        "empty": (voxels + 4, np.zeros_like(labels), None, "empty-mask"),
        "everything": (voxels + 5, np.ones_like(labels), None, "full-mask"),
        "value-5": (voxels + 6, labels * 5, None, "unknown-class"),
    }
    for name, (image, mask, affine, _) in cases.items():
        _save_volume(source / f"images/{name}.nii.gz", image)
        if mask is not None:
            _save_volume(source / f"labels/{name}.nii.gz", mask, affine)
    _save_volume(source / "images/good.nii.gz", voxels)
    # The same label map with its axes stored in another order and direction: the header says so, and is believed.
    turned = nibabel.Nifti1Image(labels, _oblique())
    turned = turned.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    nibabel.save(turned, source / "labels/good.nii.gz")
    expected = {f"images/{name}.nii.gz": reason for name, (*_, reason) in cases.items()}
    expected["labels/four-axes.nii.gz"] = "mask-without-image"
    expected["labels/nan.nii.gz"] = "mask-without-image"
    out = _is_named(agent, source, volume_bundle, tmp_path, expected, DEPTH)
    changed = np.asarray(nibabel.load(out / "images/good.nii.gz").dataobj) != voxels
    assert changed.any()
    assert not changed[labels == 0].any()


def _is_named(
    agent: Callable[..., Any],
    source: Path,
    bundle: Path,
    tmp_path: Path,
    expected: Mapping[str, str],
    verified: int,
) -> Path:
    """Protect a source; assert which files are named for which reason, and that none of them is released."""
    out = tmp_path / "out"
    rules = policy(tmp_path, ALIASES)
    done = agent(
        *("protect", source, "--out", out, "--bundle", bundle, "--policy", rules, "--format", "json"),
    )
    assert (done.code, done.json["verified"]) == (3, verified), done.stdout
    listed = agent("quarantine", "list", out, "--format", "json").json["quarantined"]
    assert {entry["file"]: entry["reason"] for entry in listed} == dict(expected)
    assert all(entry["message"].endswith(".") and len(entry["message"]) > 40 for entry in listed)
    assert not any((out / name).exists() for name in expected)
    return out


# --- a DICOM series -----------------------------------------------------------------------------------------


def _save_series(folder: Path, stacked: np.ndarray, marks: np.ndarray) -> None:
    """Write axial CT slices, and a structure set with one rectangle on each slice that is marked."""
    folder.mkdir()
    structure = _dicom(uids.RTStructureSetStorage, "1.2.9", "1.2.8", "RTSTRUCT")
    lesion = pydicom.Dataset()
    lesion.ROINumber, lesion.ROIName, lesion.ReferencedFrameOfReferenceUID = 1, "lesion", "1.2.5"
    structure.StructureSetROISequence = pydicom.Sequence([lesion])
    series, study, frame = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    series.SeriesInstanceUID, frame.FrameOfReferenceUID = "1.2.2", "1.2.5"
    study.RTReferencedSeriesSequence = pydicom.Sequence([series])
    frame.RTReferencedStudySequence = pydicom.Sequence([study])
    structure.ReferencedFrameOfReferenceSequence = pydicom.Sequence([frame])
    drawn = pydicom.Dataset()
    drawn.ReferencedROINumber, drawn.ContourSequence = 1, pydicom.Sequence()
    structure.ROIContourSequence = pydicom.Sequence([drawn])
    for number, (pixels, inside) in enumerate(zip(stacked, marks, strict=True)):
        image = _dicom(uids.CTImageStorage, f"1.2.3.{number + 1}", "1.2.2", "CT")
        image.FrameOfReferenceUID = "1.2.5"
        image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, 3 * number], [1, 0, 0, 0, 1, 0]
        image.PixelSpacing, image.SliceThickness = [1, 1], 3
        image.Rows, image.Columns = pixels.shape
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
        image.RescaleSlope, image.RescaleIntercept = 1, 0
        image.PixelData = pixels.astype(np.uint16).tobytes()
        image["PixelData"].VR = "OW"
        image.save_as(folder / f"{number:02}.dcm", enforce_file_format=True)
        if inside.any():
            rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
            top, bottom = rows[0] - 0.5, rows[-1] + 0.5
            left, right = columns[0] - 0.5, columns[-1] + 0.5
            contour = pydicom.Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
            corners = ((left, top), (right, top), (right, bottom), (left, bottom))
            contour.ContourData = [float(v) for x, y in corners for v in (x, y, 3 * number)]
            named = pydicom.Dataset()
            named.ReferencedSOPClassUID = uids.CTImageStorage
            named.ReferencedSOPInstanceUID = f"1.2.3.{number + 1}"
            contour.ContourImageSequence = pydicom.Sequence([named])
            drawn.ContourSequence.append(contour)
    structure.save_as(folder / "rtstruct.dcm", enforce_file_format=True)


def _dicom(sop_class: str, instance: str, series: str, modality: str) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, instance
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = "1.2.1", series, modality
    dataset.PatientName, dataset.PatientID = "Drawn^Cube", "D-1"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    return dataset
