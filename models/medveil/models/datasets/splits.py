"""Divide labelled images so that every part has its share of every class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["stratified_split"]

_Index = npt.NDArray[np.int64]


def stratified_split(labels: _Index, share: float, rng: np.random.Generator) -> tuple[_Index, _Index]:
    """Return the indices of two parts, each sorted; the second holds `share` of every class, at least one image.

    Args:
        labels: ``(N,)`` class indices.
        share: of the second part, in (0, 1).
        rng: who goes where.
    """
    second = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        second.append(members[: max(1, round(share * len(members)))])
    chosen = np.sort(np.concatenate(second)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), chosen), chosen
