"""The contour of a segmentation: a band around every class's border, and what lies inside it.

UMed (arXiv 2403.14250) finds the contour by morphology on the reference mask, not by edges in the image. A box of
side ``2r+1`` dilates and erodes each class on its own, and the bands are joined: on the union of all classes the
border between two organs that touch would have no band.
"""

from __future__ import annotations

import numpy as np

from medveil.models.methods.base import BoolArray, IntArray

__all__ = ["band", "interior"]


def band(labels: IntArray, radius: int) -> BoolArray:
    """Return the contour band, bool of ``labels``' shape: dilate - erode of every class, joined.

    It reaches ``radius`` pixels to both sides of a border. The image's own edge is no border.

    Args:
        labels: ``(N, rows, columns)`` or ``(N, slices, rows, columns)``, class index, 0 for background.
        radius: in pixels, 0 or more; 0 gives an empty band.
    """
    # Loaded here: it costs as much as the rest of the agent, and classification never needs it.
    from scipy import ndimage

    joined = np.zeros(labels.shape, np.bool_)
    if radius == 0:
        return joined
    size = (1, *(2 * radius + 1 for _ in labels.shape[1:]))
    for label in np.unique(labels[labels > 0]):
        member = (labels == label).astype(np.uint8)
        dilated = ndimage.maximum_filter(member, size=size, mode="constant", cval=0)
        eroded = ndimage.minimum_filter(member, size=size, mode="constant", cval=1)
        joined |= dilated > eroded
    return joined


def interior(labels: IntArray, radius: int) -> BoolArray:
    """Return the foreground without its band, bool of ``labels``' shape."""
    return np.asarray((labels > 0) & ~band(labels, radius), np.bool_)
