from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from medveil.models.bundle import InputContract, ManifestDraft, RecipeSettings, open_bundle, write_bundle
from medveil.models.bundle.manifest import (
    GeneratorUse,
    SegmentationCheck,
    SegmentationContract,
    SegmentationVictim,
)

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
    for said in ("umed-plus", "contour band of 2 pixels", "0.120", "46.5 dB", "foreground everywhere"):
        assert said in bundle.card


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
