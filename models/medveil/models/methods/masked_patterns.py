"""Baselines that draw their noise: random and constant inside the foreground, LSP and AR as two classes of pixels.

Class-wise baselines become segmentation baselines by taking the pixels inside and outside the foreground for two
classes (arXiv 2403.14250, which ports LSP and AR so): two noise fields per image, and the mask says which of
them a pixel gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from medveil.models.methods import ar, lsp
from medveil.models.methods.base import Batch, MethodInfo
from medveil.models.methods.masked import (
    Answers,
    Limits,
    MaskedBatch,
    SegmentationMethod,
    SegmentationSettings,
)
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.projection import at_most
from medveil.models.methods.randomness import generator_for
from medveil.models.methods.voxshield import ROI, foreground

__all__ = ["AR", "CONSTANT", "LSP", "RANDOM"]

_WHOLE = "whole"
_MIDDLE = np.float32(0.5)


def _everywhere(batch: MaskedBatch, settings: SegmentationSettings) -> Limits:
    return {_WHOLE: np.full_like(batch.images[:, :1], at_most(settings.epsilon))}


def _random(batch: MaskedBatch, settings: SegmentationSettings) -> Answers:
    """Return +-1 for every value, drawn from the image's key."""
    shape = batch.images.shape[1:]
    signs = [generator_for(key, settings.seed, "roi-random").integers(0, 2, shape) for key in batch.keys]
    return {ROI: np.asarray(2 * np.stack(signs) - 1, np.float32)}


def _constant(batch: MaskedBatch, _settings: SegmentationSettings) -> Answers:
    return {ROI: np.ones_like(batch.images)}


def _lsp(batch: MaskedBatch, settings: SegmentationSettings) -> Answers:
    usual = lsp.LspSettings(seed=settings.seed, colour="channels")
    chosen = replace(usual, epsilon=settings.epsilon, rms=usual.rms * settings.epsilon / usual.epsilon)
    return {_WHOLE: _by_side(batch, settings, lambda pixels: lsp.pattern(pixels, chosen))}


def _ar(batch: MaskedBatch, settings: SegmentationSettings) -> Answers:
    usual = ar.ArSettings(seed=settings.seed, colour="channels")
    chosen = replace(usual, epsilon=settings.epsilon, rms=usual.rms * settings.epsilon / usual.epsilon)
    return {_WHOLE: _by_side(batch, settings, lambda pixels: ar.pattern(pixels, chosen))}


def _by_side(
    batch: MaskedBatch, settings: SegmentationSettings, pattern: Callable[[Batch], FloatArray]
) -> FloatArray:
    """Return the pattern of class 1 inside the foreground and that of class 0 outside, as shares of epsilon."""
    # On grey images the patterns are cut by epsilon alone; the image's own range is the caller's business.
    canvas = np.full_like(batch.images, _MIDDLE)
    outside, inside = (
        pattern(Batch(canvas, np.full(len(batch), side, np.int64), batch.keys)) for side in (0, 1)
    )
    chosen = np.where((batch.labels > 0)[:, None], inside, outside)
    return np.asarray(np.clip(chosen / at_most(settings.epsilon), -1, 1), np.float32)


def _baseline(
    name: str,
    title: str,
    source: str,
    part: str,
    limits: Callable[[MaskedBatch, SegmentationSettings], Limits],
    draw: Callable[[MaskedBatch, SegmentationSettings], Answers],
) -> SegmentationMethod:
    info = MethodInfo(name=name, title=title, source=source, task="segmentation")
    return SegmentationMethod(info=info, limits=limits, parts=(part,), draw=draw)


RANDOM = _baseline("roi-random", "random signs in the foreground", "a control", ROI, foreground, _random)
CONSTANT = _baseline("roi-constant", "constant in the foreground", "a control", ROI, foreground, _constant)
LSP = _baseline(
    "seg-lsp", "LSP, inside and outside", "arXiv 2111.00898, as in 2403.14250", _WHOLE, _everywhere, _lsp
)
AR = _baseline(
    "seg-ar", "AR, inside and outside", "arXiv 2206.03693, as in 2403.14250", _WHOLE, _everywhere, _ar
)
