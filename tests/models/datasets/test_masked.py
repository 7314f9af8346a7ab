from __future__ import annotations

from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import pytest

from medveil.models.datasets.masked import cut_patches, load_masked
from medveil.models.errors import ConfigurationError, InputError


def write_png(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(imagecodecs.png_encode(pixels))


def write_nifti(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)


@pytest.fixture
def pictures(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Three images of different sizes, one of them in 16 bits; masks with the values 0, 128 and 255."""
    for number, (rows, columns) in enumerate([(20, 24), (24, 20), (30, 30)]):
        top = np.uint16 if number == 2 else np.uint8
        write_png(
            tmp_path / "images" / f"{number}.png", rng.integers(0, np.iinfo(top).max, (rows, columns), top)
        )
        mask = np.zeros((rows, columns), np.uint8)
        mask[4:9, 4:9], mask[12:16, 12:16] = 128, 255
        write_png(tmp_path / "masks" / f"{number}.png", mask)
    return tmp_path


def test_stored_values_become_classes_and_images_keep_their_size(pictures: Path) -> None:
    data = load_masked(pictures)
    assert data.stored_values == (0, 128, 255)
    assert data.classes == ("background", "128", "255")
    assert [label.shape for label in data.labels] == [(20, 24), (24, 20), (30, 30)]
    assert data.labels[0][5, 5] == 1
    assert data.labels[0][13, 13] == 2
    assert all(image.min() >= 0 and 0.9 < image.max() <= 1 for image in data.images)


def test_names_replace_the_values(pictures: Path) -> None:
    names = ("outside", "cytoplasm", "nucleus")
    assert load_masked(pictures, class_names=names).classes == names
    with pytest.raises(ConfigurationError) as refused:
        load_masked(pictures, class_names=("outside", "cell"))
    assert refused.value.code == "class-names"


def test_grey_images_beside_coloured_ones_get_three_equal_channels(pictures: Path) -> None:
    colour = np.zeros((20, 20, 3), np.uint8)
    colour[..., 0] = 200
    write_png(pictures / "images" / "red.png", colour)
    write_png(pictures / "masks" / "red.png", np.eye(20, dtype=np.uint8) * 128)
    data = load_masked(pictures)
    assert data.channels == 3
    assert (data.images[0] == data.images[0][:1]).all()


def test_names_with_dots_are_whole_names(tmp_path: Path, rng: np.random.Generator) -> None:
    """As those of DICOM instances: what stands before the first dot is the same for all of them."""
    for number in (7, 8):
        write_png(tmp_path / f"images/1.2.840.{number}.png", np.full((8, 8), number, np.uint8))
        mask = np.zeros((8, 8), np.uint8)
        mask[number - 7] = 1
        write_png(tmp_path / f"masks/1.2.840.{number}.png", mask)
    data = load_masked(tmp_path)
    assert [int(label.argmax()) for label in data.labels] == [0, 8]


def test_a_decathlon_s_folders_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    write_nifti(tmp_path / "imagesTr/a_1.nii.gz", rng.normal(size=(8, 8, 3)))
    write_nifti(tmp_path / "labelsTr/a_1.nii.gz", (rng.random((8, 8, 3)) > 0.5).astype(float))
    assert len(load_masked(tmp_path)) == 1


def test_the_digest_follows_the_content(pictures: Path) -> None:
    before = load_masked(pictures).digest
    assert load_masked(pictures).digest == before
    mask = np.zeros((20, 24), np.uint8)
    mask[5, 5], mask[6, 6] = 128, 255
    write_png(pictures / "masks" / "0.png", mask)
    assert load_masked(pictures).digest != before


def test_an_npz_holds_the_same_set(tmp_path: Path, rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (3, 16, 12), np.uint8)
    masks = (images > 128).astype(np.uint8)
    for name, prefix in (("plain", ""), ("splits", "train_")):
        np.savez(tmp_path / f"{name}.npz", **{f"{prefix}images": images, f"{prefix}masks": masks})
    plain, splits = (load_masked(tmp_path / f"{name}.npz") for name in ("plain", "splits"))
    assert plain.digest == splits.digest
    assert len(plain) == 3
    np.testing.assert_allclose(plain.images[1][0], images[1] / 255, atol=1e-6)
    assert (plain.labels[1] == masks[1]).all()


def test_a_volume_is_read_slice_by_slice_in_its_percentile_window(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    values = rng.normal(1000, 50, (10, 9, 6)).astype(np.float32)
    labels = np.zeros((10, 9, 6), np.uint8)
    labels[2:5, 3:6, 4] = 2
    write_nifti(tmp_path / "images" / "a.nii.gz", values)
    write_nifti(tmp_path / "labels" / "a.nii.gz", labels)
    data = load_masked(tmp_path)
    assert data.images[0].shape == (1, 6, 10, 9)
    assert data.labels[0].shape == (6, 10, 9)
    assert data.labels[0][4, 2, 3] == 1
    assert data.images[0].min() == 0
    assert data.images[0].max() == 1


def spoil_mask_size(root: Path) -> None:
    write_png(root / "masks" / "0.png", np.ones((5, 5), np.uint8))


def spoil_missing(root: Path) -> None:
    (root / "masks" / "1.png").unlink()


def spoil_image(root: Path) -> None:
    (root / "images" / "2.png").write_bytes(b"no image")


def spoil_colour(root: Path) -> None:
    write_png(
        root / "masks" / "0.png", np.arange(20 * 24 * 3, dtype=np.uint16).astype(np.uint8).reshape(20, 24, 3)
    )


def spoil_empty(root: Path) -> None:
    for file in (root / "masks").iterdir():
        shape = imagecodecs.png_decode(file.read_bytes()).shape
        write_png(file, np.zeros(shape, np.uint8))


def spoil_folder(root: Path) -> None:
    (root / "masks").rename(root / "other")


def spoil_all(root: Path) -> None:
    for file in (root / "images").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (spoil_mask_size, "mask-size"),
        (spoil_missing, "mask-missing"),
        (spoil_image, "unreadable-image"),
        (spoil_colour, "mask-values"),
        (spoil_empty, "no-foreground"),
        (spoil_folder, "data-format"),
        (spoil_all, "no-images"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(pictures: Path, spoil: object, code: str) -> None:
    spoil(pictures)  # type: ignore[operator]
    with pytest.raises(InputError) as refused:
        load_masked(pictures)
    assert refused.value.code == code
    assert str(pictures) not in refused.value.public


@pytest.mark.parametrize(
    ("image", "label", "code"),
    [
        (np.full((6, 6, 6), np.nan, np.float32), np.ones((6, 6, 6), np.uint8), "not-finite"),
        (np.ones((6, 6, 6, 2), np.float32), np.ones((6, 6, 6), np.uint8), "data-format"),
        (np.ones((6, 6, 6), np.float32), np.full((6, 6, 6), 0.5, np.float32), "mask-values"),
        (np.ones((6, 6, 6), np.float32), np.full((6, 6, 6), -1, np.int16), "mask-values"),
    ],
    ids=["nan", "four-axes", "fraction", "negative"],
)
def test_volumes_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path, image: np.ndarray, label: np.ndarray, code: str
) -> None:
    write_nifti(tmp_path / "images" / "a.nii", image)
    write_nifti(tmp_path / "labels" / "a.nii", label)
    with pytest.raises(InputError) as refused:
        load_masked(tmp_path)
    assert refused.value.code == code


def test_a_file_that_is_no_archive_and_a_path_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 cut short")
    for path, code in ((tmp_path / "x.npz", "data-format"), (tmp_path / "none", "data-missing")):
        with pytest.raises(InputError) as refused:
            load_masked(path)
        assert refused.value.code == code


def test_patches_hold_pixels_and_labels_of_one_place(pictures: Path) -> None:
    data = load_masked(pictures)
    patches = cut_patches(data, 16, 5, np.random.default_rng(0))
    assert patches.images.shape == (15, 1, 16, 16)
    assert patches.classes == 3
    for number, (image, label) in enumerate(zip(patches.images, patches.labels, strict=True)):
        source, marks = data.images[number // 5], data.labels[number // 5]
        places = [
            (top, left)
            for top in range(marks.shape[0] - 15)
            for left in range(marks.shape[1] - 15)
            if np.array_equal(source[:, top : top + 16, left : left + 16], image)
        ]
        assert len(places) == 1
        (top, left) = places[0]
        assert np.array_equal(marks[top : top + 16, left : left + 16], label)
    again = cut_patches(data, 16, 5, np.random.default_rng(0))
    assert again.images.tobytes() == patches.images.tobytes()


def test_small_images_are_padded_and_volumes_cut_to_slices_or_boxes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((10, 9, 6)).astype(np.float32)
    labels = np.zeros((10, 9, 6), np.uint8)
    labels[4:6, 4:6, 2:5] = 1
    write_nifti(tmp_path / "images" / "a.nii", values)
    write_nifti(tmp_path / "labels" / "a.nii", labels)
    data = load_masked(tmp_path)
    slices = cut_patches(data, 16, 3, np.random.default_rng(0))
    assert slices.images.shape == (3, 1, 16, 16)
    assert (slices.labels.reshape(3, -1) > 0).any(axis=1).all(), "a slice without foreground teaches nothing"
    assert not slices.images[:, :, 10:].any()
    boxes = cut_patches(data, 8, 2, np.random.default_rng(0), depth=4)
    assert boxes.images.shape == (2, 1, 4, 8, 8)
    assert boxes.labels.shape == (2, 4, 8, 8)
