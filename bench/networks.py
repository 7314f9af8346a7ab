"""The reference architectures that gradients are measured and tested on, in plain torch, at any width.

They follow the papers' topology, not their training recipes: ResNet (arXiv 1512.03385, with the three-by-three stem
used on small images), VGG (1409.1556), DenseNet (1608.06993), ViT (2010.11929), U-Net (1505.04597, in 2-D and 3-D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

__all__ = ["densenet", "resnet18", "resnet50", "unet", "vgg", "vit"]


class _Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _resnet(
    block: type[_Basic | _Bottleneck],
    depths: Sequence[int],
    width: int,
    channels: int,
    classes: int,
    *,
    large: bool,
) -> nn.Module:
    stem: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    if large:
        stem[0] = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        stem.append(nn.MaxPool2d(3, 2, 1))
    layers, inputs = stem, width
    for stage, depth in enumerate(depths):
        for index in range(depth):
            layers.append(block(inputs, width << stage, 2 if stage and not index else 1))
            inputs = (width << stage) * block.expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18(*, width: int = 64, channels: int = 3, classes: int = 10, large: bool = False) -> nn.Module:
    """ResNet-18; ``large``: with the stem for images of 224 pixels."""
    return _resnet(_Basic, (2, 2, 2, 2), width, channels, classes, large=large)


def resnet50(*, width: int = 64, channels: int = 3, classes: int = 10, large: bool = False) -> nn.Module:
    """ResNet-50; ``large`` as above."""
    return _resnet(_Bottleneck, (3, 4, 6, 3), width, channels, classes, large=large)


def vgg(*, width: int = 64, channels: int = 3, classes: int = 10) -> nn.Module:
    """VGG-11 with a single linear layer."""
    layers: list[nn.Module] = []
    inputs = channels
    for step in (width, 0, 2 * width, 0, 4 * width, 4 * width, 0, 8 * width, 8 * width, 0):
        if step:
            layers += [nn.Conv2d(inputs, step, 3, padding=1), nn.ReLU()]
            inputs = step
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class _DenseLayer(nn.Module):
    """Normalise, rectify, convolve twice, and join the result to what came in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet(
    *, growth: int = 12, depths: Sequence[int] = (6, 6, 6), channels: int = 3, classes: int = 10
) -> nn.Module:
    """DenseNet-BC with halving transitions."""
    inputs = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(channels, inputs, 3, padding=1, bias=False)]
    for index, depth in enumerate(depths):
        if index:
            layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, inputs // 2, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
            inputs //= 2
        for _ in range(depth):
            layers.append(_DenseLayer(inputs, growth))
            inputs += growth
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


class _Encoder(nn.Module):
    """Self-attention and a perceptron, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        parts = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.join(attended.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class _VisionTransformer(nn.Module):
    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.place = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*[_Encoder(width, heads) for _ in range(depth)], nn.LayerNorm(width))
        self.head = nn.Linear(width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(tokens.shape[0], -1, -1), tokens], 1) + self.place
        return self.head(self.blocks(tokens)[:, 0])


def vit(
    *,
    size: int = 32,
    patch: int = 4,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
    channels: int = 3,
    classes: int = 10,
) -> nn.Module:
    """A vision transformer with a class token."""
    return _VisionTransformer(size, patch, width, depth, heads, channels, classes)


class _UNet(nn.Module):
    def __init__(
        self, dimensions: int, width: int, depth: int, channels: int, classes: int, upsample: str
    ) -> None:
        super().__init__()
        conv, pool, up = {
            2: (nn.Conv2d, nn.MaxPool2d, nn.ConvTranspose2d),
            3: (nn.Conv3d, nn.MaxPool3d, nn.ConvTranspose3d),
        }[dimensions]

        def double(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                conv(inputs, outputs, 3, padding=1),
                nn.ReLU(),
                conv(outputs, outputs, 3, padding=1),
                nn.ReLU(),
            )

        def enlarge(inputs: int, outputs: int) -> nn.Module:
            if upsample == "transposed":
                return up(inputs, outputs, 2, stride=2)
            return nn.Sequential(nn.Upsample(scale_factor=2, mode=upsample), conv(inputs, outputs, 1))

        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(double(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        self.pool: Callable[[torch.Tensor], torch.Tensor] = pool(2)
        self.enlarge = nn.ModuleList(enlarge(2 * w, w) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(double(2 * w, w) for w in reversed(widths[:-1]))
        self.head = conv(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            kept.append(x)
        for enlarge, block, skip in zip(self.enlarge, self.up, reversed(kept[:-1]), strict=True):
            x = block(torch.cat([enlarge(x), skip], 1))
        return self.head(x)


def unet(
    *,
    dimensions: int = 2,
    width: int = 16,
    depth: int = 4,
    channels: int = 1,
    classes: int = 2,
    upsample: str = "transposed",
) -> nn.Module:
    """A U-Net; ``upsample``: ``"transposed"``, ``"nearest"``, ``"bilinear"`` or ``"trilinear"``."""
    return _UNet(dimensions, width, depth, channels, classes, upsample)
