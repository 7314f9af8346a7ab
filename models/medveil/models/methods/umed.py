"""UMed: unlearnable medical image segmentation by contour and texture (Lin et al., arXiv 2403.14250).

    B = dilate(M) - erode(M), per class                 contour band
    I = M - B                                           interior
    delta_c = eps * tanh(G_c(x)) on B                   contour perturbator: a central-difference encoder
    delta_t = clip(eps * tanh(G_t(x)), -eps*T, eps*T)   texture perturbator, on I; T: local texture in [0, 1]
    x_p = clip01(x + delta_c + delta_t)

Neither generator sees the mask: it only gates what they say. Both are trained bi-level against a surrogate
(`medveil.models.training.segmentation`); a site runs them forward once. ``umed-plus`` is ours: the same parts under a
band of another width, by generators that were trained towards an all-foreground mask (UnSeg's label modification,
arXiv 2410.09909) and through random blur, noise, contrast and compression. ``umed-targeted`` is ours as well, and
what protects best here (measured): the same parts, trained against surrogates that know clean images and stand
still, towards a fixed permutation of the classes (TAP, arXiv 2106.10807), on a wide band and at twice the budget.
"""

from __future__ import annotations

import numpy as np

from medveil.models.methods.base import MethodInfo
from medveil.models.methods.contour import band
from medveil.models.methods.masked import Limits, MaskedBatch, SegmentationMethod, SegmentationSettings
from medveil.models.methods.projection import at_most
from medveil.models.methods.texture import local_binary_share

__all__ = ["CONTOUR", "METHOD", "PLUS", "TARGETED", "TEXTURE", "limits"]

CONTOUR = "contour"
TEXTURE = "texture"


def limits(batch: MaskedBatch, settings: SegmentationSettings) -> Limits:
    """Return epsilon on the band for the contour's noise, and epsilon times the texture inside for the texture's."""
    epsilon = at_most(settings.epsilon)
    contour = band(batch.labels, settings.band_radius)[:, None]
    inside = (batch.labels > 0)[:, None] & ~contour
    share = local_binary_share(batch.images) if settings.texture_bound else np.float32(1)
    return {
        CONTOUR: np.asarray(epsilon * contour, np.float32),
        TEXTURE: np.asarray(epsilon * share * inside, np.float32),
    }


def _method(name: str, title: str, source: str) -> SegmentationMethod:
    return SegmentationMethod(
        info=MethodInfo(name=name, title=title, source=source, task="segmentation"),
        limits=limits,
        parts=(CONTOUR, TEXTURE),
    )


METHOD = _method("umed", "UMed (contour and texture)", "arXiv 2403.14250")
PLUS = _method(
    "umed-plus",
    "UMed-plus (all-foreground target, hardened)",
    "arXiv 2403.14250 and 2410.09909; target, hardening and their mix are ours",
)
TARGETED = _method(
    "umed-targeted",
    "UMed-targeted (fixed permutation, frozen surrogates)",
    "arXiv 2403.14250 and 2106.10807; their mix is ours",
)
