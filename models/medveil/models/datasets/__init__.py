"""Labelled image sets on disk as one value: what a coordinator trains on."""

from __future__ import annotations

from medveil.models.datasets.labelled import LabelledSet, load_labelled, split_names
from medveil.models.datasets.splits import stratified_split

__all__ = ["LabelledSet", "load_labelled", "split_names", "stratified_split"]
