"""What the noise pushes towards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medveil.models.errors import ConfigurationError
from medveil.models.methods import Settings
from medveil.models.methods.targets import objective_for, one_hot, permutation_for, soften


@pytest.mark.parametrize("classes", [2, 3, 14])
def test_by_default_every_class_goes_to_the_next(classes: int) -> None:
    assert permutation_for(None, classes).tolist() == [*range(1, classes), 0]


@pytest.mark.parametrize("wrong", [(0, 1), (1, 1), (1, 2), (1,), (1, 0, 2), ()])
def test_a_permutation_moves_every_class_and_keeps_them_all(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        permutation_for(wrong, 2)
    assert refused.value.code == "permutation"


def test_a_single_class_cannot_be_permuted() -> None:
    with pytest.raises(ConfigurationError):
        permutation_for(None, 1)


def test_soft_targets_are_distributions_that_keep_the_aim() -> None:
    soft = soften(one_hot(np.array([0, 2]), 3), 0.7)
    assert soft.sum(axis=1) == pytest.approx([1, 1])
    assert soft.argmax(axis=1).tolist() == [0, 2]
    assert soft[0] == pytest.approx([0.8, 0.1, 0.1])


def test_each_kind_of_target(make_batch: Any) -> None:
    batch = make_batch(3)
    settings = Settings(permutation=(2, 0, 1))

    def aims(kind: Any) -> list[int]:
        return objective_for(kind, batch, 3, settings).targets.argmax(axis=1).tolist()

    assert aims("permuted") == [2, 0, 1]
    assert aims("label") == aims("away") == [0, 1, 2]
    assert objective_for("away", batch, 3, settings).sign == -1
    assert objective_for("uniform", batch, 3, settings).targets == pytest.approx(1 / 3)
    assert (np.array(aims("random")) != batch.labels).all()


def test_a_random_target_belongs_to_the_image_and_is_never_its_label(make_batch: Any) -> None:
    batch = make_batch(40)
    settings = Settings(seed=3)
    whole = objective_for("random", batch, 3, settings).targets.argmax(axis=1)
    assert (whole != batch.labels).all()
    assert set((whole - batch.labels) % 3) == {1, 2}
    alone = objective_for("random", batch.select(np.array([7])), 3, settings).targets.argmax(axis=1)
    assert alone[0] == whole[7]
