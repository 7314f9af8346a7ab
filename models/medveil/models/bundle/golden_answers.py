"""What a noise generator answers to known images: signed at the coordinator, asked again at the site.

A site bounds whatever a generator says, so a wrong answer breaks no budget. It makes noise that protects from
nothing, and nobody would see it: a runtime that computes something else is refused before the first image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from medveil.models.autodiff.selfcheck import LARGEST_RTOL, norms
from medveil.models.errors import SelfTestError
from medveil.models.methods.oracle import FloatArray

__all__ = ["Answering", "GoldenAnswers", "check_answers"]


class Answering(Protocol):
    """A generator that needs nothing but the image."""

    def perturbation(self, images: FloatArray, targets: FloatArray | None = None) -> FloatArray:
        """Return answers of the images' shape."""
        ...


@dataclass(frozen=True, eq=False)
class GoldenAnswers:
    """Images and what the generator's trainer computed for them.

    Attributes:
        images: ``(N, C, [slices,] rows, columns)`` float32 in [0, 1]; public, for they travel with the bundle.
        answers: likewise, what the generator says.
        rtol: largest relative L2 distance, per image, between a session's answer and ``answers``.

    Raises:
        SelfTestError: "golden-vector": shapes, types or values that every session would pass, or none.
    """

    images: FloatArray
    answers: FloatArray
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        both = (self.images, self.answers)
        sound = (
            len(self.images) > 0
            and self.images.shape == self.answers.shape
            and all(array.dtype == np.float32 and np.isfinite(array).all() for array in both)
            and 0 < self.rtol <= LARGEST_RTOL
            and bool((norms(self.answers) > 0).all())
        )
        if not sound:
            raise SelfTestError(
                "golden-vector", "The bundle's golden answers prove nothing; build the bundle again."
            )


def check_answers(generator: Answering, golden: GoldenAnswers, *, name: str) -> None:
    """Check that a session answers as the generator's trainer signed it.

    Args:
        generator: the session to check.
        golden: what the trainer computed.
        name: the graph's name, for the error.

    Raises:
        SelfTestError: "golden": an answer is further off than ``golden.rtol``.
    """
    error = norms(generator.perturbation(golden.images) - golden.answers) / norms(golden.answers)
    if not (error <= golden.rtol).all():  # "not <=" refuses NaN too
        raise SelfTestError(
            "golden",
            f"The noise generator {name!r} answers otherwise here than at the coordinator; do not use this runtime.",
            private=f"relative error {float(error.max()):.2e} above {golden.rtol:.0e}",
        )
