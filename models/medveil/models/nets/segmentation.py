"""Segmentation nets: the surrogate U-Nets, and the generators of UMed and VoxShield; in two or three dimensions.

All take sides that are multiples of `ALIGNMENT`. The generators hold no norm that looks at the whole image
(batch norm only), so their answer at a pixel depends on its surroundings within `HALO` pixels, and tiles join
without a seam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from medveil.models.errors import ConfigurationError

__all__ = ["ALIGNMENT", "HALO", "SEGMENTERS", "Dimensions", "Generator", "UNet", "build_segmenter", "folded"]

Dimensions = Literal[2, 3]
Norm = Literal["batch", "instance"]

ALIGNMENT = 4
"""Two poolings by two."""
HALO = 24
"""Reach of a generator's answer in pixels: its convolutions add up to 2 + 4 + 8 + 4 + 2, and pooling to 3."""

# Width at full resolution: what trains in a minute on one core at 64 pixels, and takes tasks of DSC 75 to 90.
_SURROGATE_WIDTH = 8
_GENERATOR_WIDTH = 8
# Zitong Yu et al., CVPR 2020 (arXiv 2003.04092) recommend 0.7; UMed's re-implementation begins at 0.5 and learns it.
_THETA = 0.5
_SLOPE = 0.01  # of LeakyReLU, as nnU-Net beside its instance norm


class CentralDifferenceConv2d(nn.Conv2d):
    """Central-difference convolution (arXiv 2003.04092), as one ordinary convolution with another centre tap.

    out = conv_w(x) - theta * (sum of w over its support) * x
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, 1, 1, bias=False)
        self.theta = nn.Parameter(torch.tensor(_THETA))

    def kernel(self) -> Tensor:
        """Return the equivalent ordinary kernel."""
        centre = torch.zeros_like(self.weight)
        centre[:, :, 1, 1] = 1
        return self.weight - self.theta * self.weight.sum((2, 3), keepdim=True) * centre

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), None, self.stride, self.padding)


class CentralDifferenceConv3d(nn.Conv3d):
    """The same over a volume."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, 1, 1, bias=False)
        self.theta = nn.Parameter(torch.tensor(_THETA))

    def kernel(self) -> Tensor:
        """Return the equivalent ordinary kernel."""
        centre = torch.zeros_like(self.weight)
        centre[:, :, 1, 1, 1] = 1
        return self.weight - self.theta * self.weight.sum((2, 3, 4), keepdim=True) * centre

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.kernel(), None, self.stride, self.padding)


class _Kit:
    """The layers of one dimensionality and norm."""

    def __init__(self, dimensions: Dimensions, norm: Norm) -> None:
        self.dimensions = dimensions
        self.norm = norm

    def conv(self, inputs: int, outputs: int, kernel: int = 3, *, bias: bool = False) -> nn.Module:
        make = nn.Conv2d if self.dimensions == 2 else nn.Conv3d
        return make(inputs, outputs, kernel, 1, kernel // 2, bias=bias)

    def central(self, inputs: int, outputs: int) -> nn.Module:
        make = CentralDifferenceConv2d if self.dimensions == 2 else CentralDifferenceConv3d
        return make(inputs, outputs)

    def after(self, width: int) -> list[nn.Module]:
        """Return norm and activation."""
        if self.norm == "instance":
            instance = nn.InstanceNorm2d if self.dimensions == 2 else nn.InstanceNorm3d
            return [instance(width, affine=True), nn.LeakyReLU(_SLOPE)]
        batch = nn.BatchNorm2d if self.dimensions == 2 else nn.BatchNorm3d
        return [batch(width), nn.ReLU()]

    def block(self, inputs: int, outputs: int, *, central: bool = False) -> nn.Sequential:
        conv = self.central if central else self.conv
        return nn.Sequential(
            conv(inputs, outputs), *self.after(outputs), conv(outputs, outputs), *self.after(outputs)
        )

    def halved(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if self.dimensions == 2 else F.max_pool3d(x, 2)


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., arXiv 1505.04597) of three resolutions.

    Args:
        channels: of the image.
        outputs: channels of the answer.
        width: channels at full resolution.
        dimensions: 2 or 3.
        norm: "batch" or "instance" (nnU-Net's).
        central_difference: encoder of central-difference convolutions.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int = _SURROGATE_WIDTH,
        dimensions: Dimensions = 2,
        norm: Norm = "batch",
        central_difference: bool = False,
    ) -> None:
        super().__init__()
        self._kit = kit = _Kit(dimensions, norm)
        self.down1 = kit.block(channels, width, central=central_difference)
        self.down2 = kit.block(width, 2 * width, central=central_difference)
        self.bottom = kit.block(2 * width, 4 * width, central=central_difference)
        self.up2 = kit.block(6 * width, 2 * width)
        self.up1 = kit.block(3 * width, width)
        self.head = kit.conv(width, outputs, 1, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        """``(N, C, ...)`` in [0, 1] to ``(N, outputs, ...)``."""
        fine = self.down1(image)
        middle = self.down2(self._kit.halved(fine))
        coarse = self.bottom(self._kit.halved(middle))
        middle = self.up2(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], 1))
        fine = self.up1(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], 1))
        return torch.as_tensor(self.head(fine))


class Generator(nn.Module):
    """A perturbator: image in, what to change as a share of epsilon out, in [-1, 1].

    Args:
        channels: of the image.
        dimensions: 2 or 3.
        central_difference: UMed's contour perturbator has such an encoder; its texture perturbator doesn't.
        width: channels at full resolution.
    """

    def __init__(
        self,
        channels: int,
        *,
        dimensions: Dimensions = 2,
        central_difference: bool = False,
        width: int = _GENERATOR_WIDTH,
    ) -> None:
        super().__init__()
        self.net = UNet(
            channels, channels, width=width, dimensions=dimensions, central_difference=central_difference
        )

    def forward(self, image: Tensor) -> Tensor:
        """``(N, C, ...)`` in [0, 1] to the same shape in [-1, 1]."""
        return torch.tanh(self.net(image))


def folded(net: nn.Module) -> nn.Module:
    """Return ``net`` with every central-difference convolution replaced by the ordinary one it equals; in place."""
    for name, child in net.named_children():
        if isinstance(child, CentralDifferenceConv2d | CentralDifferenceConv3d):
            make = nn.Conv2d if isinstance(child, CentralDifferenceConv2d) else nn.Conv3d
            plain = make(child.in_channels, child.out_channels, 3, 1, 1, bias=False)
            plain.weight = nn.Parameter(child.kernel().detach())
            setattr(net, name, plain)
        else:
            folded(child)
    return net


def _surrogate(norm: Norm) -> Callable[[int, int, Dimensions], nn.Module]:
    def make(channels: int, classes: int, dimensions: Dimensions) -> nn.Module:
        return UNet(channels, classes, dimensions=dimensions, norm=norm)

    return make


SEGMENTERS: dict[str, Callable[[int, int, Dimensions], nn.Module]] = {
    "unet-batch": _surrogate("batch"),
    "unet-instance": _surrogate("instance"),
}
"""Surrogates by name: ``(channels, classes, dimensions) -> net``."""


def build_segmenter(name: str, channels: int, classes: int, dimensions: Dimensions = 2) -> nn.Module:
    """Return a new surrogate with weights from torch's global generator (fork and seed it around this call).

    Raises:
        ConfigurationError: "architecture": there is none of that name.
    """
    make = SEGMENTERS.get(name)
    if make is None:
        known = ", ".join(SEGMENTERS)
        raise ConfigurationError("architecture", f"There is no segmenter {name!r}; choose from {known}.")
    return make(channels, classes, dimensions)
