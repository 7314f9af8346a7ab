"""What happens to images on their way into a training: random, differentiable views for the expectation over them.

Noise that only works on untouched pixels is gone after one blur. So the hardened generators, and the surrogate they
are trained against, see every batch through one of these (EOT: Athalye et al., arXiv 1707.07397). Ranges are our
choice: what a radiology pipeline or an attacker's augmentation does without spoiling the image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

__all__ = ["blurred", "compressed", "random_view"]

_BLUR_SIGMA = (0.5, 1.2)  # pixels
_NOISE = 0.04  # largest standard deviation, share of [0, 1]
_CONTRAST = (0.7, 1.3)
_GAMMA = (0.7, 1.5)  # VoxShield's own countermeasure range (arXiv 2605.17345)
_JPEG_QUALITY = (25, 85)
_BLOCK = 8
_DARKEST = 1e-3  # the slope of a power is infinite at 0

# Luminance table of ITU-T T.81 (JPEG), Annex K, table K.1.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def random_view(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a batch ``(N, C, ...)`` as it is, or through one view drawn for all of it; volumes are not blurred."""
    kinds = ["plain", "noise", "contrast", "gamma"]
    if images.ndim == 4:
        kinds += ["blur", "jpeg", "smaller"]
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "blur":
        return blurred(images, float(rng.uniform(*_BLUR_SIGMA)))
    if kind == "noise":
        drawn = torch.from_numpy(rng.standard_normal(tuple(images.shape), np.float32))
        return images + float(rng.uniform(0, _NOISE)) * drawn
    if kind == "contrast":
        middle = images.mean(tuple(range(1, images.ndim)), keepdim=True)
        return middle + float(rng.uniform(*_CONTRAST)) * (images - middle)
    if kind == "gamma":
        return images.clamp(_DARKEST, 1) ** float(rng.uniform(*_GAMMA))
    if kind == "jpeg":
        return compressed(images, int(rng.integers(*_JPEG_QUALITY)))
    if kind == "smaller":
        half = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
        return F.interpolate(half, size=images.shape[2:], mode="bilinear")
    return images


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Return a separable Gaussian blur of ``(N, C, H, W)``, cut at three sigma, edges repeated."""
    reach = math.ceil(3 * sigma)
    if reach == 0:
        return images
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(images.shape[1], 1, 1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, :, None], groups=images.shape[1])
    return F.conv2d(rows, kernel[:, :, None, :], groups=images.shape[1])


def compressed(images: Tensor, quality: int) -> Tensor:
    """Return ``(N, C, H, W)`` through the lossy part of JPEG, each channel by the luminance table.

    Block cosine transform, rounding to the table scaled by ``quality`` (1..100), and back. The rounding's gradient is
    taken for 1 (straight-through, Bengio et al., arXiv 1308.3432).
    """
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    table = ((torch.tensor(_LUMINANCE, dtype=torch.float32) * scale + 50) / 100).floor().clamp(1, 255) / 255
    rows, columns = images.shape[2:]
    padded = F.pad(images, (0, -columns % _BLOCK, 0, -rows % _BLOCK), mode="replicate")
    blocks = padded.unfold(2, _BLOCK, _BLOCK).unfold(3, _BLOCK, _BLOCK)
    basis = _cosines()
    steps = basis @ (blocks - 0.5) @ basis.T / table
    rounded = steps + (steps.round() - steps).detach()
    restored = basis.T @ (rounded * table) @ basis + 0.5
    whole = restored.permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)
    return whole[:, :, :rows, :columns].clamp(0, 1)


def _cosines() -> Tensor:
    """Return the orthonormal 8-point DCT-II, ``(8, 8)``."""
    k, n = torch.meshgrid(torch.arange(_BLOCK), torch.arange(_BLOCK), indexing="ij")
    basis = torch.cos(math.pi * (2 * n + 1) * k / (2 * _BLOCK)) * math.sqrt(2 / _BLOCK)
    basis[0] /= math.sqrt(2)
    return basis
