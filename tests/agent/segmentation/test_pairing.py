"""Names and folders say which mask belongs to which image, in every layout that data sets come in."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from medveil.agent.imageio import Item, Listing, Taxonomy
from medveil.agent.segmentation.label_map import ClassMap
from medveil.agent.segmentation.pairing import Kind, pair, place_of

NAMES = ClassMap(Taxonomy(("background", "vessel", "optic disc"), (0, 1, 2)), {"fov": "background"})


def item(name: str, frames: int = 1) -> Item:
    kind = {"gz": "nifti", "nii": "nifti", "dcm": "dicom", "tif": "tiff", "jpg": "jpeg"}
    relative = PurePosixPath(name)
    format_ = kind.get(relative.suffix[1:], relative.suffix[1:])
    return Item(Path(name), relative, relative, format_, frames, 10, 10)


def listing(*names: str) -> Listing:
    """Label maps in NIfTI are known as such: they have no frames."""
    items = tuple(item(n, 0 if ".nii" in n and ("label" in n or "seg" in n) else 1) for n in names)
    return Listing(items, (), 0)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/7.png", "masks/7.png"),
        ("a/images/7.png", "a/masks/7.tif"),
        ("7.png", "7_mask.png"),
        ("img007.png", "mask007.png"),
        ("train/image_2/x.png", "train/mask_2/x.png"),
        ("imagesTr/hip_001.nii.gz", "labelsTr/hip_001.nii.gz"),
        ("sub-1/anat/sub-1_T1w.nii.gz", "derivatives/labels/sub-1/anat/sub-1_T1w_seg-manual.nii.gz"),
        ("mask study/images/7.png", "mask study/masks/7.png"),
        ("images/1.2.840.7.dcm", "masks/1.2.840.7.png"),
        ("image/7.png", "vessel/7.png"),
        ("7.png", "7_optic_disc.png"),
    ],
)
def test_image_and_mask_find_each_other(image, mask):
    pairing = pair(listing(image, mask), NAMES)
    assert [str(m.item.relative) for m in pairing.masks[PurePosixPath(image)]] == [mask]
    assert PurePosixPath(mask) not in pairing.masks
    assert not pairing.listing.quarantined


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/7.png", "masks/8.png"),
        ("train/images/7.png", "test/masks/7.png"),
        ("images/1/7.png", "masks/2/7.png"),
        ("imagesTr/7.nii.gz", "labelsTs/7.nii.gz"),
        ("images/7.png", "labels/7.nii.gz"),
    ],
)
def test_what_does_not_belong_together_is_not_put_together(image, mask):
    pairing = pair(listing(image, mask), NAMES)
    assert pairing.masks[PurePosixPath(image)] == ()
    assert [(str(q.relative), q.code) for q in pairing.listing.quarantined] == [(mask, "mask-without-image")]


def test_a_class_may_have_a_file_of_its_own():
    pairing = pair(listing("image/7.png", "vessel/7.png", "optic disc/7.png", "fov/7.png"), NAMES)
    found = {str(m.item.relative): m.class_index for m in pairing.masks[PurePosixPath("image/7.png")]}
    assert found == {"vessel/7.png": 1, "optic disc/7.png": 2, "fov/7.png": 0}


NUMBERED = ClassMap(Taxonomy(("background", "1", "2"), (0, 1, 2)), {})


@pytest.mark.parametrize("end", ["png", "nii.gz"])
def test_a_class_called_by_a_number_takes_no_image_for_another(end):
    """Bundles whose coordinator named no classes call them by their values."""
    names = [f"images/1.{end}", f"images/2.{end}", f"labels/1.{end}"]
    pairing = pair(listing(*names), NUMBERED)
    found = {str(image): [str(m.item.relative) for m in masks] for image, masks in pairing.masks.items()}
    assert found == {names[0]: [names[2]], names[1]: []}
    assert pairing.masks[PurePosixPath(names[0])][0].class_index is None


def test_images_whose_names_differ_in_a_class_alone_keep_their_own_masks():
    images, masks = (
        ("a_vessel.nii.gz", "a_optic_disc.nii.gz"),
        ("a_vessel_seg.nii.gz", "a_optic_disc_seg.nii.gz"),
    )
    pairing = pair(listing(*images, *masks), NAMES)
    found = {str(image): [str(m.item.relative) for m in own] for image, own in pairing.masks.items()}
    assert found == {images[0]: [masks[0]], images[1]: [masks[1]]}


def test_a_mask_that_could_be_one_of_two_images_is_named_and_used_for_none():
    pairing = pair(listing("a_vessel.nii.gz", "a_optic_disc.nii.gz", "a_seg.nii.gz"), NAMES)
    assert set(pairing.masks.values()) == {()}
    assert [(str(q.relative), q.code) for q in pairing.listing.quarantined] == [
        ("a_seg.nii.gz", "mask-without-image")
    ]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/vessel_7.png", "masks/vessel_7.png"),
        ("vessel_7.png", "vessel_7_mask.png"),
        ("vessel/vessel 7.png", "vessel/vessel 7_mask.png"),
        ("vessel/images/7.png", "vessel/masks/7.png"),
        ("images/lesion_7.png", "masks/lesion_7.png"),
        ("imagesTr/vessel_7.nii.gz", "labelsTr/vessel_7.nii.gz"),
        ("imagesTr/optic_disc_7.nii.gz", "labelsTr/optic_disc_7.nii.gz"),
    ],
)
def test_where_the_image_is_called_like_a_class_the_values_of_its_mask_say_what_they_stand_for(image, mask):
    """Data sets are called after what they show; their masks hold all classes, not the one in the name."""
    pairing = pair(listing(image, mask), NAMES)
    assert [(str(m.item.relative), m.class_index) for m in pairing.masks[PurePosixPath(image)]] == [
        (mask, None)
    ]
    assert not pairing.listing.quarantined


def test_yes_in_such_a_mask_means_the_class_that_both_are_called_after():
    """As in breast ultrasound sets: "malignant (1)" and "malignant (1)_mask", 0 and 255."""
    pairing = pair(
        listing("vessel/vessel (1).png", "vessel/vessel (1)_mask.png", "fov_2.png", "fov_2_mask.png"), NAMES
    )
    found = {str(image): masks[0].yes for image, masks in pairing.masks.items()}
    assert found == {"vessel/vessel (1).png": 1, "fov_2.png": None}


@pytest.mark.parametrize(
    ("image", "mask", "index"),
    [
        ("images/vessel_7.png", "vessel/vessel_7.png", 1),
        ("images/vessel_7.png", "masks/vessel_7_optic_disc.png", 2),
        ("images/vessel_7.png", "masks/optic_disc_7.png", 2),
        ("images/vessel_7.png", "masks/7.png", None),
        ("images/7.png", "vessel/7_vessel.png", 1),
        ("images/7.png", "images/7_vessel.png", 1),
        ("images/7.png", "lesions/7.png", None),
    ],
)
def test_a_mask_marks_the_class_that_its_image_is_not_called_after(image, mask, index):
    pairing = pair(listing(image, mask), NAMES)
    assert [(str(m.item.relative), m.class_index) for m in pairing.masks[PurePosixPath(image)]] == [
        (mask, index)
    ]


def test_an_image_called_like_a_class_and_without_a_mask_is_an_image_without_a_mask():
    names = ["images/7.png", "images/vessel_8.png", "masks/7.png"]
    pairing = pair(listing(*names), NAMES)
    assert set(pairing.masks) == {PurePosixPath(name) for name in names[:2]}
    assert pairing.masks[PurePosixPath(names[1])] == ()


def test_an_image_with_a_mask_of_its_own_is_no_mask_of_another():
    names = ["images/7.png", "images/vessel_7.png", "masks/7.png", "masks/vessel_7.png"]
    pairing = pair(listing(*names), NAMES)
    found = {str(image): [str(m.item.relative) for m in own] for image, own in pairing.masks.items()}
    assert found == {names[0]: [names[2]], names[1]: [names[3]]}


def test_what_is_called_like_a_class_and_belongs_to_nothing_is_told_why():
    (orphan,) = pair(listing("7.png", "vessel_8.png"), NAMES).listing.quarantined
    assert (str(orphan.relative), orphan.code) == ("vessel_8.png", "mask-without-image")
    assert "called like a structure" in orphan.public


def test_masks_are_carried_over_under_their_own_name_and_are_no_images():
    pairing = pair(listing("images/7.png", "masks/7.png"), NAMES)
    kept = {str(i.relative): (i.format, i.frames, str(i.target)) for i in pairing.listing.items}
    assert kept == {"images/7.png": ("png", 1, "images/7.png"), "masks/7.png": ("mask", 0, "masks/7.png")}


def test_the_deepest_word_decides_between_image_and_mask():
    assert place_of(PurePosixPath("masks/images/7.png"), NAMES).kind is Kind.IMAGE
    assert place_of(PurePosixPath("images/7_mask.png"), NAMES).kind is Kind.MASK


def test_the_order_of_the_files_does_not_matter():
    names = ["images/1.png", "images/2.png", "masks/2.png", "masks/1.png"]
    forward, backward = (pair(listing(*order), NAMES).masks for order in (names, names[::-1]))
    assert forward == backward
