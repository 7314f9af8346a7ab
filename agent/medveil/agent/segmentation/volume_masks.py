"""Label maps in NIfTI files, brought to the voxel grid of their image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medveil.models.errors import ImageError

__all__ = ["read_volume_mask"]

Matrix = npt.NDArray[Any]
"""float64; ``(4, 4)`` from voxel to voxel or millimetre, or ``(3, n)`` voxels."""

_ORIENTATIONS: Final[Any] = nib.orientations  # nibabel types none of its functions

_VOXEL_TOLERANCE: Final = 0.1
"""Share of a voxel by which two grids may be apart and still be the same one. Our choice: headers hold float32, and
quaternion and matrix form of one orientation differ in the fourth decimal."""


def read_volume_mask(mask: Path, image: Path) -> npt.NDArray[Any]:
    """Return a label map on its image's grid: ``(slices, rows, columns)`` stored values.

    A map that is stored with other axes, or with some of them reversed, is turned. Spacing may differ from axis to
    axis and the grid may lie obliquely in the scanner: voxels are compared with voxels.

    Args:
        mask: the label map's file.
        image: the image's file.

    Raises:
        ImageError: ``mask-size``: another number of voxels; ``mask-grid``: its voxels lie elsewhere; or as reading a
            volume does.
    """
    labels, voxels = _loaded(mask), _loaded(image)
    to_image = np.linalg.solve(_affine(voxels), _affine(labels))
    stored = _three_axes(np.asarray(labels.dataobj.get_unscaled()))
    wanted = _three_axes(np.empty(voxels.shape, np.bool_)).shape
    turned = _turned(stored, to_image)
    if turned.shape != wanted:
        raise ImageError("mask-size", "This image's mask has another size than the image; export both again.")
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in wanted])).reshape(3, -1)
    if np.abs(_inverse_turn(stored.shape, to_image, corners) - _mapped_back(to_image, corners)).max() > (
        _VOXEL_TOLERANCE
    ):
        raise ImageError(
            "mask-grid",
            "This image's mask lies on another voxel grid than the image; resample it to the image and export it.",
        )
    return np.ascontiguousarray(turned.transpose(2, 1, 0))


def _loaded(path: Path) -> Any:
    """Open a volume whose header and size the scan of the source has looked at already."""
    try:
        return nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError, ValueError) as exc:
        raise ImageError(
            "mask-damaged", "This image's mask cannot be read; export it again.", private=repr(exc)
        ) from exc


def _three_axes(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ``(x, y, z)`` values; a single slice gets its axis, axes of length 1 beyond the third go."""
    return values.reshape(*values.shape[:2], -1)


def _affine(volume: Any) -> Matrix:
    """Return the matrix from voxel to millimetre, as nibabel chooses it (sform, qform, spacing alone)."""
    affine = np.asarray(volume.header.get_best_affine(), np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) == 0:
        raise ImageError("bad-geometry", "This volume's affine is damaged; export it again.")
    return affine


def _turned(stored: npt.NDArray[Any], to_image: Matrix) -> npt.NDArray[Any]:
    """Return the label map with its axes in the order and direction of the image's."""
    return np.asarray(_ORIENTATIONS.apply_orientation(stored, _orientation(to_image)))


def _orientation(to_image: Matrix) -> Matrix:
    return np.asarray(_ORIENTATIONS.io_orientation(to_image))


def _inverse_turn(shape: tuple[int, ...], to_image: Matrix, voxels: npt.NDArray[Any]) -> Matrix:
    """Return which voxels of the stored map ended at ``voxels`` of the turned one; ``(3, n)``."""
    back = _ORIENTATIONS.inv_ornt_aff(_orientation(to_image), shape)
    return np.asarray((back @ np.vstack([voxels, np.ones(voxels.shape[1])]))[:3])


def _mapped_back(to_image: Matrix, voxels: npt.NDArray[Any]) -> Matrix:
    """Return where ``voxels`` of the image lie on the stored map's grid, by both headers; ``(3, n)``."""
    inverse = np.linalg.inv(to_image)
    return np.asarray((inverse @ np.vstack([voxels, np.ones(voxels.shape[1])]))[:3])
