"""What every method takes, gives and says about itself.

A method has up to three forms, by what it must be able to ask:

* ``pattern``    nothing: the noise is drawn from the label and the image's key (LSP, AR);
* ``frozen``     gradients of a finished model: any image at any site, one at a time (SALM, TAP, EM);
* ``cotrained``  a model that is trained while the noise is made: the whole set at once (EM, REM, SALM).

All are pure functions over arrays. A perturbation ``delta`` is signed, float32, ``(N, C, H, W)``, and
``images + delta`` lies in [0, 1]. Rounding to stored integers is the site's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from medveil.models.errors import ConfigurationError, InputError
from medveil.models.methods.oracle import FloatArray, GradientOracle, TrainableOracle

__all__ = [
    "Batch",
    "BoolArray",
    "CoTrainedForm",
    "CoTraining",
    "Colour",
    "FrozenForm",
    "IntArray",
    "MaskScore",
    "Method",
    "MethodInfo",
    "Need",
    "PatternForm",
    "Progress",
    "ProgressCallback",
    "Room",
    "Settings",
    "named",
]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Room = tuple[FloatArray, FloatArray]
Colour = Literal["luma", "channels"]
MaskScore = Literal["accumulated", "gradient", "window", "texture", "lowest", "random"]

# The customary budget of this literature (EM, REM, TAP: arXiv 2101.04898, 2203.14533, 2106.10807).
DEFAULT_EPSILON = 8 / 255


@dataclass(frozen=True, eq=False)
class Batch:
    """Labelled images, and for each the one thing its randomness may come from.

    Attributes:
        images: ``(N, C, H, W)``, float32, in [0, 1] (the release window).
        labels: ``(N,)``, int64, class index from 0.
        keys: one digest of the image's own content per image: never its index, never its label.
        editable: ``(N, 1, H, W)`` bool, False where nothing may change (padding, background); None: anywhere.
        room: how far each value can really go, down and up: two ``(N, C, H, W)`` float32 of units of the range,
            at most 0 and at least 0. A site knows it from stored integers, every release window and padding;
            None: as far as epsilon and [0, 1] allow.

    Raises:
        InputError: "batch-shape" or "batch-range": the arrays do not fit together, or hold NaN or values
            outside [0, 1].
    """

    images: FloatArray
    labels: IntArray
    keys: tuple[bytes, ...]
    editable: BoolArray | None = None
    room: Room | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.float32 or 0 in images.shape[1:]:
            raise InputError("batch-shape", "Images must be float32 of shape (N, channels, rows, columns).")
        if labels.shape != (len(images),) or labels.dtype != np.int64 or (labels < 0).any():
            raise InputError("batch-shape", "Labels must be one non-negative int64 per image.")
        if len(self.keys) != len(images):
            raise InputError("batch-shape", "Every image needs a key of its own.")
        wanted = (len(images), 1, *images.shape[2:])
        if self.editable is not None and (self.editable.shape != wanted or self.editable.dtype != np.bool_):
            raise InputError("batch-shape", "`editable` must be bool of shape (N, 1, rows, columns).")
        if self.room is not None and any(side.shape != images.shape for side in self.room):
            raise InputError("batch-shape", "`room` must be two arrays of the images' shape.")
        # Written so that NaN fails it too: one NaN pixel would spread over the image and come out black.
        if not ((images >= 0) & (images <= 1)).all():
            raise InputError("batch-range", "Every pixel must be finite and lie in [0, 1].")

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, index: IntArray) -> Batch:
        """Return the images at ``index`` (N',), in that order, as a batch of their own."""
        return Batch(
            self.images[index],
            self.labels[index],
            tuple(self.keys[i] for i in index),
            None if self.editable is None else self.editable[index],
            None if self.room is None else (self.room[0][index], self.room[1][index]),
        )


@dataclass(frozen=True, kw_only=True)
class CoTraining:
    """How model and noise take turns (EM: arXiv 2101.04898, Algorithm 1).

    Attributes:
        batches_per_round: SGD steps on the model before each turn of the noise (EM's M = 10).
        batch_size: least number of images per SGD step; a set is split evenly, so no rest is left or dropped.
        rounds_min: rounds made whatever the error says. The error reaches 0 long before the noise protects.
        rounds_max: rounds after which it ends, whatever the error says.
        error_target: surrogate error at which EM stops (0.01 sample-wise).
    """

    batches_per_round: int = 10
    batch_size: int = 128
    rounds_min: int = 8
    rounds_max: int = 20
    error_target: float = 0.01

    def __post_init__(self) -> None:
        _require(self.batches_per_round >= 1, "batches_per_round", "at least 1")
        _require(self.batch_size >= 2, "batch_size", "at least 2 (batch norm needs two images)")
        _require(1 <= self.rounds_min <= self.rounds_max, "rounds_min", "between 1 and rounds_max")
        _require(0 <= self.error_target < 1, "error_target", "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every method can be told. A method with more to say has a subclass beside it.

    Attributes:
        epsilon: largest absolute change of a pixel, as a fraction of the [0, 1] range.
        mask_ratio: share r of an image's pixels that may change, in (0, 1]; ``ceil(r*H*W)`` of them exactly.
        mask_score: what makes a pixel significant (``masks.py``); None: the method's own choice.
        steps: projected gradient steps.
        step_size: length of one step, as a fraction of epsilon.
        warmup_steps: free steps over which the mask's gradients are accumulated.
        permutation: class that each class is pushed towards, ``permutation[label]``; no class may stay
            itself. Fixed by the coordinator and the same at every site, or the noise of the sites cancels.
            None: the next class, ``(label + 1) mod K``.
        seed: together with an image's key, the only source of randomness.
        colour: "luma": the channels of a pixel change together, so that no hue appears; "channels": each on
            its own. The same for grey images.
    """

    epsilon: float = DEFAULT_EPSILON
    mask_ratio: float = 1.0
    mask_score: MaskScore | None = None
    steps: int = 20
    step_size: float = 0.1
    warmup_steps: int = 8
    permutation: tuple[int, ...] | None = None
    seed: int = 0
    colour: Colour = "luma"

    def __post_init__(self) -> None:
        _require(0 < self.epsilon < 1, "epsilon", "a fraction of the [0, 1] range, between 0 and 1")
        _require(0 < self.mask_ratio <= 1, "mask_ratio", "in (0, 1]")
        _require(self.steps >= 1, "steps", "at least 1")
        _require(0 < self.step_size <= 2, "step_size", "in (0, 2] (fractions of epsilon)")
        _require(self.warmup_steps >= 1, "warmup_steps", "at least 1")
        _require(self.seed >= 0, "seed", "0 or more")


def _require(condition: bool, name: str, wanted: str) -> None:
    if not condition:
        raise ConfigurationError("setting", f"The setting `{name}` must be {wanted}.")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a co-training run stands.

    Attributes:
        round: rounds finished, from 1.
        rounds_max: rounds after which it ends in any case.
        loss: mean loss of the surrogate on the protected set, in nats.
        error: upper bound of the surrogate's error on the protected set, in [0, 1]. It says how far training
            is, and nothing about protection: it reached 0 in every measured run, protected or not.
    """

    round: int
    rounds_max: int
    loss: float
    error: float


ProgressCallback = Callable[[Progress], None]
"""Called after every round; what it raises ends the run and reaches the caller: that is how to cancel."""

S = TypeVar("S", bound=Settings)

PatternForm = Callable[[Batch, S], FloatArray]
FrozenForm = Callable[[Batch, GradientOracle, S], FloatArray]
CoTrainedForm = Callable[[Batch, TrainableOracle, S, ProgressCallback | None], FloatArray]


class Need(StrEnum):
    """What a method must be able to ask."""

    NOTHING = "nothing"
    GRADIENT = "gradient"
    TRAINING = "training"


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What a screen says about a method.

    Attributes:
        name: as on the command line.
        title: as people call it.
        source: where it is published (``"arXiv 2403.10573"``), and what of it is ours.
        task: ``"classification"`` or ``"segmentation"``.
        version: raised whenever the same input would give other noise than before; part of a job's identity.
    """

    name: str
    title: str
    source: str
    task: str = "classification"
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class Method(Generic[S]):
    """One method behind the registry: what it is, what it can be told, and its forms."""

    info: MethodInfo
    settings: type[S]
    pattern: PatternForm[S] | None = field(default=None, repr=False)
    frozen: FrozenForm[S] | None = field(default=None, repr=False)
    cotrained: CoTrainedForm[S] | None = field(default=None, repr=False)

    @property
    def needs(self) -> frozenset[Need]:
        """What each of the method's forms must be able to ask; one element per form."""
        forms = {Need.NOTHING: self.pattern, Need.GRADIENT: self.frozen, Need.TRAINING: self.cotrained}
        return frozenset(need for need, form in forms.items() if form is not None)

    def perturb(self, batch: Batch, oracle: GradientOracle | None, settings: S) -> FloatArray:
        """Return the noise of each image, made on a finished model (or on none, for a pattern).

        What an image gets depends on that image, its label, its key, the settings and the oracle only.

        Args:
            batch: the images; they must have the oracle's input shape.
            oracle: may be None when ``needs`` has ``Need.NOTHING``.
            settings: an instance of this method's ``settings`` class.

        Returns:
            ``delta``, ``(N, C, H, W)`` float32.

        Raises:
            ConfigurationError: "no-frozen-form", "oracle-missing", "wrong-settings", "permutation",
                "setting".
            InputError: "batch-shape" (oracle and images differ), "unknown-class", "not-finite".
        """
        self._check_settings(settings)
        if not len(batch):
            return np.zeros_like(batch.images)
        if self.pattern is not None:
            delta = self.pattern(batch, settings)
        elif self.frozen is None:
            raise ConfigurationError(
                "no-frozen-form", f"The method {self.info.name} needs a model that it can train."
            )
        elif oracle is None:
            raise ConfigurationError("oracle-missing", f"The method {self.info.name} needs a surrogate.")
        else:
            _check_fit(batch, oracle)
            delta = self.frozen(batch, oracle, settings)
        return _finished(delta, batch)

    def protect_set(
        self,
        batch: Batch,
        oracle: TrainableOracle,
        settings: S,
        progress: ProgressCallback | None = None,
    ) -> FloatArray:
        """Return the noise of a whole set, made while the oracle's model is trained on it.

        The same set in any order gives the same noise, given an oracle in the same starting state.

        Args:
            batch: the whole set.
            oracle: its model is trained in place.
            settings: an instance of this method's ``settings`` class.
            progress: called after every round; may raise to cancel.

        Returns:
            ``delta``, ``(N, C, H, W)`` float32.

        Raises:
            ConfigurationError: "no-training-form", "wrong-settings", "setting".
            InputError: "batch-shape", "unknown-class", "too-few-images", "not-finite".
        """
        self._check_settings(settings)
        if self.cotrained is None:
            raise ConfigurationError(
                "no-training-form", f"The method {self.info.name} does not train a model: use `perturb`."
            )
        _check_fit(batch, oracle)
        if len(batch) < 2:
            raise InputError("too-few-images", "Co-training needs at least two images.")
        # Sorted by key, so that the order in which files were found cannot change the result.
        order = np.array(sorted(range(len(batch)), key=batch.keys.__getitem__), dtype=np.int64)
        delta = np.empty_like(batch.images)
        delta[order] = self.cotrained(batch.select(order), oracle, settings, progress)
        return _finished(delta, batch)

    def _check_settings(self, settings: S) -> None:
        if not isinstance(settings, self.settings):
            raise ConfigurationError(
                "wrong-settings", f"The method {self.info.name} takes {self.settings.__name__}."
            )


def _check_fit(batch: Batch, oracle: GradientOracle) -> None:
    if batch.images.shape[1:] != tuple(oracle.input_shape):
        raise InputError(
            "batch-shape", "The images do not have the surrogate's input shape: resize in the loop."
        )
    if int(batch.labels.max(initial=0)) >= oracle.classes:
        raise InputError("unknown-class", "A label lies outside the surrogate's classes.")


def _finished(delta: FloatArray, batch: Batch) -> FloatArray:
    """Return ``delta`` for every channel; refuse NaN (published AR noise overflowed: black images)."""
    if not np.isfinite(delta).all():
        raise InputError("not-finite", "The noise of an image is not a number: nothing was protected.")
    return np.broadcast_to(delta, batch.images.shape).astype(np.float32)


Chosen = TypeVar("Chosen")


def named(methods: Mapping[str, Chosen], name: str) -> Chosen:
    """Return the method called ``name``.

    Raises:
        ConfigurationError: "unknown-method"; the sentence lists the names there are.
    """
    try:
        return methods[name]
    except KeyError:
        known = ", ".join(methods)
        raise ConfigurationError(
            "unknown-method", f"There is no such method; choose one of: {known}."
        ) from None
