"""Train one net, an epoch at a time: each epoch's randomness has a seed of its own, so any epoch can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from medveil.models import nets
from medveil.models.bundle.manifest import Scores
from medveil.models.methods.oracle import FloatArray
from medveil.models.nets.classifier import logits, worst_within
from medveil.models.quality import classification as metrics
from medveil.models.training.plan import Augmentation, Member
from medveil.models.training.segmentation_views import blurred

__all__ = [
    "Diverged",
    "Examples",
    "balanced_order",
    "learning_rate",
    "logits",
    "new_net",
    "new_optimiser",
    "score",
    "seconds_per_epoch",
    "train_epoch",
]

IntArray = npt.NDArray[np.int64]

_ADAM = frozenset({"vit", "mlp"})
"""Trained with AdamW, as their papers do; the others with SGD and Nesterov momentum."""
_ADAM_RATE, _ADAM_DECAY = 1e-3, 1e-2
_SGD_RATE, _SGD_MOMENTUM, _SGD_DECAY = (
    0.05,
    0.9,
    5e-4,
)  # a tenth of the decay's usual batch, half its usual rate
_WARM_UP = 0.15  # share of the steps
_GRADIENT_CLIP = 5.0  # EM's value (arXiv 2101.04898), against the first steps of deep nets
_TIMED_STEPS = 3


class Diverged(Exception):  # noqa: N818 (a state of the training, answered with another seed)
    """The loss is no longer a number."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled training images: ``images`` (N, C, size, size) float32 in [0, 1], ``labels`` (N,), K ``classes``."""

    images: FloatArray
    labels: IntArray
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: IntArray) -> Examples:
        """Return the images at `index`, in that order."""
        return Examples(self.images[index], self.labels[index], self.classes)


def new_net(architecture: str, data: Examples, seed: int) -> nn.Module:
    """Return a net for `data`; its weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nets.build(architecture, data.images.shape[1], data.images.shape[2], data.classes)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def new_optimiser(net: nn.Module, architecture: str) -> torch.optim.Optimizer:
    """Return the optimiser of an architecture; its peak rate is ``defaults["lr"]``."""
    if architecture in _ADAM:
        return torch.optim.AdamW(net.parameters(), _ADAM_RATE, weight_decay=_ADAM_DECAY)
    return torch.optim.SGD(
        net.parameters(), _SGD_RATE, momentum=_SGD_MOMENTUM, weight_decay=_SGD_DECAY, nesterov=True
    )


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then a half cosine to zero (arXiv 1608.03983)."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def balanced_order(labels: IntArray, rng: np.random.Generator) -> IntArray:
    """Return an epoch's order in which every class comes equally often; rare classes repeat, none is left out."""
    classes = np.unique(labels)
    share = math.ceil(len(labels) / len(classes))
    drawn = []
    for label in classes:
        members = np.flatnonzero(labels == label)
        rounds = math.ceil(share / len(members))
        drawn.append(np.concatenate([rng.permutation(members) for _ in range(rounds)])[:share])
    return rng.permutation(np.concatenate(drawn)).astype(np.int64)


def _batches(data: Examples, batch_size: int, rng: np.random.Generator) -> Iterator[IntArray]:
    """Split an epoch evenly: no batch is too small for batch norm and no image is left out."""
    order = balanced_order(data.labels, rng)
    yield from np.array_split(order, max(1, len(order) // batch_size))


def train_epoch(
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    data: Examples,
    member: Member,
    *,
    epoch: int,
    epochs: int,
    seed: int,
    on_images: Callable[[int], None] | None = None,
) -> float:
    """Train for one epoch and return its mean loss.

    Args:
        net: trained in place.
        optimiser: of this net.
        data: what to learn.
        member: batch size, augmentation, smoothing, adversary.
        epoch: which one, from 0.
        epochs: of the whole run; with `epoch` it sets the learning rate.
        seed: of the run; order and augmentation of each epoch follow from it.
        on_images: told the number of images after every step.

    Raises:
        Diverged: the loss became NaN or infinite.
    """
    rng = np.random.default_rng((seed, epoch))
    x, y = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    batches = list(_batches(data, member.batch_size, rng))
    peak = float(optimiser.defaults["lr"])
    total = 0.0
    net.train()
    for number, index in enumerate(batches):
        rate = learning_rate(peak, epoch * len(batches) + number, epochs * len(batches))
        for group in optimiser.param_groups:
            group["lr"] = rate
        images, labels = _augmented(x[index], member.augmentation, rng), y[index]
        if member.adversarial_255:
            images = _adversarial(net, images, labels, member, rng)
        optimiser.zero_grad()
        loss = F.cross_entropy(net(images), labels, label_smoothing=member.label_smoothing)
        if not torch.isfinite(loss):
            raise Diverged
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), _GRADIENT_CLIP)
        optimiser.step()
        total += float(loss.detach()) * len(index)
        if on_images is not None:
            on_images(len(index))
    return total / sum(len(index) for index in batches)


def _augmented(images: Tensor, augmentation: Augmentation, rng: np.random.Generator) -> Tensor:
    """Return a batch moved, mirrored, blurred and with noise, as far as each is asked for."""
    reach = augmentation.shift
    if reach:
        top, left = rng.integers(0, 2 * reach + 1, size=2).tolist()
        rows, columns = images.shape[2:]
        images = F.pad(images, (reach,) * 4, mode="replicate")[:, :, top : top + rows, left : left + columns]
    if augmentation.flip:
        mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if augmentation.blur_sigma:
        images = blurred(images, float(rng.uniform(0, augmentation.blur_sigma)))
    if augmentation.noise:
        scale = float(rng.uniform(0, augmentation.noise))
        images = images + scale * torch.from_numpy(rng.standard_normal(images.shape, np.float32))
    return images


def _adversarial(
    net: nn.Module, images: Tensor, labels: Tensor, member: Member, rng: np.random.Generator
) -> Tensor:
    radius = member.adversarial_255 / 255
    start = torch.from_numpy(rng.uniform(-radius, radius, images.shape).astype(np.float32))
    return worst_within(net, images, labels, start, radius=radius, steps=member.adversarial_steps)


def score(net: nn.Module, data: Examples) -> tuple[Scores, int]:
    """Return the net's quality on `data`, and how many classes it ever answers; NaN logits answer none."""
    answers = logits(net, data.images)
    if not np.isfinite(answers).all():
        return Scores(accuracy=0, balanced_accuracy=0, auc=0), 0
    predicted = answers.argmax(axis=1)
    one_against_rest = np.diag(metrics.auc_matrix(answers, data.labels))
    return Scores(
        accuracy=float((predicted == data.labels).mean()),
        balanced_accuracy=metrics.balanced_accuracy(predicted, data.labels),
        auc=float(one_against_rest.mean()),
    ), len(np.unique(predicted))


def seconds_per_epoch(member: Member, data: Examples) -> float:
    """Return what one epoch of this member takes here and now: a few steps of a throw-away net, timed."""
    sample = data.select(np.arange(min(len(data), _TIMED_STEPS * member.batch_size)))
    net = new_net(member.architecture, data, seed=0)
    optimiser = new_optimiser(net, member.architecture)
    fastest = math.inf
    for _ in range(2):  # the first pass also pays for torch's own warm-up
        start = perf_counter()
        train_epoch(net, optimiser, sample, member, epoch=0, epochs=1, seed=0)
        fastest = min(fastest, perf_counter() - start)
    return fastest * len(data) / len(sample)
