"""NPZ in the MedMNIST layout: streamed, never unpickled, every split, rows left out with their labels."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from medveil.agent.imageio import Item, NpzFormat
from medveil.models.errors import ImageError

FORMAT = NpzFormat()


def inspect(path: Path) -> Item:
    return FORMAT.inspect(path, PurePosixPath(path.name))


def write(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


IMAGES = np.full((4, 5, 6), 90, np.uint8)
LABELS = np.array([0, 1, 0, 1], np.uint8)

REFUSED = [
    ("object-array", {"a_images": np.array([IMAGES, None], object), "a_labels": LABELS}),
    ("object-array", {"a_images": IMAGES, "a_labels": np.array(["x", None, 1, 2], object)}),
    ("no-images", {"pictures": LABELS}),
    ("no-pixels", {"a_images": IMAGES[:0], "a_labels": LABELS[:0]}),
    ("unknown-array", {"a_images": IMAGES, "a_labels": LABELS, "pictures": IMAGES}),
    ("sample-type", {"a_images": IMAGES.astype(np.float32), "a_labels": LABELS}),
    ("layout", {"a_images": np.zeros((4, 5, 6, 7), np.uint8), "a_labels": LABELS}),
    ("layout", {"a_images": np.asfortranarray(IMAGES), "a_labels": LABELS}),
    ("label-count", {"a_images": IMAGES, "a_labels": LABELS[:3]}),
    ("multi-label", {"a_images": IMAGES, "a_labels": np.zeros((4, 14), np.uint8)}),
]


@pytest.mark.parametrize(("code", "arrays"), REFUSED, ids=[f"{i}-{c}" for i, (c, _) in enumerate(REFUSED)])
def test_what_cannot_be_used_is_refused_by_name(code, arrays, tmp_path):
    with pytest.raises(ImageError) as caught:
        inspect(write(tmp_path / "x.npz", **arrays))
    assert caught.value.code == code


def test_an_array_that_holds_more_or_less_than_it_says_is_refused_before_it_is_unpacked(tmp_path):
    header = io.BytesIO()
    np.save(header, IMAGES)
    for values in (header.getvalue()[:-1], header.getvalue() + b"\0" * 2**20):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a_images.npy", values)
        with pytest.raises(ImageError) as caught:
            inspect(tmp_path / "x.npz")
        assert caught.value.code == "damaged"


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_a_truncated_archive_is_refused(keep, tmp_path):
    data = write(tmp_path / "x.npz", a_images=IMAGES, a_labels=LABELS).read_bytes()
    (tmp_path / "x.npz").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ImageError) as caught:
        inspect(tmp_path / "x.npz")
    assert caught.value.code == "damaged"


def test_a_flipped_byte_inside_the_pixels_is_noticed(tmp_path):
    data = bytearray(write(tmp_path / "x.npz", a_images=IMAGES, a_labels=LABELS).read_bytes())
    data[200] ^= 1
    (tmp_path / "x.npz").write_bytes(bytes(data))
    with pytest.raises(ImageError) as caught:
        FORMAT.open(inspect(tmp_path / "x.npz"), tmp_path).__enter__()
    assert caught.value.code == "damaged"


def test_frames_run_through_all_splits_and_carry_their_labels(npz_source, tmp_path):
    item = inspect(npz_source)
    assert item.frames == 40
    with FORMAT.open(item, tmp_path) as frames, np.load(npz_source) as arrays:
        every = np.concatenate([arrays[f"{s}_images"] for s in ("train", "val", "test")])
        labels = np.concatenate([arrays[f"{s}_labels"] for s in ("train", "val", "test")]).ravel()
        for i in range(40):
            assert np.array_equal(frames[i].pixels, every[i])
            assert frames[i].label == labels[i]


def test_rows_that_are_left_out_go_with_their_labels_and_nothing_else_moves(npz_source, tmp_path):
    item = inspect(npz_source)
    kept = [i for i in range(40) if i not in (3, 25)]
    with FORMAT.open(item, tmp_path) as frames:
        FORMAT.write(item, kept, (frames[i].pixels for i in kept), tmp_path / "out.npz")
    with np.load(npz_source) as source, np.load(tmp_path / "out.npz") as out:
        assert list(out) == list(source)
        assert np.array_equal(out["train_images"], np.delete(source["train_images"], 3, 0))
        assert np.array_equal(out["train_labels"], np.delete(source["train_labels"], 3, 0))
        assert np.array_equal(out["val_images"], np.delete(source["val_images"], 1, 0))
        assert np.array_equal(out["test_labels"], source["test_labels"])


def test_other_arrays_are_copied_untouched(tmp_path):
    path = write(tmp_path / "x.npz", a_images=IMAGES, a_labels=LABELS, names=np.array(["a", "b"]))
    item = inspect(path)
    FORMAT.write(item, [0], [IMAGES[0]], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as out:
        assert out["names"].tolist() == ["a", "b"]


def test_a_split_without_labels_is_read_without_labels(tmp_path):
    item = inspect(write(tmp_path / "x.npz", a_images=IMAGES))
    with FORMAT.open(item, tmp_path) as frames:
        assert frames[0].label is None


def test_all_splits_share_one_range(tmp_path):
    dark, bright = np.full((1, 4, 4), 300, np.uint16), np.full((1, 4, 4), 4000, np.uint16)
    item = inspect(write(tmp_path / "x.npz", a_images=dark, b_images=bright))
    with FORMAT.open(item, tmp_path) as frames:
        assert frames[0].window == frames[1].window
