from __future__ import annotations

import pytest
from pydantic import ValidationError

from medveil.models.bundle import HardeningSettings, ManifestDraft, RecipeSettings, Taxonomy, TaxonomyClass
from medveil.models.errors import ConfigurationError
from medveil.models.methods import SalmSettings


def test_a_recipe_becomes_the_methods_own_settings() -> None:
    recipe = RecipeSettings(
        label_permutation=(1, 0),
        epsilon_255=8,
        mask_ratio=0.5,
        confidence=0.9,
        hardening=HardeningSettings(blur_sigmas=(1.0,), adversary_radius_255=2.0),
    )
    settings = recipe.method_settings()
    assert isinstance(settings, SalmSettings)
    assert settings.epsilon == pytest.approx(8 / 255)
    assert settings.permutation == (1, 0)
    assert settings.confidence == 0.9
    assert settings.hardening.blur_sigmas == (1.0,)
    assert settings.hardening.adversary_radius == pytest.approx(2 / 255)
    narrowed = recipe.method_settings(epsilon_255=4, mask_ratio=0.1)
    assert (narrowed.epsilon, narrowed.mask_ratio) == (pytest.approx(4 / 255), 0.1)


def test_every_setting_of_the_recipe_reaches_the_method() -> None:
    changed = RecipeSettings(
        objective="uniform", mask_score="window", amplitude="soft", colour="channels", steps=3, step_size=0.5,
        step_rule="gradient", warmup_steps=2, psnr_floor_db=36.0, seed=5,
    ).method_settings()  # fmt: skip
    assert isinstance(changed, SalmSettings)
    assert (changed.target, changed.mask_score, changed.amplitude) == ("uniform", "window", "soft")
    assert (changed.colour, changed.steps, changed.step_size) == ("channels", 3, 0.5)
    assert (changed.step_rule, changed.warmup_steps, changed.psnr_floor_db) == ("gradient", 2, 36.0)
    assert changed.seed == 5


def test_a_recipe_can_name_another_method_but_no_unknown_one() -> None:
    assert RecipeSettings(method="tap").method_settings().epsilon == pytest.approx(8 / 255)
    with pytest.raises(ConfigurationError):
        RecipeSettings(method="nonsense").method_settings()


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon_255": 0.0},
        {"epsilon_255": float("nan")},
        {"mask_ratio": 1.5},
        {"steps": 0},
        {"steps": "20"},
        {"unknown": 1},
    ],
)
def test_a_recipe_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RecipeSettings.model_validate(change)


def test_a_manifest_is_frozen(draft: ManifestDraft) -> None:
    with pytest.raises(ValidationError):
        draft.recipe.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "classes",
    [
        (TaxonomyClass(name="a", stored_value=0),),
        (TaxonomyClass(name="a", stored_value=0), TaxonomyClass(name="a", stored_value=1)),
        (TaxonomyClass(name="a", stored_value=0), TaxonomyClass(name="b", stored_value=0)),
    ],
)
def test_an_ambiguous_taxonomy_is_refused(classes: tuple[TaxonomyClass, ...]) -> None:
    with pytest.raises(ValidationError):
        Taxonomy(classes=classes)


def test_the_parts_of_a_manifest_must_fit_together(draft: ManifestDraft) -> None:
    fields = dict(draft)
    with pytest.raises(ValidationError, match="permutation"):
        ManifestDraft(**fields | {"recipe": RecipeSettings(label_permutation=(0, 1, 2))})
    with pytest.raises(ValidationError, match="count every class"):
        ManifestDraft(
            **fields | {"training_data": draft.training_data.model_copy(update={"train_counts": (1,)})}
        )
    with pytest.raises(ValidationError, match="time zone"):
        ManifestDraft(**fields | {"created": draft.created.replace(tzinfo=None)})


def test_only_a_generator_may_lack_held_out_quality(draft: ManifestDraft) -> None:
    fields = dict(draft.graphs[0]) | {"hold_out": None}
    assert type(draft.graphs[0]).model_validate(fields | {"role": "generator"}).hold_out is None
    with pytest.raises(ValidationError, match="held-out"):
        type(draft.graphs[0]).model_validate(fields)


def test_graph_names_cannot_be_paths(draft: ManifestDraft) -> None:
    for name in ("../up", "a/b", "", "A", "a" * 65, "nul\0"):
        with pytest.raises(ValidationError):
            type(draft.graphs[0]).model_validate(dict(draft.graphs[0]) | {"name": name})
