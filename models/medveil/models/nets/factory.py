"""One factory for all surrogates; every net maps ``(N, channels, size, size)`` in [0, 1] to logits ``(N, classes)``.

All work at about 28 pixels: larger images are brought there by the stem's stride, and widths grow with the square
root of that stride, so that a larger image gets a larger net without the cost of its area.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from medveil.models.errors import ConfigurationError

__all__ = ["ARCHITECTURES", "build"]

# 28 pixels is the size of the sets (MedMNIST) that these widths were chosen on.
_WORKING_SIZE = 28
_SMALLEST_SIZE = 16


def build(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """Return a new net with weights from torch's global generator (fork and seed it around this call).

    Args:
        name: one of `ARCHITECTURES`.
        channels: 1 or 3.
        size: rows and columns of the image.
        classes: number of logits.

    Raises:
        ConfigurationError: "architecture": no such net; "size": the image is too small for it.
    """
    make = ARCHITECTURES.get(name)
    if make is None:
        raise ConfigurationError(
            "architecture", f"There is no architecture {name!r}; choose from {', '.join(ARCHITECTURES)}."
        )
    if size < _SMALLEST_SIZE:
        raise ConfigurationError("size", f"Surrogates need images of at least {_SMALLEST_SIZE} pixels.")
    return make(channels, size, classes)


def _stride(size: int) -> int:
    """Return the stem's stride: the largest power of two that leaves at least the working size."""
    return int(2 ** max(0, math.floor(math.log2(size / _WORKING_SIZE))))


def _width(base: int, size: int) -> int:
    return round(base * math.sqrt(_stride(size)))


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _stem(channels: int, width: int, size: int) -> nn.Sequential:
    stride = _stride(size)
    return _conv(channels, width, max(3, 2 * stride - 1), stride)


class _GlobalMean(nn.Module):
    """``(N, C, H, W)`` to ``(N, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class _Residual(nn.Module):
    """Basic block of ResNet (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, 3, stride),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(base: int) -> Callable[[int, int, int], nn.Module]:
    def make(channels: int, size: int, classes: int) -> nn.Module:
        w = _width(base, size)
        return nn.Sequential(
            _stem(channels, w, size),
            _Residual(w, w, 1),
            _Residual(w, 2 * w, 2),
            _Residual(2 * w, 4 * w, 2),
            _GlobalMean(),
            nn.Linear(4 * w, classes),
        )

    return make


def _vgg(channels: int, size: int, classes: int) -> nn.Module:
    """Plain convolutions and max pooling (arXiv 1409.1556), with batch norm."""
    w = _width(12, size)
    return nn.Sequential(
        _stem(channels, w, size),
        _conv(w, w),
        nn.MaxPool2d(2),
        _conv(w, 2 * w),
        _conv(2 * w, 2 * w),
        nn.MaxPool2d(2),
        _conv(2 * w, 4 * w),
        _GlobalMean(),
        nn.Linear(4 * w, classes),
    )


class _DenseLayer(nn.Module):
    """Append ``growth`` channels to what is there (DenseNet, arXiv 1608.06993)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, growth, 3, 1, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def _densenet(channels: int, size: int, classes: int) -> nn.Module:
    growth, stages, layers = _width(8, size), 3, 3
    width = 2 * growth
    modules: list[nn.Module] = [_stem(channels, width, size)]
    for stage in range(stages):
        for _ in range(layers):
            modules.append(_DenseLayer(width, growth))
            width += growth
        modules += [nn.BatchNorm2d(width), nn.ReLU()]
        if stage < stages - 1:
            modules += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*modules, _GlobalMean(), nn.Linear(width, classes))


def _mlp(channels: int, size: int, classes: int) -> nn.Module:
    """Two hidden layers; images above the working size are averaged down to it first."""
    stride = _stride(size)
    side = size // stride
    return nn.Sequential(
        nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
        nn.Flatten(),
        nn.Linear(channels * side * side, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


class _EncoderBlock(nn.Module):
    """Pre-norm transformer block, spelled out: torch's fused one has a second code path without gradients."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries = nn.Linear(width, width)
        self.keys = nn.Linear(width, width)
        self.values = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(N, T, width)`` to tokens."""
        y = self.before_attention(x)
        q, k, v = (self._split(layer(y)) for layer in (self.queries, self.keys, self.values))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        x = x + torch.as_tensor(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return x + torch.as_tensor(self.mlp(x))

    def _split(self, tokens: Tensor) -> Tensor:
        """``(N, T, width)`` to ``(N, heads, T, width / heads)``."""
        return tokens.view(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


class _VisionTransformer(nn.Module):
    """Patches, position embedding, encoder, mean over tokens (ViT, arXiv 2010.11929)."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        patch = 4 * _stride(size)
        tokens = math.ceil(size / patch)
        # Padded to whole patches: a border that no patch reads would be a border without gradient.
        missing = tokens * patch - size
        self.pad = nn.ZeroPad2d((0, missing, 0, missing)) if missing else nn.Identity()
        width, heads, depth = 12 * _width(4, size), 4, 3
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, tokens * tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(_EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(self.pad(x)).flatten(2).transpose(1, 2) + self.position
        return torch.as_tensor(self.head(self.norm(self.blocks(tokens)).mean(1)))


ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "resnet": _resnet(10),
    "wide-resnet": _resnet(20),
    "vgg": _vgg,
    "densenet": _densenet,
    "vit": _VisionTransformer,
    "mlp": _mlp,
}
"""Name to ``(channels, size, classes) -> net``."""
