"""What a path says: image or mask."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from medveil.agent.imageio.naming import is_named_as_mask, parts_of


@pytest.mark.parametrize(
    ("path", "is_mask"),
    [
        ("labelsTr/hip_001.nii.gz", True),
        ("imagesTr/hip_001.nii.gz", False),
        ("sub-1/anat/sub-1_T1w.nii.gz", False),
        ("derivatives/labels/sub-1/anat/sub-1_T1w_seg-manual.nii.gz", True),
        ("derivatives/fmriprep/sub-1/anat/sub-1_T1w.nii.gz", False),
        ("mask study/images/7.nii", False),
        ("images/7_mask.nii", True),
        ("lesions/7.nii", True),
        ("imagesTr/lesion_7.nii.gz", False),
        ("labelsTr/lesion_7.nii.gz", True),
        ("7.nii", False),
    ],
)
def test_the_deepest_word_decides(path, is_mask):
    assert is_named_as_mask(PurePosixPath(path)) is is_mask


def test_names_come_apart_into_words_and_numbers():
    assert parts_of(PurePosixPath("labelsTr/Liver007_a.nii.gz")) == (("labels", "tr"), ("liver", "007", "a"))
