"""The hospitals of the classification benchmarks: who holds which images, and what their victims are scored by."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["COLUMNS", "SITES", "SPLIT_SEED", "Cohort", "Part", "deal", "kept", "new_parser", "planes"]

SITES = 3
SPLIT_SEED = 20261121

Stored = npt.NDArray[np.uint8]
Images = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Part:
    """Stored 8-bit images ``(N, H, W)`` or ``(N, H, W, 3)`` and their labels, as the file has them."""

    images: Stored
    labels: npt.NDArray[Any]

    def select(self, index: npt.NDArray[np.int64]) -> Part:
        """Return the images at `index`, in that order."""
        return Part(self.images[index], self.labels[index])

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """Class indices ``(N,)``."""
        return self.labels.reshape(-1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Cohort:
    """A training split dealt out, and the test split, which stays clean."""

    public: Part
    sites: tuple[Part, ...]
    test: Part

    @property
    def union(self) -> Part:
        """What all sites hold together."""
        return Part(
            np.concatenate([site.images for site in self.sites]),
            np.concatenate([site.labels for site in self.sites]),
        )


def new_parser(description: str | None, *, quick: bool = True) -> argparse.ArgumentParser:
    """Return a benchmark's command line with what all of them take: the data, a work folder, seeds, a smoke run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="MedMNIST-layout NPZ with train and test splits"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for what is finished, kept over runs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    if quick:
        parser.add_argument(
            "--quick",
            action="store_true",
            help="a smoke run: figures mean nothing, the table stays in --work",
        )
    return parser


def deal(data: Path) -> Cohort:
    """Deal a MedMNIST-layout NPZ out: a third of the training split is public, disjoint sites hold the rest."""
    with np.load(data) as archive:
        train = Part(archive["train_images"], archive["train_labels"])
        test = Part(archive["test_images"], archive["test_labels"])
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train.images))
    public, *sites = order[: len(order) // 3], *np.array_split(order[len(order) // 3 :], SITES)
    return Cohort(train.select(public), tuple(train.select(site) for site in sites), test)


def planes(stored: npt.NDArray[Any]) -> Images:
    """Return ``(N, C, H, W)`` float32 in [0, 1] from stored 8-bit images."""
    images = stored.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))


def kept(file: Path, compute: Callable[[], Any]) -> Any:
    """Return the JSON value of `file`, computed and written first if it isn't there; never half a file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(compute()))
        part.replace(file)
    return json.loads(file.read_text())


Scores = dict[str, float]

COLUMNS: tuple[tuple[str, Callable[[Sequence[Scores]], float]], ...] = (
    ("accuracy, last", lambda run: run[-1]["accuracy"]),
    ("balanced, last", lambda run: run[-1]["balanced_accuracy"]),
    ("AUC, last", lambda run: run[-1]["auc"]),
    ("balanced, peak", lambda run: max(scores["balanced_accuracy"] for scores in run)),
    ("AUC, peak", lambda run: max(scores["auc"] for scores in run)),
    ("**recoverable accuracy**", lambda run: run[-1]["recoverable_accuracy"]),
    ("**recoverable AUC**", lambda run: run[-1]["recoverable_auc"]),
)
"""Heading and figure of a victim's run (scores per epoch), in the order of the tables."""
