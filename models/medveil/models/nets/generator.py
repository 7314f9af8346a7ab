"""A noise generator: one forward pass from an image and the class it is pushed towards to a perturbation."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

__all__ = ["NoiseGenerator"]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class NoiseGenerator(nn.Module):
    """A U-Net (Ronneberger et al., arXiv 1505.04597) of three resolutions; the target shifts its features.

    Args:
        channels: of the image.
        classes: length K of the target.
        width: channels at full resolution.
    """

    def __init__(self, channels: int, classes: int, width: int = 12) -> None:
        super().__init__()
        self.down1 = _block(channels, width)
        self.down2 = _block(width, 2 * width)
        self.bottom = _block(2 * width, 4 * width)
        self.up2 = _block(6 * width, 2 * width)
        self.up1 = _block(3 * width, width)
        # A shift per feature and class is FiLM (arXiv 1709.07871) without its scale, which ReLUs hardly miss.
        self.target_bottom = nn.Linear(classes, 4 * width)
        self.target_top = nn.Linear(classes, width)
        self.pattern = nn.Conv2d(width, channels, 3, 1, 1)
        self.score = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return pattern and score.

        Args:
            image: ``(N, C, H, W)`` in [0, 1].
            target: ``(N, K)``, the distribution that the noise aims at.

        Returns:
            pattern ``(N, C, H, W)`` in [-1, 1], the change as a share of epsilon; score ``(N, 1, H, W)`` in (0, 1),
            how much a pixel deserves its place in the mask.
        """
        fine = self.down1(image)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2)) + self.target_bottom(target)[:, :, None, None]
        middle = self.up2(torch.cat([_enlarged(coarse, middle), middle], 1))
        fine = self.up1(torch.cat([_enlarged(middle, fine), fine], 1))
        features = torch.relu(fine + self.target_top(target)[:, :, None, None])
        return torch.tanh(self.pattern(features)), torch.sigmoid(self.score(features))


def _enlarged(small: Tensor, like: Tensor) -> Tensor:
    """Return ``small`` at the rows and columns of ``like``; odd sizes lost a row in pooling, hence not a factor."""
    return F.interpolate(small, size=like.shape[2:], mode="nearest")
