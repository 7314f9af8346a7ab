from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from medveil.models.datasets import LabelledSet, load_labelled, split_names, stratified_split
from medveil.models.errors import ConfigurationError, InputError

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
RGB = np.stack([GREY, GREY[::-1], GREY.T], axis=2)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "set.npz", **arrays)
    return path / "set.npz"


def code_of(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_labelled(path, **options)  # type: ignore[arg-type]
    assert str(path) not in caught.value.public
    return caught.value.code


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder per class with the same picture in every form that is read."""
    root = tmp_path / "classes"
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
    Image.fromarray(GREY).save(root / "cats" / "a.png")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(root / "cats" / "b.png")
    tifffile.imwrite(root / "dogs" / "c.tif", GREY.astype(np.uint16) * 257)
    Image.fromarray(GREY).save(root / "dogs" / "d.jpg", quality=100)
    return root


def test_an_npz_keeps_its_label_values_and_range(tmp_path: Path) -> None:
    images = np.stack([GREY, 255 - GREY, GREY])
    path = npz(tmp_path, train_images=images, train_labels=np.array([[5], [2], [5]], np.uint8))
    data = load_labelled(path)
    assert data.classes == ("2", "5")
    assert data.stored_values == (2, 5)
    assert data.labels.tolist() == [1, 0, 1]
    assert data.images.shape == (3, 1, 8, 8)
    assert data.images.dtype == np.float32
    assert np.array_equal(np.rint(data.images[:, 0] * 255), images)


def test_eight_and_sixteen_bits_mean_the_same_image(folders: Path) -> None:
    data = load_labelled(folders)
    assert data.classes == ("cats", "dogs")
    assert data.labels.tolist() == [0, 0, 1, 1]
    a, b, c, d = data.images
    assert np.allclose(a, b, atol=1e-6)
    assert np.allclose(a, c, atol=1e-6)
    assert np.abs(a - d).max() < 3 / 255  # JPEG loses a little


def test_colour_is_kept_only_where_there_is_colour(tmp_path: Path) -> None:
    labels = np.array([0, 1])
    grey = np.repeat(GREY[None, ..., None], 3, axis=3)
    colour = np.concatenate([grey, RGB[None]])
    assert load_labelled(
        npz(tmp_path, train_images=np.concatenate([grey, grey]), train_labels=labels)
    ).images.shape == (2, 1, 8, 8)
    path = npz(tmp_path, train_images=colour, train_labels=labels)
    assert load_labelled(path).images.shape == (2, 3, 8, 8)
    luma = load_labelled(path, channels=1).images[1, 0]
    assert np.allclose(luma, RGB @ np.array([0.299, 0.587, 0.114]) / 255, atol=1e-5)


def test_sixteen_bit_colour_png_is_not_cut_to_eight_bits(tmp_path: Path) -> None:
    import imagecodecs

    fine = RGB.astype(np.uint16) * 257 + 1
    for name in ("a", "b"):
        (tmp_path / "c" / name).mkdir(parents=True)
        (tmp_path / "c" / name / "x.png").write_bytes(imagecodecs.png_encode(fine))
    data = load_labelled(tmp_path / "c")
    assert np.array_equal(np.rint(np.moveaxis(data.images[0], 0, 2).astype(np.float64) * 65535), fine)


def test_other_sizes_are_resized_without_aliasing(tmp_path: Path) -> None:
    stripes = np.zeros((1, 64, 48), np.uint8)
    stripes[:, :, ::2] = 255
    path = npz(tmp_path, train_images=stripes, train_labels=np.array([0]))
    small = load_labelled(path, size=16).images[0, 0]
    assert small.shape == (16, 16)
    assert (
        np.abs(small[:, 1:-1] - 0.5).max() < 0.1
    )  # every second column taken would be all black or all white
    assert load_labelled(path).images.shape[2:] == (64, 64)


def test_a_labels_file_names_classes_and_splits(tmp_path: Path) -> None:
    for name in ("one.png", "two.png", "three.png"):
        Image.fromarray(GREY).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text(
        "file,label,split\ntwo.png,ill,train\none.png,well,train\nthree.png,ill,test\n"
    )
    assert split_names(tmp_path) == ("test", "train")
    data = load_labelled(tmp_path)
    assert (data.classes, data.labels.tolist()) == (("ill", "well"), [1, 0])
    assert len(load_labelled(tmp_path, split="test")) == 1


def test_split_folders_are_splits(folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "divided"
    root.mkdir()
    folders.rename(root / "train")
    (root / "test" / "cats").mkdir(parents=True)
    Image.fromarray(GREY).save(root / "test" / "cats" / "x.png")
    assert split_names(root) == ("test", "train")
    assert len(load_labelled(root)) == 4
    assert len(load_labelled(root, split="test")) == 1


def test_the_digest_is_that_of_the_content(folders: Path, tmp_path: Path) -> None:
    def content(path: Path) -> LabelledSet:
        return load_labelled(path, class_names=("cats", "dogs"))

    once = load_labelled(folders)
    assert load_labelled(folders).digest == once.digest
    packed = npz(tmp_path, train_images=np.stack([GREY] * 2), train_labels=np.array([0, 1]))
    first = content(packed).digest
    changed = npz(tmp_path, train_images=np.stack([GREY, GREY + 1]), train_labels=np.array([0, 1]))
    assert content(changed).digest != first
    swapped = npz(tmp_path, train_images=np.stack([GREY] * 2), train_labels=np.array([1, 0]))
    assert content(swapped).digest != first


def test_npz_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    images, labels = np.stack([GREY] * 2), np.array([0, 1])
    cases = {
        "labels-missing": {"train_images": images},
        "split-missing": {"train_labels": labels},
        "labels-mismatch": {"train_images": images, "train_labels": labels[:1]},
        "no-images": {"train_images": images[:0], "train_labels": labels[:0]},
    }
    for code, arrays in cases.items():
        assert code_of(npz(tmp_path, **arrays)) == code
    for arrays in (
        {"train_images": images.astype(np.float32), "train_labels": labels},
        {"train_images": images, "train_labels": labels.astype(np.float32)},
        {"train_images": np.array([{"a": 1}, 2], object), "train_labels": labels},
    ):
        assert code_of(npz(tmp_path, **arrays)) == "data-format"
    several = {"train_images": images, "train_labels": np.zeros((2, 14), np.uint8)}
    assert code_of(npz(tmp_path, **several)) == "labels-mismatch"
    truncated = npz(tmp_path, train_images=images, train_labels=labels)
    truncated.write_bytes(truncated.read_bytes()[:300])
    assert code_of(truncated) == "data-format"
    truncated.write_bytes(b"")
    assert code_of(truncated) == "data-format"
    assert code_of(tmp_path / "nothing.npz") == "data-missing"


def test_folders_that_cannot_be_used_are_refused_by_name(folders: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert code_of(empty) == "no-images"
    Image.fromarray(GREY).save(folders / "stray.png")
    assert code_of(folders) == "labels-missing"
    (folders / "stray.png").unlink()
    for content in (b"", (folders / "cats" / "a.png").read_bytes()[:60], b"not an image"):
        (folders / "cats" / "z.png").write_bytes(content)
        assert code_of(folders) == "unreadable-image"


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ("file,label\none.png,\n", "labels-missing"),
        ("file,label\ngone.png,1\n", "image-missing"),
        ("file,label\n../one.png,1\n", "data-format"),
        ("name,class\none.png,1\n", "data-format"),
        ("", "no-images"),
    ],
)
def test_labels_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path, rows: str, code: str) -> None:
    Image.fromarray(GREY).save(tmp_path / "one.png")
    (tmp_path / "labels.csv").write_text(rows)
    assert code_of(tmp_path) == code


def test_wrong_class_names_are_a_configuration_error(folders: Path) -> None:
    for names in (("one",), ("same", "same"), ("a", "b", "c")):
        with pytest.raises(ConfigurationError) as caught:
            load_labelled(folders, class_names=names)
        assert caught.value.code == "class-names"


def test_a_split_has_every_class_in_both_parts_and_loses_nobody(rng: np.random.Generator) -> None:
    labels = np.repeat([0, 1, 2], [100, 30, 2])
    first, second = stratified_split(labels, 0.3, rng)
    assert sorted([*first, *second]) == list(range(132))
    assert np.bincount(labels[second]).tolist() == [30, 9, 1]
    again = stratified_split(labels, 0.3, np.random.default_rng(20261121))
    assert np.array_equal(again[1], second)
