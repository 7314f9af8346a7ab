"""Let a bundle's surrogates learn a little from the site's own images before they make its noise. Off by default.

The coordinator's surrogates know public images. Where a site's images look different, a short fine-tuning in
onnxruntime brings them closer, and the weights stay at the site. What it is worth is measured in
``bench/adaptation.py``: every site that does it makes its noise with surrogates of its own, and noise of unlike
surrogates protects worse together (DESIGN 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medveil.agent.engine import DeviceChoice, TrainingSettings, open_trainable, prove
from medveil.models.autodiff.selfcheck import GoldenVector
from medveil.models.errors import ConfigurationError
from medveil.models.methods.oracle import EnsembleOracle, FloatArray, GradientOracle

__all__ = ["AdaptationSettings", "adapted_oracle"]

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """How far surrogates may move.

    Attributes:
        steps: of stochastic gradient descent.
        batch_size: images per step, every class as likely as any other.
        learning_rate: a fifth of the victims' own: bundles carry graphs with batch norms folded into their
            convolutions, which large steps throw off balance.
        seed: of the draw of batches.
    """

    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 0.01
    seed: int = 0


def adapted_oracle(
    graphs: Sequence[tuple[str, bytes, GoldenVector | None]],
    images: FloatArray,
    labels: Labels,
    settings: AdaptationSettings,
    *,
    device: DeviceChoice = "auto",
    threads: int,
    memory_budget_bytes: int,
) -> GradientOracle:
    """Open a bundle's surrogates, let each learn from the site's images, prove each again, and return them as one.

    The same images, settings and machine give the same bits, whatever ``threads`` is.

    Args:
        graphs: name, received bytes and golden vector of each surrogate, as `open_oracle` takes them.
        images: ``(N, C, rows, columns)`` float32 in [0, 1], clean, of the surrogates' size.
        labels: ``(N,)`` class index of the bundle's taxonomy.
        settings: how far.
        device: as `open_oracle`.
        threads: as `open_oracle`.
        memory_budget_bytes: for all sessions together.

    Raises:
        ConfigurationError: ``adaptation-images``: fewer than one batch, or one class only.
        AdmissionError, SelfTestError: as `open_trainable`; ``non-finite`` when training diverged.
    """
    members = {int(index): np.flatnonzero(labels == index) for index in np.unique(labels)}
    if len(labels) < settings.batch_size or len(members) < 2:
        raise ConfigurationError(
            "adaptation-images",
            f"Local adaptation needs at least {settings.batch_size} images of two classes; switch it off.",
        )
    adapted = []
    for number, (name, data, golden) in enumerate(graphs):
        surrogate = open_trainable(
            name,
            data,
            golden,
            device=device,
            threads=threads,
            memory_budget_bytes=memory_budget_bytes // len(graphs),
            training=TrainingSettings(learning_rate=settings.learning_rate),
        )
        targets = np.eye(surrogate.classes, dtype=np.float32)[labels]
        rng = np.random.default_rng((settings.seed, number))
        for _ in range(settings.steps):
            classes = rng.choice(list(members), settings.batch_size)
            batch = np.array([rng.choice(members[index]) for index in classes])
            surrogate.train_step(images[batch], targets[batch])
        frozen = surrogate.freeze()
        prove(frozen, None)
        adapted.append(frozen)
    return EnsembleOracle(adapted)
