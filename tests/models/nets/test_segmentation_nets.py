from __future__ import annotations

import copy

import numpy as np
import pytest

from medveil.models.errors import ConfigurationError

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402 (needs torch)

from medveil.models.autodiff.admission import admit  # noqa: E402
from medveil.models.export import to_onnx  # noqa: E402
from medveil.models.nets.segmentation import (  # noqa: E402
    ALIGNMENT,
    HALO,
    SEGMENTERS,
    CentralDifferenceConv2d,
    CentralDifferenceConv3d,
    Generator,
    build_segmenter,
    folded,
)

pytestmark = pytest.mark.train


def generator(channels: int = 1, **kind: object) -> Generator:
    """A generator whose batch norms have seen something: fresh ones would hide a wrong fold."""
    torch.manual_seed(0)
    net = Generator(channels, **kind)
    space = (16,) * (3 if kind.get("dimensions") == 3 else 2)
    net.train()
    net(torch.rand(4, channels, *space))
    return net.eval()


@pytest.mark.parametrize(("make", "axes"), [(CentralDifferenceConv2d, 2), (CentralDifferenceConv3d, 3)])
def test_central_difference_is_the_published_formula(make: type, axes: int) -> None:
    torch.manual_seed(1)
    conv = make(3, 5)
    with torch.no_grad():
        conv.theta.fill_(0.7)
    x = torch.rand(2, 3, *(6,) * axes)
    plain = (functional.conv2d if axes == 2 else functional.conv3d)(x, conv.weight, padding=1)
    summed = torch.einsum("oi,ni...->no...", conv.weight.flatten(2).sum(2), x)
    torch.testing.assert_close(conv(x), plain - 0.7 * summed, rtol=1e-4, atol=1e-5)


def test_a_flat_image_gives_a_full_central_difference_nothing_inside() -> None:
    conv = CentralDifferenceConv2d(1, 4)
    with torch.no_grad():
        conv.theta.fill_(1.0)
        answer = conv(torch.full((1, 1, 7, 7), 0.5))
    assert float(answer[:, :, 1:-1, 1:-1].abs().max()) < 1e-6


@pytest.mark.parametrize("dimensions", [2, 3])
def test_folding_changes_nothing_but_the_layers(dimensions: int) -> None:
    net = generator(central_difference=True, dimensions=dimensions)
    x = torch.rand(2, 1, *(8,) * dimensions)
    plain = folded(copy.deepcopy(net))
    assert not any(isinstance(m, CentralDifferenceConv2d | CentralDifferenceConv3d) for m in plain.modules())
    torch.testing.assert_close(plain(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("central", "dimensions"), [(False, 2), (True, 2), (False, 3)])
def test_tiles_with_a_halo_join_without_a_seam(central: bool, dimensions: int) -> None:
    """Along the first axis: the rows of an image, the slices of a volume."""
    net = generator(central_difference=central, dimensions=dimensions)
    side, tile = 3 * HALO + 40, 2 * HALO + 32
    x = torch.rand(1, 1, side, *(side,) if dimensions == 2 else (12, 8))
    with torch.no_grad():
        whole = net(x)
        for start in range(0, side - tile + 1, ALIGNMENT):
            part = net(x[:, :, start : start + tile])
            low = 0 if start == 0 else HALO
            high = tile if start + tile == side else tile - HALO
            torch.testing.assert_close(
                part[:, :, low:high], whole[:, :, start + low : start + high], rtol=0, atol=1e-6
            )


def test_the_halo_is_not_idle() -> None:
    net = generator()
    x = torch.rand(1, 1, 96, 8)
    moved = x.clone()
    moved[..., 48:, :] = 1 - moved[..., 48:, :]
    with torch.no_grad():
        differs = (net(x) != net(moved)).any(dim=3).flatten()
    first = int(differs.nonzero()[0])
    assert 48 - HALO <= first < 48, "a halo much larger than the reach would waste every tile"


@pytest.mark.parametrize(
    ("central", "dimensions"), [(True, 2), pytest.param(False, 3, marks=pytest.mark.slow)]
)
def test_an_exported_generator_is_admitted_and_answers_within_one(central: bool, dimensions: int) -> None:
    net = generator(3, central_difference=central, dimensions=dimensions)
    shape = (3, *(16,) * dimensions)
    graph = admit(to_onnx(folded(copy.deepcopy(net)), shape), role="generator")
    assert graph.input_shape == shape
    assert graph.output_shape == shape
    with torch.no_grad():
        answer = net(100 * torch.randn(2, *shape)).numpy()
    assert np.abs(answer).max() <= 1


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_surrogate_scores_every_pixel(name: str, dimensions: int) -> None:
    net = build_segmenter(name, 2, 4, dimensions)
    space = (8, 12, 16)[:dimensions]
    assert net(torch.rand(2, 2, *space)).shape == (2, 4, *space)


def test_an_unknown_surrogate_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ConfigurationError, match="unet-batch, unet-instance") as refused:
        build_segmenter("unet", 1, 2)
    assert refused.value.code == "architecture"
