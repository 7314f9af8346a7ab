"""Model and noise take turns: the outer loop of every min-min method (EM: arXiv 2101.04898, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from medveil.models.methods.base import Batch, CoTraining, IntArray, Progress, ProgressCallback, Settings
from medveil.models.methods.oracle import FloatArray, TrainableOracle
from medveil.models.methods.randomness import generator_for
from medveil.models.methods.targets import one_hot

__all__ = ["alternate", "mini_batches"]

# An image whose true class has more than half the probability is classified rightly, whatever K.
_SURELY_RIGHT_BELOW = math.log(2)


def alternate(
    batch: Batch,
    oracle: TrainableOracle,
    settings: Settings,
    training: CoTraining,
    perturb: Callable[[FloatArray], FloatArray],
    progress: ProgressCallback | None = None,
    view: Callable[[FloatArray, FloatArray], FloatArray] = lambda images, _targets: images,
) -> FloatArray:
    """Train a little, perturb, and again, until the surrogate's error is small *and* enough rounds are made.

    Args:
        batch: the whole set.
        oracle: trained in place by ``train_step``; while ``perturb`` runs its model stands still.
        settings: gives the seed.
        training: the lengths of the turns and the stop rule.
        perturb: the noise's turn: the noise of the whole set, ``(N, C' or C, H, W)``, from the last one.
        progress: called after every round; may raise to cancel.
        view: how a mini-batch (images, targets) is presented to the model in training (REM attacks it first).

    Returns:
        The noise after the last round, of ``perturb``'s shape.
    """
    targets = one_hot(batch.labels, oracle.classes)
    delta = np.zeros_like(batch.images[:, :1])
    stream = mini_batches(len(batch), training.batch_size, generator_for(b"", settings.seed, "mini-batches"))
    for round_ in range(1, training.rounds_max + 1):
        for _ in range(training.batches_per_round):
            index = next(stream)
            oracle.train_step(view((batch.images + delta)[index], targets[index]), targets[index])
        delta = perturb(delta)
        losses, _ = oracle.loss_and_gradient(batch.images + delta, targets)
        error = float(np.mean(losses >= _SURELY_RIGHT_BELOW))
        if progress is not None:
            loss = float(losses.mean())
            progress(Progress(round=round_, rounds_max=training.rounds_max, loss=loss, error=error))
        if round_ >= training.rounds_min and error <= training.error_target:
            break
    return delta


def mini_batches(count: int, size: int, rng: np.random.Generator) -> Iterator[IntArray]:
    """Yield index arrays for ever, each pass over ``count`` images in a new order.

    A pass is cut into equal parts of ``size`` images and a little more: none is dropped (published code
    dropped the last ``count mod size``), and no part is left with a single image, which batch norm could not
    take.
    """
    parts = max(1, count // size)
    while True:
        yield from np.array_split(rng.permutation(count), parts)
