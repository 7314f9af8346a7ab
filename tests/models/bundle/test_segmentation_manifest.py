from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from medveil.models.bundle import (
    GoldenAnswers,
    InputContract,
    ManifestDraft,
    RecipeSettings,
    check_answers,
    constant_mask_sentence,
    container,
    fingerprint,
    open_bundle,
    write_bundle,
)
from medveil.models.bundle.card import model_card
from medveil.models.bundle.manifest import (
    GeneratorUse,
    SegmentationCheck,
    SegmentationContract,
    SegmentationVictim,
)
from medveil.models.cli import describe, print_summary
from medveil.models.errors import SelfTestError, SignatureError

CONTRACT = SegmentationContract(
    generators=(GeneratorUse(part="contour", graph="first"), GeneratorUse(part="texture", graph="second")),
    band_radius=2,
    texture_bound=True,
    target="foreground",
    halo=24,
    alignment=4,
)
CHECK = SegmentationCheck(
    images=40,
    epsilon_255=4.0,
    psnr_db=46.5,
    roi_psnr_db=39.0,
    attempts=3,
    effective=True,
    victims=(
        SegmentationVictim(
            architecture="unet-bn",
            seed=1,
            clean_dice=0.74,
            clean_iou=0.6,
            protected_dice=0.12,
            protected_iou=0.07,
            protected_peak_dice=0.2,
        ),
    ),
    constant_mask_dice=0.58,
)


def segmentation(draft: ManifestDraft, **changes: Any) -> ManifestDraft:
    graphs = tuple(g.model_copy(update={"role": "generator", "hold_out": None}) for g in draft.graphs)
    fields: dict[str, Any] = {
        "task": "segmentation",
        "recipe": RecipeSettings(method="umed-plus", objective="label", epsilon_255=4.0, mask_ratio=1.0),
        "segmentation": CONTRACT,
        "segmentation_check": CHECK,
        "graphs": graphs,
    }
    return ManifestDraft(**{**dict(draft), **fields, **changes})


def test_a_segmentation_bundle_comes_back_as_it_was_signed(
    tmp_path: Path, draft: ManifestDraft, key: Ed25519PrivateKey
) -> None:
    path = tmp_path / "small.bundle"
    written = write_bundle(path, segmentation(draft), {"first": b"1", "second": b"2"}, {}, key)
    bundle = open_bundle(path, trusted=None)
    assert bundle.manifest == written
    assert bundle.manifest.segmentation == CONTRACT
    assert bundle.manifest.segmentation_check == CHECK
    for said in (
        *("umed-plus", "contour band of 2 pixels", "0.120", "46.5 dB", "foreground everywhere"),
        constant_mask_sentence(0.58),
    ):
        assert said in bundle.card


def test_inspect_says_beside_the_victims_what_takes_no_image(
    tmp_path: Path, draft: ManifestDraft, key: Ed25519PrivateKey, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.bundle"
    write_bundle(path, segmentation(draft), {"first": b"1", "second": b"2"}, {}, key)
    facts = describe(open_bundle(path, trusted=None), signer_trusted=True)
    assert facts["segmentation_check"]["constant_mask_dice"] == 0.58
    print_summary(facts)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.endswith(constant_mask_sentence(0.58))
    assert "finds 0.58" in constant_mask_sentence(0.58)


def test_a_bundle_signed_before_constant_masks_were_tried_still_opens_and_shows(
    tmp_path: Path, draft: ManifestDraft, key: Ed25519PrivateKey, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.bundle"
    write_bundle(path, segmentation(draft), {"first": b"1", "second": b"2"}, {}, key)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members["manifest.json"])
    del manifest["segmentation_check"]["constant_mask_dice"]
    members["manifest.json"] = json.dumps(manifest).encode()
    body = container._zip(members)
    path.write_bytes(body + container._signature_block(body, key))
    bundle = open_bundle(path, trusted={fingerprint(key.public_key())})
    assert bundle.manifest.segmentation_check == CHECK.model_copy(update={"constant_mask_dice": None})
    assert "constant mask" not in model_card(bundle.manifest)
    print_summary(describe(bundle, signer_trusted=True))
    assert "A constant mask" not in capsys.readouterr().out


# --- noise that needs no graph ------------------------------------------------------------------------------

DRAWN: dict[str, Any] = {
    "recipe": RecipeSettings(method="grating", objective="label", epsilon_255=3.0, mask_ratio=1.0),
    "segmentation": CONTRACT.model_copy(update={"generators": (), "band_radius": 0, "target": None}),
    "graphs": (),
}


def blurred_check(recovered: float) -> SegmentationCheck:
    runs = tuple(
        CHECK.victims[0].model_copy(
            update={"seed": seed, "clean_recoverable_dice": 0.75, "recoverable_dice": recovered}
        )
        for seed in range(3)
    )
    return CHECK.model_copy(update={"blurred_victims": runs, "constant_mask_dice": 0.2})


def test_a_bundle_of_drawn_noise_holds_no_graph(
    tmp_path: Path, draft: ManifestDraft, key: Ed25519PrivateKey
) -> None:
    path = tmp_path / "drawn.bundle"
    written = write_bundle(path, segmentation(draft, **DRAWN), {}, {}, key)
    bundle = open_bundle(path, trusted=None)
    assert bundle.manifest == written
    assert bundle.manifest.graphs == ()
    for said in ("grating", "in the foreground only", "nothing was trained", "None."):
        assert said in bundle.card


@pytest.mark.parametrize(
    "changes",
    [
        {"graphs": ()},
        {"graphs": (), "segmentation": DRAWN["segmentation"]},
        {**DRAWN, "segmentation": DRAWN["segmentation"].model_copy(update={"target": "labels"})},
    ],
    ids=["generators without graphs", "generators missing", "a target without generators"],
)
def test_noise_that_needs_graphs_is_refused_without_them(
    draft: ManifestDraft, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError):
        # Copied values were not checked again: let the manifest read them as from a file.
        ManifestDraft.model_validate_json(segmentation(draft, **changes).model_dump_json())


def test_a_classification_bundle_needs_a_graph(draft: ManifestDraft) -> None:
    with pytest.raises(ValidationError, match="needs no graph"):
        ManifestDraft(**{**dict(draft), "graphs": ()})


@pytest.mark.parametrize(("recovered", "said"), [(0.7, "does not outlive a blur"), (0.3, "still held off")])
def test_card_and_inspect_say_what_a_blur_leaves(
    recovered: float,
    said: str,
    tmp_path: Path,
    draft: ManifestDraft,
    key: Ed25519PrivateKey,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "drawn.bundle"
    write_bundle(path, segmentation(draft, **DRAWN, segmentation_check=blurred_check(recovered)), {}, {}, key)
    bundle = open_bundle(path, trusted=None)
    assert said in bundle.card
    facts = describe(bundle, signer_trusted=True)
    assert facts["segmentation_check"]["holds_after_blur"] is (recovered < 0.4)
    print_summary(facts)
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert f"recover up to {recovered:.2f} where clean images give 0.75" in shown


# --- golden answers -----------------------------------------------------------------------------------------

ANSWERS = GoldenAnswers(
    images=np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 1, 2, 2),
    answers=np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 1, 2, 2),
)


class Says:
    """A session that answers one thing."""

    def __init__(self, answers: np.ndarray) -> None:
        self._answers = answers.astype(np.float32)

    def perturbation(self, images: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
        return self._answers


@pytest.fixture
def proved(tmp_path: Path, draft: ManifestDraft, key: Ed25519PrivateKey) -> Path:
    path = tmp_path / "proved.bundle"
    graphs = {"first": b"1", "second": b"2"}
    write_bundle(path, segmentation(draft), graphs, {"second": ANSWERS}, key)
    return path


def test_golden_answers_come_back_as_they_were_signed(proved: Path) -> None:
    bundle = open_bundle(proved, trusted=None)
    assert bundle.golden_answers("first") is None
    golden = bundle.golden_answers("second")
    assert golden is not None
    np.testing.assert_array_equal(golden.images, ANSWERS.images)
    np.testing.assert_array_equal(golden.answers, ANSWERS.answers)
    assert bundle.golden("second") is None


def test_a_session_that_answers_otherwise_is_refused() -> None:
    check_answers(Says(ANSWERS.answers + 1e-6), ANSWERS, name="second")
    turned, scaled, no_number = -ANSWERS.answers, 1.01 * ANSWERS.answers, np.full((2, 1, 2, 2), np.nan)
    one_wrong = ANSWERS.answers.copy()
    one_wrong[1] = one_wrong[1, :, ::-1]
    for wrong in (turned, scaled, no_number, one_wrong):
        with pytest.raises(SelfTestError) as refused:
            check_answers(Says(wrong), ANSWERS, name="second")
        assert refused.value.code == "golden"


@pytest.mark.parametrize(
    "change",
    [
        {"answers": np.zeros((2, 1, 2, 2), np.float32)},
        {"answers": np.ones((2, 1, 2, 3), np.float32)},
        {"answers": np.full((2, 1, 2, 2), np.inf, np.float32)},
        {"images": np.zeros((0, 1, 2, 2), np.float32), "answers": np.zeros((0, 1, 2, 2), np.float32)},
        {"rtol": 0.5},
    ],
    ids=["says nothing", "another shape", "no numbers", "no images", "asks for nothing"],
)
def test_golden_answers_that_prove_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SelfTestError) as refused:
        replace(ANSWERS, **change)
    assert refused.value.code == "golden-vector"


def test_a_signer_who_packs_answers_that_prove_nothing_is_named(proved: Path) -> None:
    bundle = open_bundle(proved, trusted=None)
    members = dict(bundle._members)
    silent = io.BytesIO()
    np.save(silent, np.zeros((2, 1, 2, 2), np.float32))
    members["golden/second.answers.npy"] = silent.getvalue()
    with pytest.raises(SignatureError) as refused:
        replace(bundle, _members=members).golden_answers("second")
    assert refused.value.code == "golden"


def test_only_a_generator_has_golden_answers(
    tmp_path: Path, draft: ManifestDraft, key: Ed25519PrivateKey
) -> None:
    with pytest.raises(ValidationError):
        write_bundle(tmp_path / "x", draft, {"first": b"1", "second": b"2"}, {"first": ANSWERS}, key)


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": None},
        {"task": "classification"},
        {"recipe": RecipeSettings(method="salm")},
        {"recipe": RecipeSettings(method="voxshield")},
    ],
    ids=["no contract", "contract without the task", "no segmentation method", "another method's parts"],
)
def test_parts_that_do_not_fit_are_refused(draft: ManifestDraft, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        segmentation(draft, **changes)


def test_a_method_for_volumes_needs_an_input_with_slices(draft: ManifestDraft) -> None:
    drawn = CONTRACT.model_copy(update={"generators": (), "target": None})
    recipe = RecipeSettings(method="grating-volume", objective="label", epsilon_255=4.0, mask_ratio=1.0)
    flat = InputContract(channels=1, rows=8, columns=8, channel_meaning="grey")
    deep = flat.model_copy(update={"slices": 8})
    assert segmentation(draft, recipe=recipe, segmentation=drawn, input=deep).input.slices == 8
    with pytest.raises(ValidationError, match="no slices"):
        segmentation(draft, recipe=recipe, segmentation=drawn, input=flat)


def test_a_part_must_name_a_graph_of_the_bundle(
    tmp_path: Path, draft: ManifestDraft, key: Ed25519PrivateKey
) -> None:
    stray = CONTRACT.model_copy(
        update={"generators": (CONTRACT.generators[0], GeneratorUse(part="texture", graph="third"))}
    )
    with pytest.raises(ValidationError):
        write_bundle(
            tmp_path / "x", segmentation(draft, segmentation=stray), {"first": b"1", "second": b"2"}, {}, key
        )


def test_two_generators_for_one_part_are_refused() -> None:
    twice = (GeneratorUse(part="contour", graph="first"), GeneratorUse(part="contour", graph="second"))
    with pytest.raises(ValidationError):
        SegmentationContract(**{**dict(CONTRACT), "generators": twice})


def test_the_card_of_a_volume_bundle_says_slices_and_foreground(
    tmp_path: Path, draft: ManifestDraft, key: Ed25519PrivateKey
) -> None:
    deep = segmentation(
        draft,
        input=InputContract(channels=1, rows=8, columns=6, slices=4, channel_meaning="grey"),
        recipe=RecipeSettings(method="voxshield", objective="label", epsilon_255=4.0, mask_ratio=1.0),
        segmentation=CONTRACT.model_copy(update={"generators": (GeneratorUse(part="roi", graph="first"),)}),
    )
    write_bundle(tmp_path / "x", deep, {"first": b"1", "second": b"2"}, {}, key)
    card = open_bundle(tmp_path / "x", trusted=None).card
    assert "4 slices of 8 x 6 pixels" in card
    assert "foreground only" in card


def test_a_tile_of_a_volume_has_its_slices_first() -> None:
    flat = InputContract(channels=3, rows=8, columns=6, channel_meaning="rgb")
    deep = InputContract(channels=1, rows=8, columns=6, slices=4, channel_meaning="grey")
    assert flat.shape == (3, 8, 6)
    assert deep.shape == (1, 4, 8, 6)


def test_the_contract_gives_the_methods_settings_at_any_budget() -> None:
    settings = CONTRACT.method_settings(epsilon_255=2, seed=5)
    assert (settings.epsilon, settings.band_radius, settings.texture_bound, settings.seed) == (
        2 / 255,
        2,
        True,
        5,
    )
