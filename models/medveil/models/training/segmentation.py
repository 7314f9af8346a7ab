"""Train the generators of UMed, UMed-plus and VoxShield: bi-level min-min against segmentation surrogates.

    for each iteration, a batch (x, y):
        x_p = clip01( x + sum over parts of clip(eps * G(x), -limit, limit) )
        every n-th:   the surrogate learns          L(F(x_p), y)
        else:         the generators learn          L(F(x_p), target),   F frozen, in evaluation mode

arXiv 2403.14250, Algorithm 1, with L = cross-entropy + Dice and n = 5. The other form, ours for segmentation, is
the one that carries over between hospitals in classification: surrogates learn the clean images first and stand
still then, while the generators move every pixel towards another class, by one fixed permutation. What limits a
part is the method's own definition (`medveil.models.methods.masked`), computed once per image by the code that a
site runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from medveil.models.datasets.masked import Patches
from medveil.models.errors import ConfigurationError
from medveil.models.methods.base import IntArray
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import stored_steps
from medveil.models.methods.segmentation import MaskedBatch, SegmentationSettings, get_segmentation
from medveil.models.methods.umed import CONTOUR
from medveil.models.nets.segmentation import Dimensions, Generator, build_segmenter
from medveil.models.training.fit import Diverged, learning_rate
from medveil.models.training.segmentation_views import random_view

__all__ = [
    "PLANS",
    "GeneratorPlan",
    "GeneratorTraining",
    "answers",
    "foreground_everywhere",
    "keyed",
    "overlap_loss",
    "protect_patches",
]

_SMOOTHING = 1.0  # pixels; Dice of two empty sets is 1
_GRADIENT_CLIP = 5.0  # as in the other trainings here
_EVALUATION_BATCH = 64
_BETAS = (0.9, 0.999)  # UMed's re-implementation
_GENERATOR_DECAY, _SURROGATE_DECAY = 1e-5, 5e-4  # the same source


def keyed(data: Patches) -> MaskedBatch:
    """Return what a segmentation method takes; each patch is keyed by its own pixels."""
    keys = tuple(hashlib.sha256(image.tobytes()).digest() for image in data.images)
    return MaskedBatch(data.images, data.labels, keys)


@dataclass(frozen=True, kw_only=True)
class GeneratorPlan:
    """How the generators of one method are trained.

    Attributes:
        method: name in `SEGMENTATION_METHODS`; it must have generators.
        settings: budget and geometry of the noise.
        surrogates: architectures (`SEGMENTERS`); with several, they take turns.
        target: what the generators make the surrogate see: "labels"; "foreground" everywhere (UnSeg, arXiv
            2410.09909, for more than one class: the nearest one); "permuted": of each class the next one, of the
            last one background (TAP's fixed permutation, arXiv 2106.10807, pixel by pixel).
        hardened: both sides train through random views.
        iterations: batches seen.
        batch_size: images per iteration.
        rate: peak rate of Adam, for both sides.
        surrogate_every: every so many iterations the surrogate learns; 5 is UMed's ratio of 4:1.
        clean_steps: above 0, each surrogate first learns clean images for so many steps and is frozen then; they come
            before the iterations. 0: bi-level.
        disruption: weight of VoxShield's semantic prediction disruption; 0: off.
        inconsistency: weight of VoxShield's inter-slice inconsistency, over orthonormal spectra; 0: off.
    """

    method: str
    settings: SegmentationSettings = field(default_factory=SegmentationSettings)
    surrogates: tuple[str, ...] = ("unet-batch",)
    target: Literal["labels", "foreground", "permuted"] = "labels"
    hardened: bool = False
    iterations: int = 600
    batch_size: int = 16
    rate: float = 2e-3
    surrogate_every: int = 5
    clean_steps: int = 0
    disruption: float = 0.0
    inconsistency: float = 0.0

    def __post_init__(self) -> None:
        if not get_segmentation(self.method).generators:
            raise ConfigurationError("setting", f"The method {self.method} has no generators to train.")
        if self.iterations < 1 or self.batch_size < 2 or self.rate <= 0 or self.surrogate_every < 2:
            raise ConfigurationError("setting", "A setting of the generators' training is out of range.")
        if not self.surrogates:
            raise ConfigurationError("setting", "Generators need at least one surrogate to learn from.")

    @property
    def all_iterations(self) -> int:
        """Iterations of the whole training, those of the surrogates on clean images among them."""
        return self.clean_steps * len(self.surrogates) + self.iterations


# UMed trains 100 epochs at 1e-4; twenty times that rate reaches its effect in minutes (measured in a prototype, on
# drawn lesions at 64 pixels). VoxShield's weights are its release's; the spectra there are not normalised, hence
# 0.2 times the root of its slices' 160 x 160 pixels.
PLANS: Mapping[str, GeneratorPlan] = {
    "umed": GeneratorPlan(method="umed"),
    # A band wider than UMed's 3 pixels: our choice at full size, after 2 instead of 1 at 64 pixels (measured).
    "umed-plus": GeneratorPlan(
        method="umed-plus", settings=SegmentationSettings(band_radius=4), target="foreground", hardened=True
    ),
    # What protects best on retinal vessels, against instance norm too (bench/segmentation.py): the permutation needs
    # a budget that outweighs the tissue's own contrast, and a band that reaches past what surrounds a border.
    "umed-targeted": GeneratorPlan(
        method="umed-targeted",
        settings=SegmentationSettings(epsilon=8 / 255, band_radius=4, texture_bound=False),
        surrogates=("unet-batch", "unet-instance") * 2,
        target="permuted",
        clean_steps=250,
    ),
    "voxshield": GeneratorPlan(
        method="voxshield",
        settings=SegmentationSettings(band_radius=0, texture_bound=False),
        # Its release takes ten batches of the surrogate to one pass over the data: about 1:1 at a hundred patches.
        surrogate_every=2,
        disruption=0.05,
        inconsistency=0.2 * 160,
        batch_size=8,
    ),
}


@dataclass(frozen=True, eq=False)
class _Batch:
    """What one iteration looks at; all of one orientation."""

    images: Tensor
    labels: Tensor
    aims: Tensor
    limits: Mapping[str, Tensor]


class GeneratorTraining:
    """The generators of one plan in training; it can be put away and taken up after any iteration.

    Args:
        plan: what to train.
        data: public patches.
        seed: weights, order of the patches and views follow from it.
    """

    def __init__(self, plan: GeneratorPlan, data: Patches, seed: int) -> None:
        self._plan, self._data, self._seed = plan, data, seed
        method = get_segmentation(plan.method)
        channels = data.images.shape[1]
        dimensions: Dimensions = 2 if data.images.ndim == 4 else 3
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generators = {
                part: Generator(channels, dimensions=dimensions, central_difference=part == CONTOUR)
                for part in method.generators
            }
            self._surrogates = [
                build_segmenter(name, channels, data.classes, dimensions) for name in plan.surrogates
            ]
        self._layout = torch.channels_last if dimensions == 2 else torch.contiguous_format
        for net in (*self.generators.values(), *self._surrogates):
            net.to(memory_format=self._layout)  # type: ignore[call-overload]
        weights = [p for net in self.generators.values() for p in net.parameters()]
        self._generator_optimiser = torch.optim.Adam(
            weights, plan.rate, betas=_BETAS, weight_decay=_GENERATOR_DECAY
        )
        self._surrogate_optimisers = [
            torch.optim.Adam(net.parameters(), plan.rate, betas=_BETAS, weight_decay=_SURROGATE_DECAY)
            for net in self._surrogates
        ]
        self._limits = {
            part: torch.from_numpy(limit) for part, limit in method.limits(keyed(data), plan.settings).items()
        }
        self._images = torch.from_numpy(data.images)
        self._labels = torch.from_numpy(data.labels)
        self._aims = torch.from_numpy(_aims(data, plan.target))
        self._clean_steps = plan.clean_steps * len(self._surrogates)
        self.iteration = 0

    @property
    def finished(self) -> bool:
        """Whether every planned iteration is done."""
        return self.iteration >= self._plan.all_iterations

    def step(self) -> float:
        """Do one iteration and return its loss.

        Raises:
            Diverged: the loss became NaN or infinite.
        """
        plan = self._plan
        # One stream per iteration: a training that was put away goes on with the same draws.
        rng = np.random.default_rng((self._seed, self.iteration))
        index = torch.from_numpy(np.sort(rng.permutation(len(self._data))[: plan.batch_size]))
        frozen = self._clean_steps > 0
        number = self.iteration % len(self._surrogates)
        if frozen:
            teach = self._teach_clean if self.iteration < self._clean_steps else self._teach_generators
        else:
            turn, phase = divmod(self.iteration, plan.surrogate_every)
            number = turn % len(self._surrogates)
            teach = self._teach_surrogate if phase == 0 else self._teach_generators
        # An organ has no side that it must lie on.
        orientation = _turn(rng, square=self._images.shape[-1] == self._images.shape[-2])
        loss = teach(number, self._drawn(index, orientation), rng)
        self.iteration += 1
        return loss

    def _drawn(self, index: Tensor, turn: Callable[[Tensor], Tensor]) -> _Batch:
        """Return the patches at ``index``, turned as one."""
        return _Batch(
            images=turn(self._images[index]).contiguous(memory_format=self._layout),
            labels=turn(self._labels[index]),
            aims=turn(self._aims[index]),
            limits={part: turn(limit[index]) for part, limit in self._limits.items()},
        )

    def _teach_surrogate(self, number: int, batch: _Batch, rng: np.random.Generator) -> float:
        surrogate = self._surrogates[number]
        with torch.no_grad():
            released, _ = self._released(batch)
        surrogate.train()
        loss = overlap_loss(surrogate(self._viewed(released, rng)), batch.labels)
        return self._descend(loss, self._surrogate_optimisers[number], surrogate.parameters())

    def _teach_clean(self, number: int, batch: _Batch, rng: np.random.Generator) -> float:
        surrogate = self._surrogates[number]
        surrogate.train()
        loss = overlap_loss(surrogate(self._viewed(batch.images, rng)), batch.labels)
        return self._descend(loss, self._surrogate_optimisers[number], surrogate.parameters())

    def _teach_generators(self, number: int, batch: _Batch, rng: np.random.Generator) -> float:
        plan, surrogate = self._plan, self._surrogates[number]
        for net in self.generators.values():
            net.train()
        surrogate.eval()
        released, delta = self._released(batch)
        logits = surrogate(self._viewed(released, rng))
        loss = overlap_loss(logits, batch.aims)
        if plan.disruption:
            with torch.no_grad():
                clean = surrogate(batch.images)
            loss = loss - plan.disruption * (logits - clean).abs().mean()
        if plan.inconsistency:
            loss = loss - plan.inconsistency * _spectral_steps(delta)
        weights = [p for net in self.generators.values() for p in net.parameters()]
        return self._descend(loss, self._generator_optimiser, weights)

    def _released(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Return protected images and noise: the methods' own composition, with a gradient."""
        images, epsilon = batch.images, self._plan.settings.epsilon
        delta = torch.zeros_like(images)
        for part, net in self.generators.items():
            limit = batch.limits[part]
            delta = delta + torch.clamp(epsilon * net(images), -limit, limit)
        return (images + delta).clamp(0, 1), delta

    def _viewed(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        return random_view(images, rng) if self._plan.hardened else images

    def _descend(self, loss: Tensor, optimiser: torch.optim.Optimizer, weights: object) -> float:
        if not torch.isfinite(loss):
            raise Diverged
        for group in optimiser.param_groups:
            group["lr"] = self._rate()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, _GRADIENT_CLIP)  # type: ignore[arg-type]
        optimiser.step()
        return float(loss.detach())

    def _rate(self) -> float:
        """Return the rate of this iteration; each phase warms up and cools down on its own."""
        if self.iteration < self._clean_steps:
            return learning_rate(self._plan.rate, self.iteration, self._clean_steps)
        return learning_rate(self._plan.rate, self.iteration - self._clean_steps, self._plan.iterations)

    def state(self) -> dict[str, object]:
        """Return what `restore` needs to go on from here."""
        return {
            "iteration": self.iteration,
            "generators": {part: net.state_dict() for part, net in self.generators.items()},
            "surrogates": [net.state_dict() for net in self._surrogates],
            "optimisers": [o.state_dict() for o in (self._generator_optimiser, *self._surrogate_optimisers)],
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on where `state` was taken."""
        kept: dict[str, object] = dict(state)
        self.iteration = int(kept["iteration"])  # type: ignore[call-overload]
        for part, net in self.generators.items():
            net.load_state_dict(kept["generators"][part])  # type: ignore[index]
        for net, weights in zip(self._surrogates, kept["surrogates"], strict=True):  # type: ignore[call-overload]
            net.load_state_dict(weights)
        for optimiser, values in zip(
            (self._generator_optimiser, *self._surrogate_optimisers),
            kept["optimisers"],
            strict=True,  # type: ignore
        ):
            optimiser.load_state_dict(values)


def _turn(rng: np.random.Generator, *, square: bool) -> Callable[[Tensor], Tensor]:
    """Return one orientation of rows and columns: any of the eight of a square, or mirrored or not."""
    quarters, mirrored = int(rng.integers(4)) if square else 0, bool(rng.random() < 0.5)

    def turned(x: Tensor) -> Tensor:
        x = x.rot90(quarters, (-2, -1))
        return x.flip(-1) if mirrored else x

    return turned


def overlap_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy plus one minus the soft Dice, meaned over the classes.

    The Dice counts pixels over the whole batch: a class that one patch lacks is no reason to predict it there.

    Args:
        logits: ``(N, K, ...)``.
        labels: ``(N, ...)`` class index.
    """
    wanted = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    found = logits.softmax(1)
    over = (0, *range(2, logits.ndim))
    both, either = (found * wanted).sum(over), found.sum(over) + wanted.sum(over)
    dice = (2 * both + _SMOOTHING) / (either + _SMOOTHING)
    return torch.as_tensor(F.cross_entropy(logits, labels) + 1 - dice.mean())


def _spectral_steps(delta: Tensor) -> Tensor:
    """Return how far the noise's spectrum moves from slice to slice: VoxShield's -L_ISC, orthonormal.

    delta: ``(N, C, slices, rows, columns)``; L2 over a slice, mean over pairs, channels and batch.
    """
    spectra = torch.fft.fft2(delta, norm="ortho").abs()
    steps = spectra.diff(dim=2).square().sum((3, 4))
    # The root's slope is infinite where two slices agree, as all do where a patch has no foreground.
    return torch.as_tensor((steps + torch.finfo(steps.dtype).eps).sqrt().mean())


def _aims(data: Patches, target: str) -> IntArray:
    if target == "foreground":
        return foreground_everywhere(data.labels)
    return (data.labels + 1) % data.classes if target == "permuted" else data.labels


def foreground_everywhere(labels: IntArray) -> IntArray:
    """Return label maps without background: each such pixel gets the class of the nearest foreground pixel.

    With one class it is UnSeg's mask of ones. An image without foreground becomes all class 1.
    """
    from scipy import ndimage

    filled = np.ones_like(labels)
    for target, one in zip(filled, labels, strict=True):
        if (one > 0).any():
            nearest = ndimage.distance_transform_edt(one == 0, return_distances=False, return_indices=True)
            target[:] = one[tuple(nearest)]
    return filled


@torch.no_grad()
def answers(generators: Mapping[str, nn.Module], images: FloatArray) -> dict[str, FloatArray]:
    """Return what each generator says about ``images``, in evaluation mode."""
    said = {}
    for part, net in generators.items():
        net.eval()
        chunks = torch.from_numpy(images).split(_EVALUATION_BATCH)
        said[part] = np.concatenate([np.asarray(net(chunk).numpy(), np.float32) for chunk in chunks])
    return said


def protect_patches(
    data: Patches,
    method: str,
    settings: SegmentationSettings,
    generators: Mapping[str, nn.Module] | None = None,
) -> FloatArray:
    """Return the images of ``data`` as a site would store them in 8 bits: protected, rounded, within the budget."""
    said = None if generators is None else answers(generators, data.images)
    delta = get_segmentation(method).perturb(keyed(data), said, settings)
    return stored_steps(data.images, delta, settings.epsilon)
