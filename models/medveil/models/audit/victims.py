"""Train a victim: the model that somebody who got hold of a release would train on it.

Its images are the protected ones, its test images are always clean: noise on the test images too would keep the
accuracy high and prove nothing (users of the EM code met this: ``HanxunH/Unlearnable-Examples`` issue 22).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from medveil.models.audit import architectures
from medveil.models.nets.classifier import logits, worst_within
from medveil.models.quality.classification import Scores, evaluate

__all__ = ["VictimRun", "VictimSettings", "train_victim"]

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_ADAM = frozenset({"convnext", "mlp", "vit"})
"""Trained with AdamW, as their papers do; the others with SGD and Nesterov momentum."""


@dataclass(frozen=True, kw_only=True)
class VictimSettings:
    """How a victim trains.

    Attributes:
        architecture: one of ``architectures.NAMES``.
        epochs: passes over the training images.
        batch_size: images per step.
        shift: augmentation: random shift by up to this many pixels per batch; 0 for none.
        adversarial_radius: L-infinity radius of adversarial training (Madry et al. 2017, arXiv 1706.06083), as a
            fraction of [0, 1]; 0 for ordinary training.
        adversarial_steps: PGD steps of each adversarial example.
    """

    architecture: str
    epochs: int = 10
    batch_size: int = 64
    shift: int = 2
    adversarial_radius: float = 0.0
    adversarial_steps: int = 5


@dataclass(frozen=True)
class VictimRun:
    """Scores on clean test images after every epoch."""

    history: tuple[Scores, ...]

    @property
    def last(self) -> Scores:
        """Scores after the last epoch: what an attacker without clean validation images ends with."""
        return self.history[-1]

    @property
    def peak(self) -> Scores:
        """Scores of the epoch with the best balanced accuracy: an attacker who can stop early by clean images."""
        return max(self.history, key=lambda scores: scores.balanced_accuracy)


def train_victim(
    images: Images,
    labels: Labels,
    test_images: Images,
    test_labels: Labels,
    settings: VictimSettings,
    *,
    classes: int,
    seed: int,
) -> VictimRun:
    """Train one victim from scratch and score it on clean images after every epoch.

    Args:
        images: ``(N, C, H, W)`` float32 in [0, 1]: what the attacker holds.
        labels: ``(N,)`` class index.
        test_images: clean images, same layout.
        test_labels: their labels.
        settings: architecture and training.
        classes: number of classes K.
        seed: initial weights, order of the images, augmentation and calibration draws; the same seed gives the same
            run on the same machine and number of threads.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = architectures.build(
            settings.architecture, channels=images.shape[1], size=images.shape[2], classes=classes
        )
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form
        return _train(net, images, labels, test_images, test_labels, settings, seed)


def _train(
    net: nn.Module,
    images: Images,
    labels: Labels,
    test_images: Images,
    test_labels: Labels,
    settings: VictimSettings,
    seed: int,
) -> VictimRun:
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    batches = max(1, len(x) // settings.batch_size)
    optimiser, peak_rate = _optimiser(net, settings.architecture)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, peak_rate, total_steps=settings.epochs * batches, pct_start=0.15
    )
    history = []
    for epoch in range(settings.epochs):
        net.train()
        # An even split: every image is seen once an epoch and no batch is too small for batch norm.
        for index in torch.randperm(len(x)).tensor_split(batches):
            inputs = _shifted(x[index], settings.shift)
            if settings.adversarial_radius:
                inputs = _adversarial(net, inputs, y[index], settings)
            optimiser.zero_grad()
            F.cross_entropy(net(inputs), y[index]).backward()
            optimiser.step()
            schedule.step()
        rng = np.random.default_rng((seed, epoch))
        history.append(evaluate(logits(net, test_images), test_labels, rng))
    return VictimRun(tuple(history))


def _optimiser(net: nn.Module, architecture: str) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimiser and its peak learning rate: the customary ones, checked to converge at these sizes."""
    if architecture in _ADAM:
        rate = 2e-3
        return torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-2), rate
    rate = 0.05
    return torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True), rate


def _shifted(images: Tensor, pixels: int) -> Tensor:
    if not pixels:
        return images
    height, width = images.shape[2:]
    top, left = torch.randint(0, 2 * pixels + 1, (2,)).tolist()
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    return padded[:, :, top : top + height, left : left + width]


def _adversarial(net: nn.Module, images: Tensor, labels: Tensor, settings: VictimSettings) -> Tensor:
    radius = settings.adversarial_radius
    start = radius * (2 * torch.rand_like(images) - 1)
    return worst_within(net, images, labels, start, radius=radius, steps=settings.adversarial_steps)
