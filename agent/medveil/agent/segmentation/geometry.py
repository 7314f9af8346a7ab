"""Where an image plane lies in the patient, and whether two planes are the same pixels.

DICOM PS3.3 C.7.6.2.1.1: the centre of pixel (row i, column j) lies at

    position + rows_step * i + columns_step * j        [mm]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from medveil.models.errors import ImageError

__all__ = ["Plane", "Vector", "plane_of", "same_grid"]

Vector = npt.NDArray[np.float64]

_PIXEL_TOLERANCE: Final = 0.1
"""Share of a pixel by which two grids may be apart and still be the same one: decimal strings are rounded, and a
mask that was resampled is off by more. Our choice."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One image plane.

    Attributes:
        position: centre of the first pixel, mm, patient coordinates.
        rows_step: from one row to the next, mm.
        columns_step: from one column to the next, mm.
        shape: rows and columns.
        thickness: distance that the slice stands for along its normal, mm.
    """

    position: Vector
    rows_step: Vector
    columns_step: Vector
    shape: tuple[int, int]
    thickness: float

    @property
    def normal(self) -> Vector:
        """Unit vector at right angles to the plane."""
        across = np.cross(self.columns_step, self.rows_step)
        return np.asarray(across / np.linalg.norm(across), np.float64)

    def pixels_of(self, points: Vector) -> tuple[Vector, Vector]:
        """Return where points lie on the plane's grid.

        Args:
            points: ``(n, 3)`` patient coordinates, mm.

        Returns:
            ``(n, 2)`` row and column, in pixels (the centre of the first pixel is 0, 0), and ``(n,)`` distance from
            the plane, mm, signed.
        """
        away = points - self.position
        rows = away @ self.rows_step / (self.rows_step @ self.rows_step)
        columns = away @ self.columns_step / (self.columns_step @ self.columns_step)
        return np.stack([rows, columns], axis=1), np.asarray(away @ self.normal, np.float64)


def plane_of(dataset: Dataset, frame: int) -> Plane | None:
    """Return where a frame of an image or segmentation lies; None where the object doesn't say.

    Args:
        dataset: classic objects say it at the top level, multi-frame ones in functional groups.
        frame: index from 0.

    Raises:
        ImageError: ``bad-geometry``: it says something that is no plane.
    """
    groups = _groups(dataset, frame)
    position = _of("PlanePositionSequence", "ImagePositionPatient", groups, dataset)
    orientation = _of("PlaneOrientationSequence", "ImageOrientationPatient", groups, dataset)
    spacing = _of("PixelMeasuresSequence", "PixelSpacing", groups, dataset)
    if not position or not orientation or not spacing:
        return None
    thickness = _of("PixelMeasuresSequence", "SliceThickness", groups, dataset)
    try:
        along_row, down = np.array(orientation[:3], np.float64), np.array(orientation[3:6], np.float64)
        plane = Plane(
            position=np.array(position, np.float64).reshape(3),
            rows_step=down * float(spacing[0]),
            columns_step=along_row * float(spacing[1]),
            shape=(int(dataset.Rows), int(dataset.Columns)),
            thickness=float(thickness) if thickness else 0.0,
        )
        usable = bool(np.linalg.norm(np.cross(plane.columns_step, plane.rows_step)) > 0)
    except (TypeError, ValueError, IndexError, OverflowError) as exc:
        raise _bad_geometry() from exc
    if not usable or not np.isfinite(plane.position).all():
        raise _bad_geometry()
    return plane


def same_grid(one: Plane, other: Plane) -> bool:
    """Return whether two planes have the same pixels in the same places: corner by corner, to a tenth of a pixel."""
    if one.shape != other.shape:
        return False
    allowed = _PIXEL_TOLERANCE * min(
        float(np.linalg.norm(one.rows_step)), float(np.linalg.norm(one.columns_step))
    )
    return all(
        float(np.linalg.norm(ours - theirs)) <= allowed
        for ours, theirs in zip(_corners(one), _corners(other), strict=True)
    )


def _corners(plane: Plane) -> list[Vector]:
    rows, columns = plane.shape
    return [
        plane.position + plane.rows_step * row + plane.columns_step * column
        for row in (0, rows - 1)
        for column in (0, columns - 1)
    ]


def _groups(dataset: Dataset, frame: int) -> list[Dataset]:
    """Return the functional groups that describe a frame, its own before the shared ones."""
    own = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    return [*([own[frame]] if frame < len(own) else []), *shared[:1]]


def _of(sequence: str, keyword: str, groups: list[Dataset], dataset: Dataset) -> Any:
    for group in groups:
        items = group.get(sequence) or ()
        if items and items[0].get(keyword):
            return items[0].get(keyword)
    return dataset.get(keyword)


def _bad_geometry() -> ImageError:
    return ImageError("bad-geometry", "This object's position in the patient is damaged; export it again.")
