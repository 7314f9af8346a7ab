"""Oracles that ask torch: the trainer's counterparts of the site's onnxruntime sessions."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor, nn

from medveil.models.methods.oracle import FloatArray

__all__ = ["TorchOracle", "TrainableTorchOracle", "summed_loss"]

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


class TrainableTorchOracle:
    """A net that learns between questions: the ``TrainableOracle`` of the co-trained methods, in torch.

    SGD as EM's authors set it (arXiv 2101.04898: rate 0.1, momentum 0.9, decay 5e-4, gradients clipped at 5).
    Before a question the running statistics are replaced by those of the latest batches: young averages make
    losses explode.

    Args:
        net: ``(N, C, H, W)`` to logits ``(N, K)``; trained in place.
        shape: ``(C, H, W)``.
        classes: K.
    """

    _BATCHES_KEPT = 4  # our choice: 500 images

    def __init__(self, net: nn.Module, shape: tuple[int, ...], classes: int) -> None:
        self._net = net
        self._shape, self._classes = shape, classes
        self._optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        self._recent: deque[Tensor] = deque(maxlen=self._BATCHES_KEPT)
        self._norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        self._calibrated = True

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self._shape

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self._classes

    def train_step(self, images: FloatArray, targets: FloatArray) -> float:
        """Take one step on the batch's mean loss, in training mode, and return that loss."""
        self._net.train().requires_grad_(True)
        x = torch.from_numpy(np.ascontiguousarray(images))
        self._optimiser.zero_grad()
        loss = nn.functional.cross_entropy(self._net(x), torch.from_numpy(targets))
        loss.backward()
        nn.utils.clip_grad_norm_(self._net.parameters(), 5.0)
        self._optimiser.step()
        self._recent.append(x)
        self._calibrated = False
        return float(loss.detach())

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return losses and gradients of the net as it is now, in evaluation mode."""
        if not self._calibrated:
            self._calibrate()
        return TorchOracle(self._net, self._shape, self._classes).loss_and_gradient(images, targets)

    @torch.no_grad()
    def _calibrate(self) -> None:
        self._net.train()
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over what follows
        for batch in self._recent:
            self._net(batch)
        self._calibrated = True
