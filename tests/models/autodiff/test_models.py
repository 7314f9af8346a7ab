"""Whole networks: gradients against torch, and nothing that depends on the batch an image is in."""

from __future__ import annotations

import numpy as np
import pytest

from medveil.models.autodiff import build_gradient

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

# name: (factory, its settings, shape of an image, loss)
NETWORKS = {
    "resnet18": ("resnet18", {"width": 8}, (3, 16, 16), "cross_entropy"),
    "resnet18 large": ("resnet18", {"width": 8, "channels": 1, "large": True}, (1, 64, 64), "cross_entropy"),
    "resnet50": ("resnet50", {"width": 4}, (3, 16, 16), "cross_entropy"),
    "vgg": ("vgg", {"width": 8}, (3, 16, 16), "cross_entropy"),
    "densenet": ("densenet", {"growth": 4, "depths": (3, 3)}, (3, 16, 16), "cross_entropy"),
    "vit": ("vit", {"size": 16, "width": 24, "depth": 2}, (3, 16, 16), "cross_entropy"),
    "unet": ("unet", {"width": 4, "depth": 3, "classes": 3}, (1, 32, 32), "cross_entropy_dice"),
    "unet bilinear": (
        "unet", {"width": 4, "depth": 2, "upsample": "bilinear", "classes": 1}, (1, 16, 24), "cross_entropy_dice"),
    "unet 3-D": (
        "unet", {"dimensions": 3, "width": 4, "depth": 2}, (1, 8, 16, 12), "cross_entropy_dice"),
    "unet 3-D trilinear": (
        "unet", {"dimensions": 3, "width": 4, "depth": 2, "upsample": "trilinear"}, (1, 8, 8, 12), "cross_entropy"),
}  # fmt: skip


@pytest.fixture(scope="module")
def built(networks, export):
    """Each network, exported once: (torch module, ONNX model)."""
    cache = {}

    def get(name, exporter="dynamo"):
        if (name, exporter) not in cache:
            factory, settings, shape, _ = NETWORKS[name]
            torch.manual_seed(3)
            module = getattr(networks, factory)(**settings).eval()
            for part in module.modules():
                if isinstance(part, torch.nn.BatchNorm2d):  # as if it had seen data
                    part.running_mean.normal_(0, 0.1)
                    part.running_var.uniform_(0.8, 1.2)
            cache[name, exporter] = module, export(module, shape, exporter=exporter)
        return cache[name, exporter]

    return get


def torch_losses(name, logits, target):
    """The losses of `medveil.models.autodiff.losses`, written with torch's own pieces."""
    if target.shape[1] == 1:
        p = torch.sigmoid(logits)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    else:
        p = torch.softmax(logits, 1)
        entropy = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    entropy = entropy.flatten(1).mean(1) if logits.ndim > 2 else entropy
    if name == "cross_entropy":
        return entropy
    space = tuple(range(2, logits.ndim))
    dice = (2 * (p * target).sum(space) + 1e-5) / ((p + target).sum(space) + 1e-5)
    return entropy + 1 - dice.mean(1)


def draw(shape, logits_shape, count, seed=11):
    """Images with a flat background (ties in every pool) and targets that are distributions."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 1, (count, *shape)).astype(np.float32)
    images[..., : shape[-1] // 3] = 0
    target = rng.uniform(0, 1, (count, *logits_shape)).astype(np.float32)
    return images, target / target.sum(1, keepdims=True) if logits_shape[0] > 1 else target


@pytest.mark.parametrize("dialect", ["cpu", "portable"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_is_that_of_torch_in_double_precision(name, dialect, built, run, distance):
    _, _, shape, loss = NETWORKS[name]
    module, model = built(name)
    gradient = build_gradient(model, loss=loss, dialect=dialect)
    logits_shape = [d.dim_value for d in gradient.graph.input[1].type.tensor_type.shape.dim[1:]]
    double = module.double()
    for count in (1, 4):
        images, target = draw(shape, logits_shape, count)
        x = torch.tensor(images, dtype=torch.float64, requires_grad=True)
        losses = torch_losses(loss, double(x), torch.tensor(target, dtype=torch.float64))
        (want,) = torch.autograd.grad(losses.sum(), x)
        got = run(gradient, image=images, target=target)
        np.testing.assert_allclose(got["loss"], losses.detach().numpy(), rtol=1e-5)
        assert distance(got["gradient"], want.numpy()) < 1e-3
        agree = np.sign(got["gradient"]) == np.sign(want.numpy())
        assert agree[np.abs(want.numpy()) > 1e-6 * np.abs(want.numpy()).max()].mean() > 0.9999
    module.float()


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("name", ["resnet18", "vit", "unet bilinear"])
def test_the_legacy_exporter_gives_the_same_gradient(name, opset, built, export, run, distance):
    _, _, shape, loss = NETWORKS[name]
    module, model = built(name)
    legacy = export(module, shape, exporter="legacy", opset=14 if name == "vit" and opset == 13 else opset)
    new, old = (build_gradient(m, loss=loss) for m in (model, legacy))
    logits_shape = [d.dim_value for d in new.graph.input[1].type.tensor_type.shape.dim[1:]]
    images, target = draw(shape, logits_shape, 3)
    want, got = (run(m, image=images, target=target)["gradient"] for m in (new, old))
    assert distance(got, want) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_building_twice_gives_the_same_bytes(name, built):
    _, model = built(name)
    graphs = [build_gradient(model, loss=NETWORKS[name][3]) for _ in range(2)]
    first, second = (graph.SerializeToString(deterministic=True) for graph in graphs)
    assert first == second
    assert len(first) < len(model.SerializeToString()) + 200_000  # the weights are in it once
