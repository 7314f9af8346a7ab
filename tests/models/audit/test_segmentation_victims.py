from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medveil.models.errors import ConfigurationError

torch = pytest.importorskip("torch")
from medveil.models.audit import segmentation_architectures  # noqa: E402 (needs torch)
from medveil.models.audit.segmentation_victims import (  # noqa: E402
    SegmentationVictimSettings,
    pretrained,
    train_segmentation_victim,
)
from medveil.models.nets.segmentation import SEGMENTERS  # noqa: E402

pytestmark = pytest.mark.train

QUICK = SegmentationVictimSettings(architecture="unet-bn", steps=6, batch_size=4, readings=3)


def squares(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bright squares on darker noise: what any net finds."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 0.4, (count, 1, 16, 16)).astype(np.float32)
    labels = np.zeros((count, 16, 16), np.int64)
    for image, label in zip(images, labels, strict=True):
        top, left = rng.integers(0, 9, 2)
        image[0, top : top + 7, left : left + 7] += np.float32(0.5)
        label[top : top + 7, left : left + 7] = 1
    return images, labels


@pytest.mark.parametrize("name", segmentation_architectures.NAMES)
def test_every_victim_scores_every_pixel(name: str) -> None:
    net = segmentation_architectures.build(name, channels=3, classes=4)
    assert net(torch.rand(2, 3, 24, 32)).shape == (2, 4, 24, 32)


@pytest.mark.parametrize("name", segmentation_architectures.NAMES)
def test_victims_of_volumes_score_every_voxel(name: str) -> None:
    net = segmentation_architectures.build(name, channels=1, classes=3, dimensions=3)
    assert net(torch.rand(2, 1, 16, 24, 32)).shape == (2, 3, 16, 24, 32)


def test_a_victim_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigurationError) as refused:
        segmentation_architectures.build("segnet", channels=1, classes=2, dimensions=3)
    assert refused.value.code == "architecture"


def test_no_victim_is_a_surrogate() -> None:
    assert not set(segmentation_architectures.NAMES) & set(SEGMENTERS)


def test_the_instance_norm_victim_has_no_batch_norm() -> None:
    net = segmentation_architectures.build("unet-in", channels=1, classes=2)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert any(isinstance(m, torch.nn.InstanceNorm2d) for m in net.modules())


def test_an_unknown_victim_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ConfigurationError, match="unet-bn, unet-in") as refused:
        segmentation_architectures.build("sam", channels=1, classes=2)
    assert refused.value.code == "architecture"


def test_a_victim_learns_what_is_plain_to_see() -> None:
    settings = replace(QUICK, steps=60, batch_size=8)
    run = train_segmentation_victim(*squares(32, 0), *squares(12, 1), settings, classes=2, seed=0)
    assert run.last.dice > 0.8
    assert run.last.iou < run.last.dice
    assert run.peak_dice == max(run.dice_history)
    assert len(run.dice_history) == 3


@pytest.mark.parametrize(
    "change",
    [{}, {"augmentation": "strong"}, {"adversarial_radius": 4 / 255}],
    ids=["plain", "strong", "adversarial"],
)
def test_the_same_seed_gives_the_same_run_and_another_gives_another(change: dict[str, object]) -> None:
    settings = replace(QUICK, **change)
    first, again, other = (
        train_segmentation_victim(*squares(8, 0), *squares(4, 1), settings, classes=2, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_fine_tuning_begins_where_the_pretraining_ended() -> None:
    settings = replace(QUICK, steps=60, batch_size=8)
    start = pretrained(*squares(32, 0), settings, classes=2, seed=0)
    few = replace(settings, steps=2, readings=1)
    fresh, tuned = (
        train_segmentation_victim(
            *squares(8, 2), *squares(12, 1), few, classes=2, seed=3, start=weights
        ).last.dice
        for weights in (None, start)
    )
    assert tuned > 0.8 > fresh


def blocks(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same in three dimensions: columns of squares."""
    images, labels = squares(count, seed)
    return np.repeat(images[:, :, None], 8, axis=2), np.repeat(labels[:, None], 8, axis=1)


@pytest.mark.parametrize("augmentation", ["plain", "strong"])
def test_a_victim_learns_volumes_too(augmentation: str) -> None:
    settings = replace(QUICK, steps=40, augmentation=augmentation, readings=1)
    run = train_segmentation_victim(*blocks(12, 0), *blocks(4, 1), settings, classes=2, seed=0)
    assert run.last.dice > 0.7


def test_fewer_images_than_a_batch_are_seen_again() -> None:
    run = train_segmentation_victim(*squares(3, 0), *squares(2, 1), QUICK, classes=2, seed=0)
    assert 0 <= run.last.dice <= 1
