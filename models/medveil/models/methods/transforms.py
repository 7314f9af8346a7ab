"""What happens to an image between its release and a model's input: steps that noise must survive.

A transform maps images to images and pulls a gradient back (its adjoint). Put between the noise and the
surrogate (``TransformedOracle``), the noise is made at the image's native resolution for the model that will
see it resized.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medveil.models.errors import ConfigurationError
from medveil.models.methods.oracle import FloatArray, GradientOracle

__all__ = [
    "Blur",
    "Channels",
    "Compose",
    "Flip",
    "Resize",
    "Shift",
    "Transform",
    "TransformedOracle",
]

Shape = tuple[int, ...]

# Rec. 601 luma, as Pillow's convert("L") and most viewers weigh red, green and blue.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[None, :, None, None]

# Filter matrices kept: a descent asks for the same few at every step.
_MATRICES = 64


class Transform(Protocol):
    """A step on images that can be differentiated. Images do not influence each other."""

    def source_shape(self, shape: Shape) -> Shape:
        """Return the shape ``(C, H, W)`` that goes in when ``shape`` comes out."""
        ...

    def apply(self, images: FloatArray) -> FloatArray:
        """Return the transformed images, ``(N, *shape)``, from ``(N, *source_shape(shape))``."""
        ...

    def adjoint(self, gradient: FloatArray, images: FloatArray) -> FloatArray:
        """Return the gradient by ``images``, from the one by ``apply(images)``."""
        ...


@dataclass(frozen=True)
class Resize:
    """Antialiased bilinear resize of ``(rows, columns)``: the weights of Pillow's ``BILINEAR``.

    Separable: y = A x B^T with one matrix per axis; the adjoint is A^T g B, exactly.
    """

    from_shape: tuple[int, int]
    to_shape: tuple[int, int]

    def __post_init__(self) -> None:
        if min(*self.from_shape, *self.to_shape) < 1:
            raise ConfigurationError("setting", "An image side must be at least one pixel.")

    def source_shape(self, shape: Shape) -> Shape:
        """Return ``shape`` with the sides of ``from_shape``."""
        return (shape[0], *self.from_shape)

    def apply(self, images: FloatArray) -> FloatArray:
        """Return ``images`` (N, C, *from_shape) at ``to_shape``."""
        rows, columns = self._matrices()
        return _separably(rows, images, columns)

    def adjoint(self, gradient: FloatArray, images: FloatArray) -> FloatArray:
        """Return the gradient at ``from_shape``; ``images`` are not needed, the map is linear."""
        rows, columns = self._matrices()
        return _separably(rows.T, gradient, columns.T)

    def _matrices(self) -> tuple[FloatArray, FloatArray]:
        return (
            _bilinear(self.from_shape[0], self.to_shape[0]),
            _bilinear(self.from_shape[1], self.to_shape[1]),
        )


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of ``sigma`` pixels; outside the image its edge is repeated."""

    sigma: float

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ConfigurationError("setting", "The blur's sigma must be above 0 pixels.")

    def source_shape(self, shape: Shape) -> Shape:
        """Return ``shape``: a blur keeps it."""
        return shape

    def apply(self, images: FloatArray) -> FloatArray:
        """Return ``images`` (N, C, H, W) blurred."""
        rows, columns = (_gaussian(side, self.sigma) for side in images.shape[2:])
        return _separably(rows, images, columns)

    def adjoint(self, gradient: FloatArray, images: FloatArray) -> FloatArray:
        """Return the gradient before the blur."""
        rows, columns = (_gaussian(side, self.sigma) for side in gradient.shape[2:])
        return _separably(rows.T, gradient, columns.T)


@dataclass(frozen=True)
class Shift:
    """Move by whole pixels, down and to the right; what comes in is 0, what leaves is gone."""

    rows: int
    columns: int

    def source_shape(self, shape: Shape) -> Shape:
        """Return ``shape``: a shift keeps it."""
        return shape

    def apply(self, images: FloatArray) -> FloatArray:
        """Return ``images`` (N, C, H, W) moved."""
        return _moved(images, self.rows, self.columns)

    def adjoint(self, gradient: FloatArray, images: FloatArray) -> FloatArray:
        """Return the gradient moved back."""
        return _moved(gradient, -self.rows, -self.columns)


@dataclass(frozen=True)
class Flip:
    """Mirror left and right."""

    def source_shape(self, shape: Shape) -> Shape:
        """Return ``shape``: a flip keeps it."""
        return shape

    def apply(self, images: FloatArray) -> FloatArray:
        """Return ``images`` (N, C, H, W) mirrored."""
        return np.ascontiguousarray(images[..., ::-1])

    def adjoint(self, gradient: FloatArray, images: FloatArray) -> FloatArray:
        """Return the gradient mirrored back."""
        return np.ascontiguousarray(gradient[..., ::-1])


@dataclass(frozen=True)
class Channels:
    """Fit the channels to the model: grey to RGB by repetition, RGB to grey by luma."""

    from_channels: int
    to_channels: int

    def __post_init__(self) -> None:
        if (self.from_channels, self.to_channels) not in {(1, 3), (3, 1)}:
            raise ConfigurationError("setting", "Channels can go from 1 to 3 or from 3 to 1.")

    def source_shape(self, shape: Shape) -> Shape:
        """Return ``shape`` with ``from_channels``."""
        return (self.from_channels, *shape[1:])

    def apply(self, images: FloatArray) -> FloatArray:
        """Return ``images`` (N, from_channels, H, W) with ``to_channels``."""
        if self.to_channels == 3:
            return np.repeat(images, 3, axis=1)
        return _channel_sum(images * _LUMA)

    def adjoint(self, gradient: FloatArray, images: FloatArray) -> FloatArray:
        """Return the gradient by the original channels."""
        if self.to_channels == 3:
            return _channel_sum(gradient)
        return np.multiply(gradient, _LUMA)


class Compose:
    """Several transforms, the first one first."""

    def __init__(self, *transforms: Transform) -> None:
        self._transforms = transforms

    def source_shape(self, shape: Shape) -> Shape:
        """Return the shape that goes into the first transform when ``shape`` leaves the last."""
        for transform in reversed(self._transforms):
            shape = transform.source_shape(shape)
        return shape

    def apply(self, images: FloatArray) -> FloatArray:
        """Return ``images`` after every transform."""
        for transform in self._transforms:
            images = transform.apply(images)
        return images

    def adjoint(self, gradient: FloatArray, images: FloatArray) -> FloatArray:
        """Return the gradient before the first transform."""
        seen = []
        for transform in self._transforms:
            seen.append(images)
            images = transform.apply(images)
        for transform, before in zip(reversed(self._transforms), reversed(seen), strict=True):
            gradient = transform.adjoint(gradient, before)
        return gradient


class TransformedOracle:
    """An oracle asked about images before a transform: at native resolution, say, for a 28-pixel model."""

    def __init__(self, oracle: GradientOracle, transform: Transform) -> None:
        self._oracle = oracle
        self._transform = transform

    @property
    def input_shape(self) -> Shape:
        """Shape of one image before the transform."""
        return tuple(self._transform.source_shape(tuple(self._oracle.input_shape)))

    @property
    def classes(self) -> int:
        """Number of classes of the model behind it."""
        return self._oracle.classes

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the losses of the transformed images, and the gradient by the images before."""
        losses, gradient = self._oracle.loss_and_gradient(self._transform.apply(images), targets)
        return losses, self._transform.adjoint(gradient, images)


def _channel_sum(images: FloatArray) -> FloatArray:
    total: FloatArray = images.sum(axis=1, keepdims=True)
    return total


def _separably(rows: FloatArray, images: FloatArray, columns: FloatArray) -> FloatArray:
    """Return ``rows @ image @ columns.T`` for every channel of every image, each on its own."""
    transformed: FloatArray = np.matmul(np.matmul(rows, images), columns.T)
    return transformed


@lru_cache(maxsize=_MATRICES)
def _bilinear(source: int, target: int) -> FloatArray:
    """Return the ``(target, source)`` matrix of a triangle filter as wide as the reduction; rows sum to 1.

    As in Pillow's ``Resample.c``: the filter is centred on the output pixel's centre, and widened by the
    reduction so that nothing is skipped; enlarging interpolates linearly.
    """
    scale = source / target
    support = max(scale, 1.0)
    weights = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * scale
        first = max(0, int(centre - support + 0.5))
        last = min(source, int(centre + support + 0.5))
        distance = np.abs((np.arange(first, last) + 0.5 - centre) / support)
        weights[i, first:last] = np.maximum(0, 1 - distance)
    weights /= weights.sum(axis=1, keepdims=True)
    return _frozen(weights)


# Beyond four sigma a Gaussian holds 6e-5 of its weight: below half a grey level of 8 bits.
_GAUSSIAN_REACH = 4.0


@lru_cache(maxsize=_MATRICES)
def _gaussian(side: int, sigma: float) -> FloatArray:
    """Return the ``(side, side)`` matrix of a Gaussian filter; weight beyond an edge falls on the edge."""
    reach = max(1, round(_GAUSSIAN_REACH * sigma))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * np.square(offsets / sigma))
    kernel /= kernel.sum()
    weights = np.zeros((side, side))
    for i in range(side):
        np.add.at(weights[i], np.clip(i + offsets, 0, side - 1), kernel)
    return _frozen(weights)


def _frozen(weights: npt.NDArray[np.float64]) -> FloatArray:
    """Return the matrix as float32, read-only, because it is kept for the next call."""
    matrix = weights.astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def _moved(images: FloatArray, down: int, right: int) -> FloatArray:
    rows, columns = images.shape[2:]
    moved = np.zeros_like(images)
    if abs(down) < rows and abs(right) < columns:
        moved[..., _to(down, rows), _to(right, columns)] = images[..., _to(-down, rows), _to(-right, columns)]
    return moved


def _to(move: int, side: int) -> slice:
    """Return where along an axis the pixels lie that a ``move`` brings."""
    return slice(max(0, move), side + min(0, move))
