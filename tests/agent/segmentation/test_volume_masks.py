"""A label map is brought to its image's voxels exactly, or refused: never resampled, never shifted."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medveil.agent.segmentation.volume_masks import read_volume_mask
from medveil.models.errors import ImageError

OBLIQUE = np.array([[0.7, -0.3, 0.1, -20], [0.25, 0.9, -0.2, 33], [0.0, 0.2, 2.5, 5], [0, 0, 0, 1.0]])
"""Voxels of 0.7 x 1 x 2.5 mm, no axis along the scanner's."""


@pytest.fixture
def volumes(tmp_path: Path, rng, save_volume):
    """An image of 5x4x3 voxels on an oblique grid, and a function that stores its labels on any grid."""
    image = save_volume(tmp_path / "image.nii.gz", rng.normal(size=(5, 4, 3)).astype(np.float32), OBLIQUE)
    labels = rng.integers(0, 3, (5, 4, 3)).astype(np.uint8)

    def store(voxels: np.ndarray, affine: np.ndarray) -> Path:
        return save_volume(tmp_path / "labels.nii.gz", voxels, affine)

    return image, labels, store


def test_an_oblique_anisotropic_map_on_the_same_grid_is_taken_voxel_by_voxel(volumes):
    image, labels, store = volumes
    found = read_volume_mask(store(labels, OBLIQUE), image)
    np.testing.assert_array_equal(found, labels.transpose(2, 1, 0))


@pytest.mark.parametrize("axes", list(permutations(range(3))))
@pytest.mark.parametrize("flips", list(product([1, -1], repeat=3))[::3])
def test_a_map_that_is_stored_in_other_directions_is_turned_back(axes, flips, volumes):
    image, labels, store = volumes
    orientation = np.column_stack([axes, flips])
    turned = nib.orientations.apply_orientation(labels, orientation)
    affine = OBLIQUE @ nib.orientations.inv_ornt_aff(orientation, labels.shape)
    found = read_volume_mask(store(np.ascontiguousarray(turned), affine), image)
    np.testing.assert_array_equal(found, labels.transpose(2, 1, 0))


def test_rounding_of_the_header_does_not_matter(volumes):
    image, labels, store = volumes
    read_volume_mask(store(labels, OBLIQUE * (1 + 1e-6)), image)


def shifted(by: float) -> np.ndarray:
    affine = OBLIQUE.copy()
    affine[:3, 3] += by * OBLIQUE[:3, 0]
    return affine


@pytest.mark.parametrize(
    ("shape", "affine", "code"),
    [
        ((5, 4, 3), shifted(1), "mask-grid"),
        ((5, 4, 3), shifted(0.5), "mask-grid"),
        ((5, 4, 3), OBLIQUE @ np.diag([1.1, 1, 1, 1]), "mask-grid"),
        ((5, 4, 3), np.eye(4), "mask-grid"),
        ((5, 4, 2), OBLIQUE, "mask-size"),
        ((4, 5, 3), OBLIQUE, "mask-size"),
    ],
)
def test_a_map_on_another_grid_is_refused_by_name(shape, affine, code, volumes):
    image, _, store = volumes
    with pytest.raises(ImageError) as refused:
        read_volume_mask(store(np.zeros(shape, np.uint8), affine), image)
    assert refused.value.code == code
