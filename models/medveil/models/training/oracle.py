"""A `GradientOracle` that asks torch: the trainer's counterpart of the site's onnxruntime session."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from medveil.models.methods.oracle import FloatArray

__all__ = ["TorchOracle", "summed_loss"]

# A batch that keeps small nets busy and a large net's activations within a few hundred MiB (our choice).
_CHUNK = 128


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each image's cross-entropy ``(N,)`` towards its target distribution, in nats."""
    return -(targets * torch.log_softmax(logits, dim=1)).sum(1)


class TorchOracle:
    """Losses and input gradients of a finished net, in evaluation mode.

    Args:
        net: ``(N, C, H, W)`` to logits ``(N, K)``; it is put into evaluation mode and its weights are frozen.
        input_shape: ``(C, H, W)``.
        classes: K.
        dtype: float64 gives the reference that golden vectors are made of.
    """

    def __init__(
        self, net: nn.Module, input_shape: tuple[int, ...], classes: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self._net = net.eval().to(dtype).requires_grad_(False)
        self._shape = input_shape
        self._classes = classes
        self._dtype = dtype

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self._shape

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self._classes

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return each image's loss and gradient; see `medveil.models.methods.oracle.GradientOracle`."""
        losses = np.empty(len(images), np.float32)
        gradients = np.empty(images.shape, np.float32)
        for start in range(0, len(images), _CHUNK):
            part = slice(start, start + _CHUNK)
            x = torch.tensor(images[part], dtype=self._dtype, requires_grad=True)
            loss = summed_loss(self._net(x), torch.tensor(targets[part], dtype=self._dtype))
            # The sum, not the mean: an image's gradient must not depend on how many others are asked about.
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            losses[part] = loss.detach().numpy()
            gradients[part] = gradient.numpy()
        return losses, gradients
