"""A job on an analytic surrogate (a linear classifier with a closed gradient): no bundle, no onnxruntime.

Loaded by `conftest.py`, and run as a program by the tests that kill a real process:

    python analytic_job.py SOURCE OUT [delay_s]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

from medveil.agent.budget import Budget
from medveil.agent.imageio import ImageFormat, Taxonomy, raster_formats
from medveil.agent.perturb import Perturber
from medveil.agent.protect import Job, protect
from medveil.agent.sealing import load_site_key
from medveil.models.methods import SalmSettings, get
from medveil.models.methods.oracle import FloatArray

CLASSES = ("normal", "pneumonia")


class LinearOracle:
    """Softmax over one fixed random filter per class; each image is computed on its own."""

    def __init__(self, shape: tuple[int, ...] = (1, 8, 8), delay_s: float = 0.0) -> None:
        self._shape = shape
        self._weights = np.random.default_rng(7).normal(size=(len(CLASSES), *shape)).astype(np.float32)
        self._delay_s = delay_s
        self.images_seen = 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def classes(self) -> int:
        return len(CLASSES)

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        time.sleep(self._delay_s)
        self.images_seen += len(images)
        losses, gradients = np.empty(len(images), np.float32), np.empty_like(images)
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            logits = (self._weights * image).sum(axis=(1, 2, 3))
            share = np.exp(logits - logits.max())
            share /= share.sum()
            losses[i] = -(target * np.log(share + 1e-9)).sum()
            gradients[i] = np.tensordot(share - target, self._weights, 1)
        return losses, gradients


def make_job(
    source: Path,
    out: Path,
    *,
    epsilon: float = 8.0,
    mask: float = 0.3,
    oracle: LinearOracle | None = None,
    formats: Sequence[ImageFormat] | None = None,
    **changes: object,
) -> Job:
    """Return a job for two classes stored as 0 and 1."""
    settings = SalmSettings(epsilon=epsilon / 255, mask_ratio=mask, steps=3, step_size=0.5, warmup_steps=2)
    job = Job(
        source=source,
        release=out,
        private=None,
        labels_file=None,
        formats=tuple(formats or raster_formats()),
        allows_format=lambda name: True,
        taxonomy=Taxonomy(CLASSES, (0, 1)),
        perturber=Perturber(get("salm"), settings, oracle or LinearOracle()),
        budget=Budget(epsilon, mask),
        minimum_psnr_db=20.0,
        recipients=(load_site_key(create=True).recipient,),
        settings={"epsilon": epsilon, "mask": mask},
        begun=datetime(2026, 11, 21, 12, 0, 0),
        invocation={},
    )
    return replace(job, **changes)  # type: ignore[arg-type]


if __name__ == "__main__":
    delay_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    protect(make_job(Path(sys.argv[1]), Path(sys.argv[2]), oracle=LinearOracle(delay_s=delay_s)))
