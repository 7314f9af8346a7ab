"""What torch exports, by either exporter, against torch's own gradient."""

from __future__ import annotations

import numpy as np
import pytest

from medveil.models.autodiff import build_gradient

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

pytestmark = pytest.mark.train

IMAGE = (3, 8, 8)
VOLUME = (2, 4, 6, 4)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, image):
        return self.function(image)


class Tokens(nn.Module):
    """Patches with a class token, as vision transformers begin."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, 8, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.place = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, image):
        tokens = self.project(image).flatten(2).transpose(1, 2)
        first = self.first.expand(image.shape[0], -1, -1)
        return torch.cat([first, tokens], 1) + self.place


class Attention(nn.Module):
    """Self-attention written out, as timm and MONAI do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        a = (q @ k.transpose(-2, -1) * 4**-0.5).softmax(-1)
        return (a @ v).transpose(1, 2).reshape(b, n, c)


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Windows(nn.Module):
    """Swin's shifted windows: roll, partition, merge."""

    def forward(self, x):
        b, c, h, w = x.shape
        x = torch.roll(x, (-1, -2), (2, 3)).view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
        x = functional.softmax(x.reshape(-1, 16, c), 1)
        return x.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def _resized(**settings):
    return Apply(lambda x: functional.interpolate(x, **settings))


def _padded(mode):
    return Apply(lambda x: functional.pad(x, (1, 2, 2, 0), mode=mode))


CASES = {
    "conv strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), IMAGE),
    "conv dilated": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2), IMAGE),
    "conv same": (lambda: nn.Conv2d(3, 4, 4, padding="same"), IMAGE),
    "conv depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), IMAGE),
    "conv 1-D": (lambda: nn.Conv1d(3, 4, 3, stride=2), (3, 9)),
    "conv 3-D": (lambda: nn.Conv3d(2, 3, 3, stride=2, padding=1), VOLUME),
    "conv transpose": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), IMAGE),
    "conv transpose 3-D": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), VOLUME),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), IMAGE),
    "linear on tokens": (lambda: nn.Linear(8, 5), (3, 8)),
    "bilinear product": (lambda: Apply(lambda x: x @ x.transpose(-1, -2)), IMAGE),
    "einsum": (lambda: Apply(lambda x: torch.einsum("bchw,bdhw->bcd", x, x.sin())), IMAGE),
    "max pool": (lambda: nn.MaxPool2d(2), IMAGE),
    "max pool overlapping": (lambda: nn.MaxPool2d(3, 2, 1), IMAGE),
    "max pool ceil": (lambda: nn.MaxPool2d(3, 3, ceil_mode=True), IMAGE),
    "max pool 3-D": (lambda: nn.MaxPool3d(2), VOLUME),
    "average pool": (lambda: nn.AvgPool2d(2), IMAGE),
    "average pool padded": (lambda: nn.AvgPool2d(3, 2, 1), IMAGE),
    "average pool not counting": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "average pool ceil": (lambda: nn.AvgPool2d(3, 2, ceil_mode=True), IMAGE),
    "average pool 3-D": (lambda: nn.AvgPool3d(2), VOLUME),
    "adaptive average": (lambda: nn.AdaptiveAvgPool2d(2), IMAGE),
    "adaptive average of all": (lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive maximum": (lambda: nn.AdaptiveMaxPool2d(1), IMAGE),
    "batch norm": (lambda: nn.BatchNorm2d(3), IMAGE),
    "instance norm": (lambda: nn.InstanceNorm2d(3), IMAGE),
    "instance norm affine": (lambda: nn.InstanceNorm3d(2, affine=True), VOLUME),
    "group norm": (lambda: nn.GroupNorm(3, 6), (6, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm((8, 8)), IMAGE),
    **{
        kind.__name__: (kind, IMAGE)
        for kind in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Sigmoid, nn.SiLU)
    },
    **{kind.__name__: (kind, IMAGE) for kind in (nn.Hardsigmoid, nn.Hardswish, nn.Tanh, nn.Softplus)},
    **{kind.__name__: (kind, IMAGE) for kind in (nn.Softsign, nn.GELU, nn.Mish, nn.LogSigmoid)},
    "gelu tanh": (lambda: nn.GELU("tanh"), IMAGE),
    "gated": (lambda: nn.GLU(3), IMAGE),
    "softmax": (lambda: nn.Softmax(1), IMAGE),
    "log softmax": (lambda: nn.LogSoftmax(-1), IMAGE),
    "normalize": (lambda: Apply(lambda x: functional.normalize(x, dim=1)), IMAGE),
    "norm": (lambda: Apply(lambda x: torch.linalg.vector_norm(x, dim=(2, 3))), IMAGE),
    "1-norm": (lambda: Apply(lambda x: x.abs().sum((1, 2))), IMAGE),
    "variance": (lambda: Apply(lambda x: x.var((2, 3), unbiased=False) + x.std(1).mean((1, 2))[:, None]), IMAGE),
    "log sum exp": (lambda: Apply(lambda x: x.logsumexp((1, 3))), IMAGE),
    "maximum over axes": (lambda: Apply(lambda x: x.amax((2, 3), keepdim=True) * x), IMAGE),
    "minimum over an axis": (lambda: Apply(lambda x: x.amin(-1)), IMAGE),
    "maximum of two": (lambda: Apply(lambda x: torch.maximum(x, x.flip(3))), IMAGE),
    "clamp": (lambda: Apply(lambda x: x.clamp(-0.5, 0.8)), IMAGE),
    "powers": (lambda: Apply(lambda x: x**2 + x.abs() ** 1.5 + 1 / (2 + x.cos())), IMAGE),
    "where": (lambda: Apply(lambda x: torch.where(x > 0.2, x.exp(), x.sin())), IMAGE),
    "masked fill": (lambda: Apply(lambda x: x.masked_fill(x < 0, 0.3)), IMAGE),
    "cumulative sum": (lambda: Apply(lambda x: x.cumsum(2)), IMAGE),
    "lower triangle": (lambda: Apply(torch.tril), IMAGE),
    "nearest": (lambda: _resized(scale_factor=2, mode="nearest"), IMAGE),
    "nearest to a size": (lambda: _resized(size=(11, 5), mode="nearest"), IMAGE),
    "bilinear": (lambda: _resized(scale_factor=2, mode="bilinear"), IMAGE),
    "bilinear corners": (lambda: _resized(size=(13, 5), mode="bilinear", align_corners=True), IMAGE),
    "bicubic": (lambda: _resized(scale_factor=2, mode="bicubic"), IMAGE),
    "nearest 3-D": (lambda: _resized(scale_factor=2, mode="nearest"), VOLUME),
    "trilinear": (lambda: _resized(scale_factor=2, mode="trilinear"), VOLUME),
    "linear 1-D": (lambda: _resized(scale_factor=2, mode="linear"), (3, 7)),
    **{f"pad {mode}": (lambda mode=mode: _padded(mode), IMAGE) for mode in ("constant", "reflect", "replicate")},
    "pixel shuffle": (lambda: nn.PixelShuffle(2), (8, 3, 3)),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), (2, 4, 4)),
    "flip and roll": (lambda: Apply(lambda x: x.flip(2).roll(3, 3)), IMAGE),
    "chunks": (lambda: Apply(lambda x: torch.cat([part.sin() for part in x.chunk(2, 2)], 1)), IMAGE),
    "stack": (lambda: Apply(lambda x: torch.stack([x, x.cos()], 2)), IMAGE),
    "strided slice": (lambda: Apply(lambda x: x[:, :, 1::2, ::3]), IMAGE),
    "index": (lambda: Apply(lambda x: x[:, [2, 0, 0], 1]), IMAGE),
    "repeat": (lambda: Apply(lambda x: x.repeat(1, 2, 1, 3)), IMAGE),
    "squeeze and excite": (
        lambda: Apply(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))), IMAGE,
    ),
    "class token": (Tokens, IMAGE),
    "attention": (Attention, (5, 8)),
    "multi-head attention": (Multihead, (5, 8)),
    "scaled dot product": (
        lambda: Apply(lambda x: functional.scaled_dot_product_attention(x, x.sin(), x.cos())), (2, 5, 4),
    ),
    "shifted windows": (Windows, IMAGE),
}  # fmt: skip

# The new exporter takes a second per module: these differ most between the two, the rest is for the slow suite.
DYNAMO = {
    "adaptive average",
    "class token",
    "conv same",
    "index",
    "linear 1-D",
    "multi-head attention",
    "normalize",
}
EXPORTS = [
    pytest.param(
        name, exporter, marks=[pytest.mark.slow] if exporter == "dynamo" and name not in DYNAMO else []
    )
    for name in CASES
    for exporter in ("legacy", "dynamo")
]


@pytest.mark.parametrize(("name", "exporter"), EXPORTS)
def test_the_gradient_is_that_of_torch(name, exporter, export, run, distance):
    make, shape = CASES[name]
    torch.manual_seed(5)
    module = make().eval()
    for parameter in (*module.parameters(), *module.buffers()):
        if parameter.dtype == torch.float32:
            parameter.data = torch.rand_like(parameter) + 0.1
    model = export(module, shape, exporter=exporter)
    gradients = {
        dialect: build_gradient(model, loss="inner_product", dialect=dialect)
        for dialect in ("cpu", "portable")
    }
    for count in (1, 3):
        images = torch.randn(count, *shape, requires_grad=True)
        y = module(images)
        target = torch.randn_like(y)
        (want,) = torch.autograd.grad((y * target).sum(), images)
        for gradient in gradients.values():
            got = run(gradient, image=images.detach().numpy(), target=target.numpy())
            np.testing.assert_allclose(got["logits"], y.detach().numpy(), rtol=1e-4, atol=1e-5)
            assert distance(got["gradient"], want.numpy()) < 1e-5
