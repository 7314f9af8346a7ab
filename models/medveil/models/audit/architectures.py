"""Small networks that play the attacker, kept apart from the surrogates' families on purpose.

A protection that only holds against the architectures it was made on is worth nothing, so none of the convolutional
designs here is a surrogate (``medveil.models.nets``): depthwise-separable, multi-branch and patchified large-kernel
networks, and beside them an MLP and a vision transformer. They are sized for images of 28 to 128 pixels and train
in seconds on one core.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medveil.models.errors import ConfigurationError

__all__ = ["CONVOLUTIONAL", "NAMES", "build"]

CONVOLUTIONAL = ("mobilenet", "inception", "convnext")
"""Victims without fully connected or attention layers over space."""


def build(name: str, *, channels: int, size: int, classes: int) -> nn.Module:
    """Return a freshly initialised network: ``(N, channels, size, size)`` in [0, 1] to logits ``(N, classes)``.

    The caller seeds torch first: initial weights come from its global generator.

    Raises:
        ConfigurationError: "architecture": there is none of that name.
    """
    try:
        make = _BUILDERS[name]
    except KeyError as exc:
        known = ", ".join(_BUILDERS)
        raise ConfigurationError(
            "architecture", f"No victim is called {name!r}; there are: {known}."
        ) from exc
    return make(channels, size, classes)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class _Pooled(nn.Module):
    """Features, global average, linear head."""

    def __init__(self, features: nn.Module, width: int, classes: int, norm: bool = False) -> None:
        super().__init__()
        self.features = features
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.features(images).mean(dim=(2, 3))
        return torch.as_tensor(self.head(self.norm(pooled)))


def _mobilenet(channels: int, size: int, classes: int) -> nn.Module:
    """Depthwise-separable convolutions (Howard et al. 2017, arXiv 1704.04861), at a tenth of the width."""

    def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(_conv(inputs, inputs, 3, stride, inputs), _conv(inputs, outputs, 1))

    width = 16
    layers = [_conv(channels, width, stride=2 if size > 64 else 1), separable(width, 2 * width, 1)]
    layers += [separable(2 * width, 2 * width, 2), separable(2 * width, 4 * width, 1)]
    layers += [separable(4 * width, 4 * width, 2), separable(4 * width, 4 * width, 1)]
    return _Pooled(nn.Sequential(*layers), 4 * width, classes)


class _InceptionBlock(nn.Module):
    """Four parallel branches (Szegedy et al. 2014, arXiv 1409.4842), concatenated."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _conv(inputs, width, 1),
                nn.Sequential(_conv(inputs, width, 1), _conv(width, width, 3)),
                nn.Sequential(_conv(inputs, width, 1), _conv(width, width, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(inputs, width, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _inception(channels: int, size: int, classes: int) -> nn.Module:
    width = 8
    layers: list[nn.Module] = [_conv(channels, 2 * width, stride=2 if size > 64 else 1)]
    layers += [nn.MaxPool2d(2), _InceptionBlock(2 * width, width), nn.MaxPool2d(2)]
    layers += [_InceptionBlock(4 * width, 2 * width), _InceptionBlock(8 * width, 2 * width)]
    return _Pooled(nn.Sequential(*layers), 8 * width, classes)


class _ConvNextBlock(nn.Module):
    """Depthwise 5x5, inverted bottleneck, no batch norm (Liu et al. 2022, arXiv 2201.03545)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 5, 1, 2, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 2 * width, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.body(x))


def _convnext(channels: int, size: int, classes: int) -> nn.Module:
    width = 24
    patch = 4 if size > 64 else 2
    features = nn.Sequential(
        nn.Conv2d(channels, width, patch, patch),
        nn.GroupNorm(1, width),
        _ConvNextBlock(width),
        _ConvNextBlock(width),
        nn.Conv2d(width, 2 * width, 2, 2),
        _ConvNextBlock(2 * width),
        _ConvNextBlock(2 * width),
    )
    return _Pooled(features, 2 * width, classes, norm=True)


def _mlp(channels: int, size: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


class _Vit(nn.Module):
    """Patches as tokens (Dosovitskiy et al. 2020, arXiv 2010.11929): width 48, 3 layers, 4 heads, mean pooling."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        width, patch = 48, max(4, size // 8)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return torch.as_tensor(self.head(self.norm(self.encoder(tokens)).mean(dim=1)))


_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mobilenet": _mobilenet,
    "inception": _inception,
    "convnext": _convnext,
    "mlp": _mlp,
    "vit": _Vit,
}
NAMES = tuple(_BUILDERS)
"""All victims, in the order of the tables."""
