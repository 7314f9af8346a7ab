from __future__ import annotations

import pytest

from medveil.models.errors import ConfigurationError

torch = pytest.importorskip("torch")
nets = pytest.importorskip("medveil.models.nets")
pytestmark = pytest.mark.train

NAMES = ("resnet", "wide-resnet", "vgg", "densenet", "vit", "mlp")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 64), (1, 33), (1, 128)])
def test_every_net_gives_logits_and_sees_every_pixel(name: str, channels: int, size: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nets.build(name, channels, size, 3).eval()
        images = torch.rand(2, channels, size, size, requires_grad=True)
    logits = net(images)
    assert logits.shape == (2, 3)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    untouched = (gradient.abs().sum((0, 1)) == 0).float().mean()
    # a pixel that no surrogate sees is a pixel that stays unprotected; pooling may drop an odd border
    assert untouched < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_nets_stay_small_at_28_pixels_and_grow_with_the_image(name: str) -> None:
    def count(size: int) -> int:
        return sum(p.numel() for p in nets.build(name, 1, size, 2).parameters())

    assert count(28) < 300_000
    assert count(128) < 12 * count(28)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="resnet, wide-resnet"):
        nets.build("alexnet", 1, 28, 2)
    with pytest.raises(ConfigurationError) as caught:
        nets.build("vgg", 1, 8, 2)
    assert caught.value.code == "size"
