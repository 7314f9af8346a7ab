"""Segmentation at a site: the masks of its images, and the perturbation that generators make from both."""

from __future__ import annotations

from medveil.agent.segmentation.annotations import Annotations, files_of
from medveil.agent.segmentation.label_map import ClassMap, LabelMap
from medveil.agent.segmentation.mask_format import MaskFormat
from medveil.agent.segmentation.perturber import Generator, MaskedPerturber
from medveil.agent.segmentation.tiling import Tiles

__all__ = [
    "Annotations",
    "ClassMap",
    "Generator",
    "LabelMap",
    "MaskFormat",
    "MaskedPerturber",
    "Tiles",
    "files_of",
]
