"""Victims: they learn what there is to learn, and the same seed gives the same run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from medveil.models.audit import architectures  # noqa: E402
from medveil.models.audit.victims import VictimSettings, train_victim  # noqa: E402
from medveil.models.errors import ConfigurationError  # noqa: E402

pytestmark = pytest.mark.train


def _striped(rng: np.random.Generator, count: int, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal or vertical stripes under noise, 28 pixels: the class is the direction."""
    labels = rng.integers(0, 2, count)
    wave = np.sin(np.arange(28) * 1.5)
    stripes = np.where(labels[:, None, None] == 0, wave[None, :, None], wave[None, None, :])
    images = 0.5 + 0.2 * stripes[:, None] + 0.1 * rng.normal(size=(count, channels, 28, 28))
    return np.clip(images, 0, 1).astype(np.float32), labels.astype(np.int64)


@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_victim_learns_an_easy_task(name: str, rng: np.random.Generator) -> None:
    images, labels = _striped(rng, 256)
    settings = VictimSettings(architecture=name, epochs=15, batch_size=16)
    run = train_victim(images, labels, *_striped(rng, 128), settings, classes=2, seed=0)
    assert run.last.balanced_accuracy > 0.9


@pytest.mark.parametrize("name", architectures.NAMES)
@pytest.mark.parametrize(("channels", "size"), [(3, 28), (1, 64), (1, 128)])
def test_every_victim_takes_every_contract(name: str, channels: int, size: int) -> None:
    net = architectures.build(name, channels=channels, size=size, classes=5).eval()
    assert net(torch.zeros(2, channels, size, size)).shape == (2, 5)


def test_the_same_seed_gives_the_same_run_and_leaves_the_global_generator_alone(
    rng: np.random.Generator,
) -> None:
    train, test = _striped(rng, 64), _striped(rng, 32)
    settings = VictimSettings(architecture="mobilenet", epochs=2)
    before = torch.random.get_rng_state()
    runs = [train_victim(*train, *test, settings, classes=2, seed=3).history for _ in range(2)]
    assert runs[0] == runs[1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_last_images_of_an_uneven_set_are_seen(rng: np.random.Generator) -> None:
    """129 images in batches of 64: a loader that drops the rest never shows one of them."""
    images, labels = _striped(rng, 129)
    run = train_victim(
        images, labels, *_striped(rng, 32), VictimSettings(architecture="mlp", epochs=1), classes=2, seed=0
    )
    assert len(run.history) == 1


def test_an_adversarially_trained_victim_ignores_what_an_ordinary_one_learns(
    rng: np.random.Generator,
) -> None:
    """A shortcut below the radius: ordinary training finds it, adversarial training cannot."""
    labels = rng.integers(0, 2, 256).astype(np.int64)
    images = np.full((256, 1, 28, 28), 0.5, np.float32)
    images[:, 0, ::2] += np.where(labels == 1, 0.02, -0.02)[:, None, None].astype(np.float32)
    ordinary = VictimSettings(architecture="mlp", epochs=15, batch_size=16, shift=0)
    hardened = replace(ordinary, adversarial_radius=0.05)
    learnt = train_victim(images, labels, images, labels, ordinary, classes=2, seed=0)
    unlearnt = train_victim(images, labels, images, labels, hardened, classes=2, seed=0)
    assert learnt.last.accuracy > 0.95
    assert unlearnt.last.accuracy < 0.8


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="resnet-9000"):
        architectures.build("resnet-9000", channels=1, size=28, classes=2)
