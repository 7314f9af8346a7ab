"""The segmentation methods under their names.

``get_segmentation("umed").perturb(batch, answers, SegmentationSettings(...))`` returns the noise of a `MaskedBatch`;
``answers`` holds what the bundle's generators said, by part.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from medveil.models.methods import grating, masked_patterns, umed, voxshield
from medveil.models.methods.base import named
from medveil.models.methods.masked import (
    Answers,
    Limits,
    MaskedBatch,
    SegmentationMethod,
    SegmentationSettings,
)

__all__ = [
    "SEGMENTATION_METHODS",
    "Answers",
    "Limits",
    "MaskedBatch",
    "SegmentationMethod",
    "SegmentationSettings",
    "get_segmentation",
]

_METHODS = (
    umed.METHOD,
    umed.PLUS,
    umed.TARGETED,
    voxshield.METHOD,
    grating.METHOD,
    grating.COARSE,
    grating.VOLUME,
    masked_patterns.RANDOM,
    masked_patterns.CONSTANT,
    masked_patterns.LSP,
    masked_patterns.AR,
)

SEGMENTATION_METHODS: Mapping[str, SegmentationMethod] = MappingProxyType({m.info.name: m for m in _METHODS})


def get_segmentation(name: str) -> SegmentationMethod:
    """Return the segmentation method called ``name``.

    Raises:
        ConfigurationError: "unknown-method"; the sentence lists the names there are.
    """
    return named(SEGMENTATION_METHODS, name)
