"""The main job on images with masks: every image accounted for, masks untouched, bad input named, nothing lost."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.imageio import raster_formats
from medveil.agent.job import Outcome
from medveil.agent.ledger import Ledger
from medveil.agent.protect import protect
from medveil.agent.restore import restore
from medveil.agent.sealing import load_site_key
from medveil.agent.segmentation import MaskFormat
from medveil.models.methods.contour import band


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def reasons(outcome: Outcome) -> dict[str, str]:
    """Return why each quarantined file was left out."""
    with Ledger(outcome.workspace.ledger_path) as ledger:
        return {str(file.relative): str(image.reason) for file, image in ledger.quarantined()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(PillowImage.open(path)).astype(int)


def test_only_contour_and_inside_change_and_masks_come_out_as_they_were(job, masked_source, tmp_path):
    outcome = protect(job(masked_source, tmp_path / "out"))
    assert (outcome.totals.images, outcome.totals.verified) == (3, 3)
    assert tree(tmp_path / "out" / "masks") == tree(masked_source / "masks")
    for number in range(3):
        name = f"images/{number}.png"
        change = pixels(tmp_path / "out" / name) - pixels(masked_source / name)
        labels = (pixels(masked_source / f"masks/{number}.png") > 0).astype(np.int64)
        inside = (labels > 0) | band(labels[None], 1)[0]
        assert 0 < np.abs(change).max() <= 4
        assert not change[~inside].any()


def test_originals_and_masks_are_restored_bit_by_bit(job, masked_source, tmp_path):
    protect(job(masked_source, tmp_path / "out"))
    key = load_site_key()
    done = restore(
        tmp_path / "out", tmp_path / "out.private", tmp_path / "back", key, (*raster_formats(), MaskFormat())
    )
    assert not done.refused
    for path in masked_source.rglob("*.png"):
        back = tmp_path / "back" / path.relative_to(masked_source)
        np.testing.assert_array_equal(pixels(back), pixels(path))
    assert tree(tmp_path / "back" / "masks") == tree(masked_source / "masks")


def test_a_second_run_repeats_nothing_and_changes_nothing(job, masked_source, tmp_path):
    protect(job(masked_source, tmp_path / "out"))
    before = tree(tmp_path / "out")
    assert protect(job(masked_source, tmp_path / "out")).finished == 0
    assert tree(tmp_path / "out") == before


def test_an_image_whose_mask_changed_is_made_again(job, masked_source, tmp_path, disc, save):
    protect(job(masked_source, tmp_path / "out"))
    before = tree(tmp_path / "out")
    path = save(masked_source / "masks/1.png", disc(radius=14, value=255))
    os.utime(path, ns=(1, 1))
    assert protect(job(masked_source, tmp_path / "out")).finished == 1
    after = tree(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {
        "images/1.png",
        "masks/1.png",
        "medveil-release.json",
    }


def test_an_image_that_gets_its_mask_later_is_made_then(job, masked_source, tmp_path):
    late = (masked_source / "masks/2.png").read_bytes()
    (masked_source / "masks/2.png").unlink()
    first = protect(job(masked_source, tmp_path / "out"))
    assert reasons(first) == {"images/2.png": "missing-mask"}
    (masked_source / "masks/2.png").write_bytes(late)
    assert protect(job(masked_source, tmp_path / "out")).totals.verified == 3


def test_bad_masks_are_named_and_the_rest_goes_on(job, masked_source, tmp_path, picture, disc, save):
    good = picture(40, 36)
    cases = {
        "missing-mask": None,
        "mask-size": disc(36, 40, value=255),
        "empty-mask": disc(value=0),
        "full-mask": np.full((40, 36), 255, np.uint8),
        "unknown-class": disc(value=7),
        "mask-colour": picture(40, 36, 3),
    }
    for number, mask in enumerate(cases.values(), start=10):
        save(masked_source / "images" / f"{number}.png", good + np.uint8(number))
        if mask is not None:
            save(masked_source / "masks" / f"{number}.png", mask)
    save(masked_source / "images/20.png", good)
    save(masked_source / "masks/20.jpg", disc(value=255))
    save(masked_source / "images/21.png", good)
    for name in ("21.png", "21_seg.png"):
        save(masked_source / "masks" / name, disc(value=255))
    outcome = protect(job(masked_source, tmp_path / "out"))
    wanted = {f"images/{number}.png": reason for number, reason in enumerate(cases, start=10)}
    wanted |= {"images/20.png": "mask-lossy", "images/21.png": "mask-conflict"}
    assert reasons(outcome) == wanted
    released = {path.stem for path in (tmp_path / "out" / "masks").iterdir()}
    assert released == {"0", "1", "2"}, "a mask is released beside its image only"
    assert outcome.totals.verified == 3
    assert not any(name in tree(tmp_path / "out") for name in wanted)


def test_what_counts_as_a_mask_and_is_a_picture_is_not_released(job, masked_source, tmp_path, picture, save):
    """Masks are copied as they are: a screenshot with the contour drawn in would be the original image."""
    photograph = picture(40, 36)
    (masked_source / "masks/0.png").unlink()
    save(masked_source / "masks/0.png", photograph)
    save(masked_source / "vessel/1.png", photograph)
    (masked_source / "masks/1.png").unlink()
    save(masked_source / "fov/2.png", photograph)
    outcome = protect(job(masked_source, tmp_path / "out", aliases={"fov": "background"}))
    assert reasons(outcome) == {
        "images/0.png": "unknown-class",
        "images/1.png": "mask-shades",
        "images/2.png": "mask-shades",
    }
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_mask_leaves_the_release_with_its_image_and_comes_back_with_it(
    job, masked_source, tmp_path, disc, save
):
    protect(job(masked_source, tmp_path / "out"))
    whole = tree(tmp_path / "out")
    good = (masked_source / "masks/1.png").read_bytes()
    save(masked_source / "masks/1.png", disc(value=7))
    assert reasons(protect(job(masked_source, tmp_path / "out"))) == {"images/1.png": "unknown-class"}
    left = tree(tmp_path / "out")
    assert set(whole) - set(left) == {"images/1.png", "masks/1.png"}
    (masked_source / "masks/1.png").write_bytes(good)
    os.utime(masked_source / "masks/1.png", ns=(1, 1))
    assert protect(job(masked_source, tmp_path / "out")).totals.verified == 3
    assert tree(tmp_path / "out") == whole


def test_a_mask_stays_out_while_its_unchanged_image_is_left_out(job, masked_source, tmp_path):
    """The image is what changes later; its mask was held back in a run before."""
    name = "images/1.png"
    good = (masked_source / name).read_bytes()
    (masked_source / name).write_bytes(good[:60])
    first = protect(job(masked_source, tmp_path / "out"))
    assert reasons(first) == {name: "truncated"}
    assert "masks/1.png" not in tree(tmp_path / "out")
    (masked_source / name).write_bytes(good)
    assert protect(job(masked_source, tmp_path / "out")).totals.verified == 3
    assert "masks/1.png" in tree(tmp_path / "out")


def test_masks_of_images_called_after_a_class_keep_all_their_classes(job, tmp_path, picture, disc, save):
    """As in the Medical Segmentation Decathlon: liver_7 holds liver and tumour."""
    both = np.maximum(disc(radius=12, value=1), disc(radius=5, value=2))
    for name in ("liver_1", "liver_2"):
        save(tmp_path / "source/images" / f"{name}.png", picture(40, 36))
        save(tmp_path / "source/masks" / f"{name}.png", both)
    outcome = protect(job(tmp_path / "source", tmp_path / "out", names=("background", "liver", "tumour")))
    assert outcome.totals.verified == 2
    assert outcome.annotations is not None
    (item, _) = [item for item in outcome.annotations.listing.items if item.frames]
    with raster_formats()[0].open(item, tmp_path) as frames:
        classes = outcome.annotations.label_map(item, frames[0]).classes
    np.testing.assert_array_equal(classes, both)


def test_a_mask_without_an_image_is_named(job, masked_source, tmp_path, disc, save):
    save(masked_source / "masks/9.png", disc(value=255))
    assert reasons(protect(job(masked_source, tmp_path / "out"))) == {"masks/9.png": "mask-without-image"}


def test_several_structures_in_one_image_and_a_file_for_each(job, tmp_path, picture, disc, save):
    source = tmp_path / "source"
    names = ("background", "cytoplasm", "nucleus")
    save(source / "images/together.png", picture(40, 36))
    save(source / "masks/together.png", np.maximum(disc(radius=12), disc(radius=5, value=2)))
    save(source / "images/apart.png", picture(40, 36))
    save(source / "cytoplasm/apart.png", disc(radius=12, value=255))
    save(source / "nucleus/apart.png", disc(radius=5, value=255))
    outcome = protect(job(source, tmp_path / "out", names=names))
    assert (outcome.totals.verified, reasons(outcome)) == (2, {})
    for name in ("together", "apart"):
        change = pixels(tmp_path / f"out/images/{name}.png") - pixels(source / f"images/{name}.png")
        nucleus = band((disc(radius=5) > 0).astype(np.int64)[None], 1)[0]
        assert change[nucleus].any(), "the border between two structures has a band of its own"


@pytest.fixture
def volumes(tmp_path: Path, rng, disc, save_volume) -> Path:
    """Two volumes of 36x40x6 voxels; the structure is in their inner slices."""
    root = tmp_path / "source"
    for number in range(2):
        voxels = rng.integers(100, 900, (36, 40, 6)).astype(np.int16)
        labels = np.stack([disc(value=int(1 < z < 5)).T for z in range(6)], axis=2)
        save_volume(root / "images" / f"{number}.nii.gz", voxels)
        save_volume(root / "labels" / f"{number}.nii.gz", labels)
    return root


@pytest.mark.parametrize(("method", "tile"), [("umed", (16, 16)), ("voxshield", (8, 16, 16))])
def test_slices_without_a_structure_stay_and_the_others_change(
    method, tile, job, perturber, volumes, tmp_path
):
    made = perturber(method, tile=tile)
    outcome = protect(job(volumes, tmp_path / "out", perturber=made))
    assert (outcome.totals.images, outcome.totals.verified) == (12, 12)
    assert tree(tmp_path / "out/labels") == tree(volumes / "labels")
    for number in range(2):
        clean, written = (
            np.asarray(nib.load(folder / f"images/{number}.nii.gz").dataobj).astype(int)
            for folder in (volumes, tmp_path / "out")
        )
        changed = [bool((clean[:, :, z] != written[:, :, z]).any()) for z in range(6)]
        assert changed == [False, False, True, True, True, False]


def test_bad_volumes_are_named(job, volumes, tmp_path, rng, save_volume, disc):
    voxels = rng.integers(100, 900, (36, 40, 6)).astype(np.float32)
    labels = np.repeat(disc().T[:, :, None], 6, axis=2)
    broken = voxels.copy()
    broken[3, 3, 3] = np.nan
    moved = np.diag([1.0, 1, 1, 1])
    moved[0, 3] = 5
    cases = {
        "4d": (np.stack([voxels] * 2, axis=3), labels, None),
        "not-finite": (broken, labels, None),
        "mask-grid": (voxels, labels, moved),
        "mask-size": (voxels, labels[:, :, :5], None),
        "empty-mask": (voxels, np.zeros_like(labels), None),
        "full-mask": (voxels, np.ones_like(labels), None),
        "unknown-class": (voxels, labels * 5, None),
    }
    for number, (image, mask, affine) in enumerate(cases.values(), start=10):
        save_volume(volumes / "images" / f"{number}.nii.gz", image)
        save_volume(volumes / "labels" / f"{number}.nii.gz", mask, affine)
    outcome = protect(job(volumes, tmp_path / "out"))
    found = reasons(outcome)
    assert {name: reason for name, reason in found.items() if name.startswith("images")} == {
        f"images/{number}.nii.gz": reason for number, reason in enumerate(cases, start=10)
    }
    assert outcome.totals.verified == 12


def test_a_label_map_that_holds_nan_leaves_its_volume_without_a_mask(job, volumes, tmp_path, save_volume):
    save_volume(volumes / "labels/1.nii.gz", np.full((36, 40, 6), np.nan, np.float32))
    found = reasons(protect(job(volumes, tmp_path / "out")))
    assert found == {"images/1.nii.gz": "missing-mask", "labels/1.nii.gz": "not-finite"}


def test_a_volume_in_which_nothing_can_move_is_not_called_protected(job, volumes, tmp_path, perturber, says):
    outcome = protect(job(volumes, tmp_path / "out", perturber=perturber(generator=says(0.0))))
    assert (outcome.totals.verified, outcome.totals.not_protectable) == (0, 12)
