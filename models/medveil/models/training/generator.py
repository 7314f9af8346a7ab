"""Distil the optimiser into a generator: learn, on public images, to do in one pass what PGD does in twenty.

    min_G  mean_i  sum_f CE( f( clip01( x_i + eps * M_i * sign(P_i) ) ), pi(y_i) )  +  w * imitation
    P_i, S_i = G(x_i, pi(y_i))

f are the frozen surrogates, M_i the k pixels of largest score S_i: the objective of SALM's frozen form
(`medveil.models.methods.salm`), its inner minimisation amortised over the images. Sign and mask are the site's exact
ones, so what is trained is what is released; their gradients are those of P and S (straight-through, Bengio et al.,
arXiv 1308.3432). The imitation term pulls mask and signs towards the noise that the optimiser made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from medveil.models.errors import ConfigurationError, InputError, RefusedError
from medveil.models.export.onnx import IMAGE, OPSET, bare, quiet
from medveil.models.methods.base import Settings
from medveil.models.methods.masks import pixel_count
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.targets import one_hot, permutation_for
from medveil.models.nets.generator import NoiseGenerator
from medveil.models.training.fit import Examples, balanced_order, learning_rate
from medveil.models.training.oracle import summed_loss

__all__ = ["PERTURBATION", "TARGET", "GeneratorSettings", "generate", "generator_to_onnx", "train_generator"]

TARGET = "target"
PERTURBATION = "perturbation"

_GRADIENT_CLIP = (
    5.0  # EM's value (arXiv 2101.04898); here against straight-through gradients of the first steps
)
_EVALUATION_BATCH = 256
# float32 sessions agree with torch to about 1e-6; a graph that is off by more is another function.
_TOLERANCE = 1e-4
_CHECK_BATCHES = (1, 3)


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """How a generator learns.

    Attributes:
        epochs: passes over the public images.
        batch_size: images per step.
        rate: peak learning rate of AdamW.
        width: of the U-Net.
        imitation: weight w of the imitation term; needs the optimiser's noise when above 0.
    """

    epochs: int = 20
    batch_size: int = 64
    rate: float = 3e-3
    width: int = 12
    imitation: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.rate <= 0 or self.width < 1 or self.imitation < 0:
            raise ConfigurationError("setting", "A setting of the noise generator is out of range.")


def train_generator(
    surrogates: Sequence[nn.Module],
    data: Examples,
    noise: Settings,
    settings: GeneratorSettings,
    *,
    seed: int,
    teacher: FloatArray | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> NoiseGenerator:
    """Train a generator on public images against frozen surrogates.

    Args:
        surrogates: ``(N, C, H, W)`` to logits; put into evaluation mode, their weights frozen.
        data: public images.
        noise: gives epsilon, mask_ratio and permutation.
        settings: of the training.
        seed: weights and order of the images.
        teacher: the optimiser's noise for the same images, ``(N, C, H, W)``.
        on_epoch: told each finished epoch, from 1, and its mean loss.

    Raises:
        ConfigurationError: "setting", "permutation", "teacher-missing".
        InputError: "degenerate-generator": the loss is no longer a number.
    """
    if not surrogates:
        raise ConfigurationError("setting", "A generator needs at least one surrogate to learn from.")
    if settings.imitation and (teacher is None or teacher.shape != data.images.shape):
        raise ConfigurationError("teacher-missing", "Imitation needs the optimiser's noise for every image.")
    for surrogate in surrogates:
        surrogate.eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NoiseGenerator(data.images.shape[1], data.classes, settings.width)
    aims = one_hot(permutation_for(noise.permutation, data.classes)[data.labels], data.classes)
    count = pixel_count(noise.mask_ratio, *data.images.shape[2:])
    optimiser = torch.optim.AdamW(net.parameters(), settings.rate)
    rng = np.random.default_rng(seed)
    parts = max(1, len(data) // settings.batch_size)
    step = 0
    for epoch in range(1, settings.epochs + 1):
        net.train()
        total, seen = 0.0, 0
        for index in np.array_split(balanced_order(data.labels, rng), parts):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(settings.rate, step, settings.epochs * parts)
            step += 1
            images, target = torch.from_numpy(data.images[index]), torch.from_numpy(aims[index])
            pattern, score = net(images, target)
            released = (images + noise.epsilon * _top(score, count) * _sign(pattern)).clamp(0, 1)
            loss = torch.stack([summed_loss(f(released), target).mean() for f in surrogates]).sum()
            if settings.imitation and teacher is not None:
                loss = loss + settings.imitation * _imitation(
                    pattern, score, torch.from_numpy(teacher[index])
                )
            if not torch.isfinite(loss):
                raise InputError(
                    "degenerate-generator", "The noise generator's training diverged; lower its rate."
                )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), _GRADIENT_CLIP)
            optimiser.step()
            total, seen = total + float(loss.detach()) * len(index), seen + len(index)
        if on_epoch is not None:
            on_epoch(epoch, total / seen)
    return net.eval()


def _sign(pattern: Tensor) -> Tensor:
    """Return the sign; its gradient is the pattern's."""
    return pattern + (pattern.sign() - pattern).detach()


def _top(score: Tensor, count: int) -> Tensor:
    """Return the mask of each image's ``count`` best pixels, ``(N, 1, H, W)``; its gradient is the score's."""
    flat = score.flatten(1)
    mask = torch.zeros_like(flat).scatter_(1, flat.detach().topk(count, dim=1).indices, 1.0)
    return score + (mask.view_as(score) - score).detach()


def _imitation(pattern: Tensor, score: Tensor, teacher: Tensor) -> Tensor:
    """Return how far mask and signs are from the optimiser's, in nats and squared shares of epsilon."""
    inside = (teacher != 0).any(1, keepdim=True).float()
    apart = (pattern - teacher.sign()).square() * inside
    return F.binary_cross_entropy(score, inside) + apart.sum() / inside.sum().clamp(min=1)


@torch.no_grad()
def generate(net: NoiseGenerator, images: FloatArray, targets: FloatArray) -> FloatArray:
    """Return pattern times score, ``(N, C, H, W)``: what the exported graph answers.

    `medveil.models.methods.generated.from_perturbation` makes noise of it.
    """
    net.eval()
    chunks = zip(
        torch.from_numpy(images).split(_EVALUATION_BATCH),
        torch.from_numpy(targets).split(_EVALUATION_BATCH),
        strict=True,
    )
    return np.concatenate([np.asarray(_Folded(net)(*chunk).numpy(), np.float32) for chunk in chunks])


class _Folded(nn.Module):
    """Both outputs in one, as bundles carry them: the score is positive, so sign and order both survive."""

    def __init__(self, net: NoiseGenerator) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        pattern, score = self.net(image, target)
        return torch.as_tensor(pattern * score)


def generator_to_onnx(net: NoiseGenerator, input_shape: tuple[int, ...], classes: int) -> bytes:
    """Return the generator as ONNX bytes, checked in onnxruntime against torch.

    Inputs ``image`` ``(N, *input_shape)`` and ``target`` ``(N, classes)``, output ``perturbation`` like the image:
    what admission takes in the role "generator".

    Raises:
        RefusedError: "export": onnxruntime computes something else than torch.
    """
    folded = _Folded(net).eval()
    batch = torch.export.Dim("batch")
    with quiet():
        program = torch.onnx.export(
            folded,
            (torch.zeros(2, *input_shape), torch.zeros(2, classes)),
            input_names=[IMAGE, TARGET],
            output_names=[PERTURBATION],
            dynamic_shapes=({0: batch}, {0: batch}),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # noqa: S101 (torch's signature: None only when it writes a file itself)
    model = bare(program.model_proto, name="generator")
    _check(model, folded, input_shape, classes)
    return bytes(model.SerializeToString(deterministic=True))


def _check(model: onnx.ModelProto, net: nn.Module, input_shape: tuple[int, ...], classes: int) -> None:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for batch in _CHECK_BATCHES:
        images = rng.random((batch, *input_shape), np.float32)
        targets = one_hot(rng.integers(classes, size=batch), classes)
        (answered,) = session.run([PERTURBATION], {IMAGE: images, TARGET: targets})
        with torch.no_grad():
            expected = net(torch.from_numpy(images), torch.from_numpy(targets)).numpy()
        if not np.allclose(answered, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise RefusedError("export", "The exported graph does not compute what the generator computes.")
