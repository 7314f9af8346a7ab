"""Small segmentation nets that play the attacker; none is a surrogate (``medveil.models.nets.segmentation``).

The surrogates are plain U-Nets of width 8 with pooling and nearest enlarging. Here: a wider, deeper U-Net with
learned enlarging; nnU-Net's strided, instance-normalised one; an attention U-Net; a SegFormer-like hierarchy of
transformers. Sides must be multiples of 8; for the transformers, 16 or more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from medveil.models.errors import ConfigurationError

__all__ = ["NAMES", "build"]

_SLOPE = 0.01  # of LeakyReLU, as nnU-Net


def build(name: str, *, channels: int, classes: int, dimensions: int = 2) -> nn.Module:
    """Return a freshly initialised net: ``(N, channels, ...)`` in [0, 1] to logits ``(N, classes, ...)``.

    The caller seeds torch first: initial weights come from its global generator.

    Args:
        name: one of `NAMES`.
        channels: of the image.
        classes: K, background included.
        dimensions: 2 for images, 3 for volumes.

    Raises:
        ConfigurationError: "architecture": there is none of that name.
    """
    if name not in NAMES:
        raise ConfigurationError(
            "architecture", f"No segmentation victim is called {name!r}; there are: {', '.join(NAMES)}."
        )
    return _BUILDERS[name](channels, classes, _VOLUME if dimensions == 3 else _PLANE)


@dataclass(frozen=True)
class _Layers:
    """The layers of one dimensionality."""

    convolution: Callable[..., nn.Module]
    enlarging: Callable[..., nn.Module]
    batch_norm: Callable[..., nn.Module]
    instance_norm: Callable[..., nn.Module]
    halved: Callable[[Tensor, int], Tensor]
    between: str  # how values are interpolated


_PLANE = _Layers(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, F.max_pool2d, "bilinear")
_VOLUME = _Layers(nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.InstanceNorm3d, F.max_pool3d, "trilinear")


def _conv(
    inputs: int, outputs: int, *, stride: int = 1, instance: bool = False, layers: _Layers = _PLANE
) -> nn.Sequential:
    after = (
        (layers.instance_norm(outputs, affine=True), nn.LeakyReLU(_SLOPE))
        if instance
        else (layers.batch_norm(outputs), nn.ReLU())
    )
    return nn.Sequential(layers.convolution(inputs, outputs, 3, stride, 1, bias=False), *after)


class _UNet(nn.Module):
    """A U-Net (arXiv 1505.04597) with learned enlarging; pooling, or strided convolutions with ``instance``."""

    def __init__(
        self, channels: int, classes: int, layers: _Layers, *, instance: bool, attention: bool
    ) -> None:
        super().__init__()
        widths = (12, 24, 36, 48)
        self.downs = nn.ModuleList()
        inputs = channels
        for level, width in enumerate(widths):
            stride = 2 if instance and level else 1
            self.downs.append(
                nn.Sequential(
                    _conv(inputs, width, stride=stride, instance=instance, layers=layers),
                    _conv(width, width, instance=instance, layers=layers),
                )
            )
            inputs = width
        self.ups, self.joins, self.gates = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.ups.append(layers.enlarging(below, width, 2, 2))
            self.joins.append(_conv(2 * width, width, instance=instance, layers=layers))
            self.gates.append(_Gate(width, layers) if attention else nn.Identity())
        self.head = layers.convolution(widths[0], classes, 1)
        self._halved, self._pooled, self._attention = layers.halved, not instance, attention

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, down in enumerate(self.downs):
            x = down(self._halved(x, 2) if level and self._pooled else x)
            skips.append(x)
        for up, join, gate, skip in zip(self.ups, self.joins, self.gates, skips[-2::-1], strict=True):
            x = up(x)
            x = join(torch.cat([x, gate(skip, x) if self._attention else skip], 1))
        return torch.as_tensor(self.head(x))


class _Gate(nn.Module):
    """Attention gate on a skip connection (Oktay et al., arXiv 1804.03999), at equal resolution."""

    def __init__(self, width: int, layers: _Layers) -> None:
        super().__init__()
        self.skip = layers.convolution(width, width // 2, 1)
        self.signal = layers.convolution(width, width // 2, 1)
        self.score = layers.convolution(width // 2, 1, 1)

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        score = self.score(torch.relu(self.skip(skip) + self.signal(signal)))
        return skip * torch.as_tensor(torch.sigmoid(score))


class _Attention(nn.Module):
    """SegFormer's block (arXiv 2105.15203): attention over reduced keys, and a feed-forward with a depthwise conv."""

    def __init__(self, width: int, reduction: int, layers: _Layers, heads: int = 2) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.reduced = (
            layers.convolution(width, width, reduction, reduction) if reduction > 1 else nn.Identity()
        )
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.middle = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.mix = layers.convolution(2 * width, 2 * width, 3, 1, 1, groups=2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        sides = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        asked = self.before(tokens)
        fewer = self.reduced(asked.transpose(1, 2).unflatten(2, sides)).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(asked, fewer, fewer, need_weights=False)[0]
        wide = self.widen(self.middle(tokens)).transpose(1, 2).unflatten(2, sides)
        tokens = tokens + self.narrow(F.gelu(self.mix(wide)).flatten(2).transpose(1, 2))
        return torch.as_tensor(tokens.transpose(1, 2).unflatten(2, sides))


class _SegFormer(nn.Module):
    """Three overlapping patch stages at 1/2, 1/4 and 1/8, and an all-MLP decoder (arXiv 2105.15203)."""

    def __init__(self, channels: int, classes: int, layers: _Layers) -> None:
        super().__init__()
        widths, reductions = (16, 32, 64), (8, 4, 1)
        self.patches, self.blocks, self.lateral = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inputs = channels
        for level, (width, reduction) in enumerate(zip(widths, reductions, strict=True)):
            self.patches.append(layers.convolution(inputs, width, 3 if level else 7, 2, 1 if level else 3))
            self.blocks.append(_Attention(width, reduction, layers))
            self.lateral.append(layers.convolution(width, 32, 1))
            inputs = width
        self.fuse = _conv(3 * 32, 32, layers=layers)
        self.head = layers.convolution(32, classes, 1)
        self._between = layers.between

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        maps: list[Tensor] = []
        for patch, block, lateral in zip(self.patches, self.blocks, self.lateral, strict=True):
            x = block(patch(x))
            found = lateral(x)
            like = maps[0].shape[2:] if maps else found.shape[2:]
            maps.append(F.interpolate(found, size=like, mode=self._between))
        logits = self.head(self.fuse(torch.cat(maps, 1)))
        return F.interpolate(logits, size=size, mode=self._between)


def _unet(*, instance: bool = False, attention: bool = False) -> Callable[[int, int, _Layers], nn.Module]:
    return lambda channels, classes, layers: _UNet(
        channels, classes, layers, instance=instance, attention=attention
    )


_BUILDERS: dict[str, Callable[[int, int, _Layers], nn.Module]] = {
    "unet-bn": _unet(),
    "unet-in": _unet(instance=True),
    "attention-unet": _unet(attention=True),
    "segformer": _SegFormer,
}
NAMES = tuple(_BUILDERS)
"""All segmentation victims, in the order of the tables."""
