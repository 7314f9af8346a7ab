"""What surrogates and victims have in common as classifiers: answers, and the worst images near given ones."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

__all__ = ["logits", "worst_within"]

_BATCH: Final = 512
# PGD steps that overshoot the radius a little, so that the border is reached (Madry et al., arXiv 1706.06083).
_REACH: Final = 1.25


@torch.no_grad()
def logits(net: nn.Module, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the net's logits ``(N, K)`` for images ``(N, C, H, W)``; the net stays in evaluation mode."""
    net.eval()
    chunks = torch.from_numpy(images).split(_BATCH)
    return np.concatenate([np.asarray(net(chunk).numpy(), np.float32) for chunk in chunks])


def worst_within(
    net: nn.Module, images: Tensor, labels: Tensor, start: Tensor, *, radius: float, steps: int
) -> Tensor:
    """Return the images moved within a radius so that the loss is as large as PGD makes it.

    Args:
        net: asked in the mode it is in.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)``.
        start: where the search begins, of the images' shape and within the radius.
        radius: largest change of a pixel.
        steps: of PGD, by the gradient's sign.
    """
    step = _REACH * radius / steps
    delta = start
    for _ in range(steps):
        delta.requires_grad_(True)
        loss = F.cross_entropy(net(images + delta), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + step * gradient.sign()).clamp(-radius, radius)
    return (images + delta).clamp(0, 1)
