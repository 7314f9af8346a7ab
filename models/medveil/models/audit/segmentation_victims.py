"""Train a segmentation victim: what somebody who got hold of a protected release would train on it.

It learns from protected images and is tested on clean ones; only where the attacker transforms every image, as a
countermeasure, are the test images transformed alike (a transform at training time alone only spoils the test).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from medveil.models.audit import segmentation_architectures
from medveil.models.quality.segmentation import recoverable_dice, score_classes

__all__ = [
    "SegmentationRun",
    "SegmentationVictimScores",
    "SegmentationVictimSettings",
    "pretrained",
    "train_segmentation_victim",
]

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_EVALUATION_BATCH = 64
_RATE, _DECAY = (
    2e-3,
    1e-4,
)  # AdamW; brings all four nets to their plateau on 240 patches in 250 steps (measured)
_ADVERSARY_REACH = 1.25
# A fine-tuning attacker's share of the usual rate, as is customary.
_FINE_TUNING = 0.3


@dataclass(frozen=True, kw_only=True)
class SegmentationVictimSettings:
    """How a victim trains.

    Attributes:
        architecture: one of ``segmentation_architectures.NAMES``.
        steps: optimiser steps, whatever the number of images: who has fewer images sees them more often.
        batch_size: images per step.
        readings: how often it is scored on the way, for the peak.
        augmentation: "plain": mirrors and quarter turns; "strong": with contrast, gamma, noise and blur.
        adversarial_radius: L-infinity radius of adversarial training (arXiv 1706.06083), fraction of [0, 1].
        adversarial_steps: its PGD steps.
    """

    architecture: str
    steps: int = 250
    batch_size: int = 16
    readings: int = 5
    augmentation: str = "plain"
    adversarial_radius: float = 0.0
    adversarial_steps: int = 2


@dataclass(frozen=True)
class SegmentationVictimScores:
    """What a victim reaches; means over images and foreground classes.

    Attributes:
        dice, iou: in [0, 1], on clean test images.
        hd95: in pixels; an image whose class was not found at all counts with its diagonal.
        empty_predictions: test images (times classes) whose class exists and was not found at all.
        recoverable_dice: with the thresholds that serve best on the test images (`quality.recoverable_dice`): an
            upper bound for an attacker who holds some clean images with label maps.
        train_dice: on the images that it trained on, as it got them.
    """

    dice: float
    iou: float
    hd95: float
    empty_predictions: int
    recoverable_dice: float
    train_dice: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class SegmentationRun:
    """One victim: its Dice on clean test images along the way, and all scores at the end.

    Attributes:
        dice_history: at each reading.
        last: at the end.
        release_dice: at the end, in other people's protected images; None where it was given none to read.
    """

    dice_history: tuple[float, ...]
    last: SegmentationVictimScores
    release_dice: float | None = None

    @property
    def peak_dice(self) -> float:
        """Return the best reading: what somebody with clean validation images would stop at."""
        return max(self.dice_history)


def train_segmentation_victim(
    images: Images,
    labels: Labels,
    test_images: Images,
    test_labels: Labels,
    settings: SegmentationVictimSettings,
    *,
    classes: int,
    seed: int,
    start: Mapping[str, Tensor] | None = None,
    protected_test: Images | None = None,
) -> SegmentationRun:
    """Train one victim and score it on clean images.

    Args:
        images: ``(N, C, [slices,] rows, columns)`` float32 in [0, 1]: what the attacker holds.
        labels: ``(N, ...)`` class index over the same pixels, 0 for background.
        test_images: clean images, likewise.
        test_labels: their label maps.
        settings: architecture and training.
        classes: K, background included.
        seed: initial weights, order and augmentation.
        start: weights to fine-tune (see `pretrained`); None: from scratch.
        protected_test: the test images, protected: what does a model that trained on ``images`` find in a release?
    """
    net, run = _fitted(images, labels, settings, classes, seed, start, test=(test_images, test_labels))
    if protected_test is None:
        return run
    return replace(run, release_dice=_dice(_predicted(net, protected_test), test_labels, classes))


def pretrained(
    images: Images, labels: Labels, settings: SegmentationVictimSettings, *, classes: int, seed: int
) -> Mapping[str, Tensor]:
    """Return the weights of a net trained on ``images``: where a fine-tuning attacker begins."""
    net, _ = _fitted(images, labels, settings, classes, seed, None, test=None)
    return net.state_dict()


def _fitted(
    images: Images,
    labels: Labels,
    settings: SegmentationVictimSettings,
    classes: int,
    seed: int,
    start: Mapping[str, Tensor] | None,
    test: tuple[Images, Labels] | None,
) -> tuple[nn.Module, SegmentationRun]:
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = segmentation_architectures.build(
            settings.architecture, channels=images.shape[1], classes=classes, dimensions=images.ndim - 2
        )
    net.to(memory_format=_layout(images.ndim))  # type: ignore[call-overload]  # torch's stub lacks this form
    if start is not None:
        net.load_state_dict(copy.deepcopy(dict(start)))
    rate = _RATE if start is None else _FINE_TUNING * _RATE
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=settings.steps, pct_start=0.15
    )
    x = torch.from_numpy(images).contiguous(memory_format=_layout(images.ndim))
    y = torch.from_numpy(labels)
    history: list[float] = []
    order: list[int] = []
    marks = {round(settings.steps * (n + 1) / settings.readings) for n in range(settings.readings)}
    for step in range(1, settings.steps + 1):
        if len(order) < settings.batch_size:
            order += rng.permutation(len(x)).tolist()
        index, order = order[: settings.batch_size], order[settings.batch_size :]
        inputs, wanted = _augmented(x[index], y[index], settings.augmentation, rng)
        net.train()
        if settings.adversarial_radius:
            inputs = _adversarial(net, inputs, wanted, settings)
        optimiser.zero_grad()
        _loss(net(inputs), wanted).backward()
        optimiser.step()
        schedule.step()
        if test is not None and step in marks and step < settings.steps:
            history.append(float(_dice(_predicted(net, test[0]), test[1], classes)))
    last = SegmentationVictimScores(0, 0, 0, 0, 0, 0)
    if test is not None:
        probabilities = _probabilities(net, test[0])
        scores = score_classes(probabilities.argmax(1), test[1], classes)
        last = SegmentationVictimScores(
            dice=float(scores.dice.mean()),
            iou=float(scores.iou.mean()),
            hd95=float(scores.hd95.mean()),
            empty_predictions=int(scores.empty_predictions.sum()),
            recoverable_dice=float(recoverable_dice(probabilities, test[1]).mean()),
            train_dice=_dice(_predicted(net, images), labels, classes),
        )
        history.append(last.dice)
    return net, SegmentationRun(tuple(history), last)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice, the customary pair (nnU-Net, arXiv 1809.10486)."""
    wanted = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).float()
    found = logits.softmax(1)
    over = (0, *range(2, logits.ndim))
    both, either = (found * wanted).sum(over), (found + wanted).sum(over)
    return torch.as_tensor(F.cross_entropy(logits, labels) + 1 - ((2 * both + 1) / (either + 1)).mean())


def _dice(predicted: Labels, labels: Labels, classes: int) -> float:
    """Return the mean Dice without the cost of distances."""
    from medveil.models.quality.segmentation import dice

    return float(np.mean([dice(predicted == c, labels == c) for c in range(1, classes)]))


def _augmented(x: Tensor, y: Tensor, kind: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    turns = int(rng.integers(4))
    if x.shape[-1] == x.shape[-2]:
        x, y = x.rot90(turns, (-2, -1)), y.rot90(turns, (-2, -1))
    if rng.random() < 0.5:
        x, y = x.flip(-1), y.flip(-1)
    if kind == "strong":
        x = _intensity(x, rng)
    return x.contiguous(memory_format=_layout(x.ndim)), y.contiguous()


def _intensity(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Contrast, gamma, noise and blur as nnU-Net draws them, per image; each with a chance of one half."""
    count = (len(x), *(1 for _ in x.shape[1:]))

    def drawn(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, count).astype(np.float32))

    def half() -> Tensor:
        return torch.from_numpy(rng.random(count) < 0.5)

    middle = x.mean(tuple(range(1, x.ndim)), keepdim=True)
    x = torch.where(half(), middle + drawn(0.65, 1.5) * (x - middle), x)
    x = torch.where(half(), x.clamp(1e-3, 1) ** drawn(0.7, 1.5), x)
    noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), np.float32))
    x = torch.where(half(), x + drawn(0, 0.05) * noise, x)
    mean_of_three = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    smooth = mean_of_three(F.pad(x, (1, 1) * (x.ndim - 2), mode="replicate"), 3, 1)
    return torch.where(half(), smooth, x).clamp(0, 1)


def _adversarial(net: nn.Module, x: Tensor, y: Tensor, settings: SegmentationVictimSettings) -> Tensor:
    """Return the images moved within the radius so that the loss is as large as PGD makes it."""
    radius = settings.adversarial_radius
    step = _ADVERSARY_REACH * radius / settings.adversarial_steps
    delta = torch.zeros_like(x)
    for _ in range(settings.adversarial_steps):
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(_loss(net(x + delta), y), delta)
        delta = (delta.detach() + step * gradient.sign()).clamp(-radius, radius)
    return (x + delta).clamp(0, 1)


def _layout(axes: int) -> torch.memory_format:
    """Return torch's fast layout for images ``(N, C, H, W)``; volumes keep the usual one."""
    return torch.channels_last if axes == 4 else torch.contiguous_format


def _predicted(net: nn.Module, images: Images) -> Labels:
    return np.asarray(_probabilities(net, images).argmax(1), np.int64)


@torch.no_grad()
def _probabilities(net: nn.Module, images: Images) -> Images:
    net.eval()
    chunks = torch.from_numpy(images).split(_EVALUATION_BATCH)
    return np.concatenate([net(chunk).softmax(1).numpy() for chunk in chunks])
