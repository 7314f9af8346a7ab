"""Error-minimising noise for segmentation, a baseline: min-min on all pixels or the foreground (arXiv 2101.04898).

Noise of each image by projected gradient descent, in turn with a surrogate that learns from the noisy images. It
needs gradients and the whole set at once, and gives no generator: there is nothing in it for a site to run.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medveil.models.datasets.masked import Patches
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import stored_steps
from medveil.models.nets.segmentation import build_segmenter
from medveil.models.training.segmentation import overlap_loss

__all__ = ["error_minimised"]

# EM's own turns (10 batches of the model, then the noise) at a length that reached its plateau in a prototype; Adam
# and the rate are those of the other trainings here.
_ROUNDS, _BATCHES, _PGD_STEPS, _STEP_SHARE = 8, 10, 5, 0.25
_BATCH, _RATE = 16, 2e-3


def error_minimised(data: Patches, epsilon: float, *, foreground_only: bool, seed: int) -> FloatArray:
    """Return the images of ``data`` with error-minimising noise, in whole steps of 8 bits.

    Args:
        data: images and label maps, ``(N, C, rows, columns)``.
        epsilon: largest change, fraction of [0, 1].
        foreground_only: change nothing on the background.
        seed: of the surrogate and of the order of the images.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_segmenter("unet-batch", data.images.shape[1], data.classes)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(net.parameters(), _RATE)
    x, y = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    limit = epsilon * ((y > 0) if foreground_only else torch.ones_like(y))[:, None].float()
    delta = torch.zeros_like(x)
    for _ in range(_ROUNDS):
        net.train().requires_grad_(True)
        for _ in range(_BATCHES):
            index = torch.from_numpy(rng.permutation(len(data))[:_BATCH])
            optimiser.zero_grad()
            overlap_loss(net((x + delta)[index]), y[index]).backward()
            optimiser.step()
        net.eval().requires_grad_(False)
        for part in torch.arange(len(data)).split(_BATCH):
            noise = delta[part]
            for _ in range(_PGD_STEPS):
                gradient = _gradient(net, x[part], noise, y[part])
                moved = noise - _STEP_SHARE * epsilon * gradient.sign()
                noise = torch.maximum(torch.minimum(moved, limit[part]), -limit[part])
                noise = (x[part] + noise).clamp(0, 1) - x[part]
            delta[part] = noise
    return stored_steps(data.images, np.asarray(delta.numpy(), np.float32), epsilon)


def _gradient(net: torch.nn.Module, images: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
    asked = noise.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(overlap_loss(net(images + asked), labels), asked)
    return gradient
