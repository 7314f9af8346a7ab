"""The main job on a DICOM series with a segmentation: pixels in the gate change, references follow, masks don't."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path, PurePosixPath

import numpy as np
import pydicom
import pytest

from medveil.agent.budget import Budget, enforce
from medveil.agent.imageio import Derivation, DerivedUids, DicomFormat, Item
from medveil.agent.protect import protect
from medveil.agent.segmentation.series import in_series

UIDS = DerivedUids(bytes(range(32)), "alone", "policy")


def dicom() -> DicomFormat:
    return DicomFormat(Derivation(UIDS, datetime(2026, 11, 21, 12, 0, 0), "Protected", "0.1.0"))


def test_a_series_is_protected_where_its_segmentation_says(job, segmentation, slices, tmp_path):
    mask = np.zeros((6, 7), np.uint8)
    mask[2:4, 2:5] = 1
    segmentation([(1, 1, mask)])
    source = slices[0].path.parent
    names = ("background", "liver", "tumour")
    outcome = protect(job(source, tmp_path / "out", names=names, formats=(dicom(),)))
    assert (outcome.totals.images, outcome.totals.verified) == (3, 3)
    changed = []
    for item in slices:
        clean, written = (pydicom.dcmread(folder / item.relative) for folder in (source, tmp_path / "out"))
        change = written.pixel_array.astype(int) - clean.pixel_array
        outside = np.ones((6, 7), bool)
        outside[1:5, 1:6] = False
        assert not change[outside].any()
        assert written.SOPInstanceUID == UIDS.instance(clean.SOPInstanceUID)
        changed.append(bool(change.any()))
    assert changed == [False, True, False]
    assert_only_references_moved(source / "seg.dcm", tmp_path / "out" / "seg.dcm")


def assert_only_references_moved(source: Path, written: Path) -> None:
    clean, copy = pydicom.dcmread(source), pydicom.dcmread(written)
    assert clean.PixelData == copy.PixelData
    old, new = (
        d.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
        for d in (clean, copy)
    )
    assert new.ReferencedSOPInstanceUID == UIDS.instance(old.ReferencedSOPInstanceUID)


def test_images_without_a_segmentation_are_named(job, slices, tmp_path):
    outcome = protect(job(slices[0].path.parent, tmp_path / "out", formats=(dicom(),)))
    assert outcome.totals.verified == 0
    assert dict(outcome.totals.quarantined) == {"missing-mask": 3}


@pytest.fixture
def marked(segmentation, slices) -> list[Item]:
    """A structure in the two lower slices; the files' names say nothing about where the slices lie."""
    mask = np.zeros((6, 7), np.uint8)
    mask[2:4, 2:5] = 1
    segmentation([(1, 1, mask), (1, 2, mask)])
    names = {"ct0.dcm": "b.dcm", "ct1.dcm": "c.dcm", "ct2.dcm": "a.dcm"}
    return [
        replace(item, path=item.path.rename(item.path.with_name(new)), relative=PurePosixPath(new))
        for item in slices
        for new in [names[item.path.name]]
    ]


def test_slices_form_a_series_by_where_they_lie_not_by_name(marked):
    assert in_series(marked[::-1]) == [tuple(marked)]


def test_generators_that_look_across_slices_see_a_series_as_one_volume(job, perturber, marked, tmp_path):
    """What one file per slice gives is what the whole volume gives at once."""
    source = marked[0].path.parent
    names = ("background", "liver", "tumour")
    made = perturber("voxshield", tile=(8, 8, 8))
    outcome = protect(job(source, tmp_path / "out", names=names, formats=(dicom(),), perturber=made))
    assert (outcome.totals.images, outcome.totals.verified) == (3, 3)
    assert outcome.annotations is not None
    images = []
    for position, item in enumerate(marked):
        with dicom().open(item, tmp_path) as frames:
            images.append((position, frames[0]))
    maps = {
        image.path: outcome.annotations.label_map(item, image)
        for (_, image), item in zip(images, marked, strict=True)
    }
    volume = made.of_volume([image for _, image in images], lambda image: maps[image.path])
    for position, image in images:
        wanted = enforce(image, volume.of_slice(position), Budget(4.0, 1.0))
        written = pydicom.dcmread(tmp_path / "out" / image.path).pixel_array
        np.testing.assert_array_equal(written, wanted)
        assert bool((written != image.pixels).any()) == (position > 0)


def test_a_damaged_slice_is_left_out_by_name_and_the_others_are_protected(job, perturber, marked, tmp_path):
    broken = pydicom.dcmread(marked[1].path)
    broken.PixelData = broken.PixelData[:20]
    broken.save_as(marked[1].path)
    made = perturber("voxshield", tile=(8, 8, 8))
    names = ("background", "liver", "tumour")
    source = marked[0].path.parent
    outcome = protect(job(source, tmp_path / "out", names=names, formats=(dicom(),), perturber=made))
    assert outcome.totals.verified == 2
    assert dict(outcome.totals.quarantined) == {"truncated": 1}
