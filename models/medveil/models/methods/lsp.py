"""LSP: linearly separable patches (Yu et al., KDD 2022, arXiv 2111.00898).

Noise that a linear model can tell apart by class is a shortcut: models learn it and stop. Needs no model:
each image gets one value per patch, drawn around its class's corner of a hypercube, as scikit-learn's
``make_classification`` does (here with unit covariance, our simplification).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medveil.models.errors import ConfigurationError
from medveil.models.methods import masks
from medveil.models.methods.base import Batch, Method, MethodInfo, Settings
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import Budget
from medveil.models.methods.randomness import generator_for

__all__ = ["METHOD", "LspSettings", "pattern"]


@dataclass(frozen=True, kw_only=True)
class LspSettings(Settings):
    """Settings of LSP; the defaults are the authors'.

    Attributes:
        patch: side of a patch, in pixels.
        separation: half the side of the hypercube, in standard deviations of a class.
        rms: root mean square of the noise before epsilon cuts it, fraction of [0, 1] (an L2 of sqrt(d) *
            6/255; single values then pass 8/255, which the budget does not allow).
    """

    patch: int = 8
    separation: float = 10.0
    rms: float = 6 / 255

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch < 1 or self.separation <= 0 or self.rms <= 0:
            raise ConfigurationError(
                "setting", "LSP needs a patch of 1 pixel or more, separation and rms above 0."
            )


def pattern(batch: Batch, settings: LspSettings) -> FloatArray:
    """Return each image's patches: its class's corner plus what its key draws, cut to the budget."""
    weight = masks.weights(batch, settings, None, default="texture")
    budget = Budget.of(batch.images, settings, weight, room=batch.room)
    channels, rows, columns = budget.low.shape[1:]
    grid = (channels, -(-rows // settings.patch), -(-columns // settings.patch))
    corners = _corners(int(batch.labels.max(initial=-1)) + 1, grid, settings.seed)
    delta = budget.zeros()
    for i, (key, label) in enumerate(zip(batch.keys, batch.labels, strict=True)):
        spread = generator_for(key, settings.seed, "lsp").standard_normal(grid)
        values = settings.separation * corners[label] + spread
        tiles = values.repeat(settings.patch, axis=1).repeat(settings.patch, axis=2)[:, :rows, :columns]
        delta[i] = tiles * (settings.rms / np.sqrt(np.square(tiles).mean()))
    return budget.project(delta)


def _corners(classes: int, grid: tuple[int, ...], seed: int) -> list[FloatArray]:
    """Return one corner of the hypercube (+-1) per class, all different, in the order of the classes."""
    if classes > 2 ** min(62, int(np.prod(grid))):
        raise ConfigurationError("setting", "The patches are too large to tell so many classes apart.")
    rng = generator_for(b"", seed, "lsp-corners")
    corners: list[FloatArray] = []
    while len(corners) < classes:  # ends: there are at least as many corners as classes
        corner = rng.choice(np.array([-1, 1], np.float32), grid)
        if not any(np.array_equal(corner, other) for other in corners):
            corners.append(corner)
    return corners


METHOD = Method(
    info=MethodInfo(name="lsp", title="LSP (linearly separable patches)", source="arXiv 2111.00898"),
    settings=LspSettings,
    pattern=pattern,
)
