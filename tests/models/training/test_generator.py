from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from medveil.agent.engine import OnnxGenerator, Resources  # noqa: E402 (after importorskip)
from medveil.models.autodiff.admission import admit  # noqa: E402
from medveil.models.errors import ConfigurationError, InputError  # noqa: E402
from medveil.models.methods import Batch, SalmSettings  # noqa: E402
from medveil.models.methods.generated import from_perturbation  # noqa: E402
from medveil.models.methods.targets import one_hot  # noqa: E402
from medveil.models.nets.classifier import logits  # noqa: E402
from medveil.models.nets.generator import NoiseGenerator  # noqa: E402
from medveil.models.training.generator import (  # noqa: E402
    GeneratorSettings,
    generate,
    generator_to_onnx,
    train_generator,
)

NOISE = SalmSettings(mask_ratio=0.3, epsilon=0.1)


@pytest.fixture(scope="module")
def surrogate() -> Any:
    """A net that compares the brightness of the image's halves, which is the class of the `examples`."""
    net = torch.nn.Sequential(torch.nn.AvgPool2d((8, 16)), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[40.0, -40.0], [-40.0, 40.0]]))
        net[2].bias.zero_()
    return net


@pytest.fixture(scope="module")
def generator() -> Any:
    """Random weights, and batch norms that have seen something."""
    torch.manual_seed(3)
    net = NoiseGenerator(1, 2, width=4)
    with torch.no_grad():
        net(torch.rand(8, 1, 16, 16), torch.eye(2).repeat(4, 1))
    return net.eval()


def batch_of(data: Any) -> Batch:
    keys = tuple(hashlib.sha256(image.tobytes()).digest() for image in data.images)
    return Batch(data.images, data.labels, keys)


def aims_of(data: Any) -> Any:
    return one_hot(1 - data.labels, 2)


def released_loss(net: Any, data: Any, surrogate: Any) -> float:
    """Mean loss towards the aims after the site has bounded what the generator wants."""
    delta = from_perturbation(batch_of(data), generate(net, data.images, aims_of(data)), NOISE)
    z = torch.from_numpy(logits(surrogate, data.images + delta))
    return float(torch.nn.functional.cross_entropy(z, torch.from_numpy(1 - data.labels)))


def test_it_learns_to_reach_its_target_on_images_it_never_saw(examples: Any, surrogate: Any) -> None:
    public, private = examples(64, seed=1), examples(32, seed=2)
    settings = GeneratorSettings(epochs=8, batch_size=16, width=4)
    losses: list[float] = []
    net = train_generator(
        [surrogate], public, NOISE, settings, seed=0, on_epoch=lambda _, loss: losses.append(loss)
    )
    untrained = float(
        torch.nn.functional.cross_entropy(
            torch.from_numpy(logits(surrogate, private.images)), torch.from_numpy(1 - private.labels)
        )
    )
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    assert released_loss(net, private, surrogate) < 0.8 * untrained


def test_the_same_seed_gives_the_same_generator(examples: Any, surrogate: Any) -> None:
    data = examples(32)
    settings = GeneratorSettings(epochs=1, batch_size=16, width=4)

    def weights(seed: int) -> bytes:
        net = train_generator([surrogate], data, NOISE, settings, seed=seed)
        return b"".join(value.numpy().tobytes() for value in net.state_dict().values())

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


def test_imitation_draws_mask_and_signs_to_the_teacher(examples: Any, surrogate: Any) -> None:
    data = examples(64)
    teacher = np.zeros_like(data.images)
    teacher[:, :, 3:8, 2:14] = -0.1
    settings = GeneratorSettings(epochs=8, batch_size=16, width=4, imitation=20.0)
    net = train_generator([surrogate], data, NOISE, settings, seed=0, teacher=teacher)
    wanted = generate(net, data.images, aims_of(data))
    delta = from_perturbation(batch_of(data), wanted, NOISE)
    inside = np.zeros((16, 16), bool)
    inside[3:8, 2:14] = True
    assert (delta[:, 0, inside] != 0).mean() > 2 * (delta[:, 0, ~inside] != 0).mean()
    assert (wanted[:, 0, inside] < 0).mean() > 0.8


def test_imitation_without_a_teacher_is_refused(examples: Any, surrogate: Any) -> None:
    with pytest.raises(ConfigurationError, match="teacher-missing"):
        train_generator([surrogate], examples(16), NOISE, GeneratorSettings(imitation=1.0), seed=0)


def test_a_surrogate_without_an_answer_ends_the_training(examples: Any) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean((1, 2, 3))[:, None].repeat(1, 2) * float("nan")

    with pytest.raises(InputError, match="degenerate-generator"):
        train_generator([Broken()], examples(16), NOISE, GeneratorSettings(epochs=1), seed=0)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 1}, {"rate": 0.0}, {"imitation": -1.0}])
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="setting"):
        GeneratorSettings(**change)


@pytest.mark.parametrize("side", [16, 19])
def test_outputs_keep_their_ranges_and_depend_on_the_target(generator: Any, side: int) -> None:
    images = torch.rand(4, 1, side, side)
    targets = torch.eye(2)[torch.tensor([0, 1, 0, 1])]
    with torch.no_grad():
        pattern, score = generator(images, targets)
        other, _ = generator(images, targets.flip(0))
    assert pattern.shape == images.shape
    assert score.shape == (4, 1, side, side)
    assert pattern.abs().max() <= 1
    assert score.min() >= 0
    assert not torch.equal(pattern, other)


def test_the_site_admits_the_export_and_answers_as_torch_does(
    generator: Any, rng: np.random.Generator
) -> None:
    side = 19  # odd: pooling loses a row
    graph = admit(generator_to_onnx(generator, (1, side, side), 2), role="generator")
    assert (graph.input_shape, graph.target_shape) == ((1, side, side), (2,))
    site = OnnxGenerator(graph, Resources("cpu", 1, 1 << 28))
    images = rng.random((5, 1, side, side), np.float32)
    targets = one_hot(np.arange(5) % 2, 2)
    expected = generate(generator, images, targets)
    assert site.perturbation(images, targets) == pytest.approx(expected, abs=1e-5)
