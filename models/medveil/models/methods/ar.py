"""AR: autoregressive poisoning (Sandoval-Segura et al., NeurIPS 2022, arXiv 2206.03693).

    d[i, j] = sum of beta * d over the 8 values before it in a 3x3 window          one beta per class

Each class has its own linear recurrence; an image's noise is that recurrence run from a start that its key
draws. Different images of a class differ pixel by pixel, yet one small filter predicts them all. Needs no
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from medveil.models.errors import ConfigurationError
from medveil.models.methods import masks
from medveil.models.methods.base import Batch, BoolArray, Method, MethodInfo, Settings
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import Budget
from medveil.models.methods.randomness import generator_for

__all__ = ["METHOD", "ArSettings", "coefficients", "pattern"]

DoubleArray = npt.NDArray[np.float64]

# Values of a 3x3 window before its last: the order of the process.
_ORDER = 8

# The published coefficients of one class overflowed to NaN, and its images came out black. So processes are
# drawn until one neither grows nor fades by more than this across a field of this side; a growth of 10 in 64
# pixels is still far from overflow (1e308) at 4,000.
_STEADY = 10.0
_PROBE_SIDE = 64
_DRAWS_AT_ONCE = 64
_MAX_ROUNDS = 50

# Coefficients kept for the next batch; finding them costs more than using them.
_CLASSES_KEPT = 256


@dataclass(frozen=True, kw_only=True)
class ArSettings(Settings):
    """Settings of AR; the defaults are the authors'.

    Attributes:
        rms: root mean square of the noise before epsilon cuts it, fraction of [0, 1]: an L2 of 1 on 3x32x32.
        crop: rows and columns of the start that are cut away.
    """

    rms: float = 1 / (3 * 32 * 32) ** 0.5
    crop: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rms <= 0 or self.crop < 2:
            raise ConfigurationError("setting", "AR needs an rms above 0 and a crop of at least 2 pixels.")


def pattern(batch: Batch, settings: ArSettings) -> FloatArray:
    """Return each image's run of its class's process, cut to the budget."""
    weight = masks.weights(batch, settings, None, default="texture")
    budget = Budget.of(batch.images, settings, weight, room=batch.room)
    channels, rows, columns = budget.low.shape[1:]
    size = (channels, rows + settings.crop, columns + settings.crop)
    delta = budget.zeros()
    for label in np.unique(batch.labels):
        members = np.flatnonzero(batch.labels == label)
        starts = [generator_for(batch.keys[i], settings.seed, "ar").standard_normal(size) for i in members]
        betas = coefficients(int(label), channels, settings.seed)
        runs = _run(np.stack(starts), betas)[..., settings.crop :, settings.crop :]
        rms = np.sqrt(np.square(runs).reshape(len(runs), -1).mean(axis=1))[:, None, None, None]
        delta[members] = runs * (settings.rms / rms)
    return budget.project(delta)


@lru_cache(maxsize=_CLASSES_KEPT)
def coefficients(label: int, channels: int, seed: int) -> DoubleArray:
    """Return a class's coefficients ``(channels, 8)``, in the order of the window's rows; each row sums to 1.

    Drawn until the process neither grows nor fades across an image.

    Raises:
        ConfigurationError: "setting": no steady process was found (another seed will do).
    """
    rng = generator_for(b"", seed, f"ar-class-{label}")
    found = np.empty((0, _ORDER))
    for _ in range(_MAX_ROUNDS):
        betas = rng.standard_normal((_DRAWS_AT_ONCE, _ORDER))
        betas /= betas.sum(axis=1, keepdims=True)
        start = rng.standard_normal((1, _DRAWS_AT_ONCE, _PROBE_SIDE, _PROBE_SIDE))
        found = np.concatenate([found, betas[_is_steady(start, betas)]])
        if len(found) >= channels:
            found = found[:channels]
            found.setflags(write=False)
            return found
    raise ConfigurationError("setting", "No steady autoregressive process was found: choose another seed.")


def _run(start: DoubleArray, betas: DoubleArray) -> DoubleArray:
    """Return the fields ``(N, C, H, W)`` that follow from the first two rows and columns of ``start``.

    Args:
        start: ``(N, C, H, W)``.
        betas: ``(C, 8)``, one process per channel.
    """
    field = start.copy()
    for row in range(2, field.shape[2]):
        for column in range(2, field.shape[3]):
            window = field[:, :, row - 2 : row + 1, column - 2 : column + 1]
            before = window.reshape(*field.shape[:2], 9)[..., :_ORDER]
            field[:, :, row, column] = (before * betas).sum(axis=-1)
    return field


def _is_steady(start: DoubleArray, betas: DoubleArray) -> BoolArray:
    """Return, per process ``(C,)``, whether the last quarter of its field is of the first quarter's size."""
    quarter = start.shape[2] // 4
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is what is looked for
        field = _run(start, betas)[0]
        first, last = (
            np.sqrt(np.square(part).mean(axis=(1, 2)))
            for part in (field[:, :quarter, :quarter], field[:, -quarter:, -quarter:])
        )
        ratio = last / first
    steady: BoolArray = (ratio > 1 / _STEADY) & (ratio < _STEADY)
    return steady


METHOD = Method(
    info=MethodInfo(name="ar", title="AR (autoregressive poisoning)", source="arXiv 2206.03693"),
    settings=ArSettings,
    pattern=pattern,
)
