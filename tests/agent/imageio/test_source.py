"""Going through a source: nothing is followed out of it, nothing is lost, every target is distinct."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.imageio import Taxonomy, folder_label, raster_formats, read_label_table, scan
from medveil.models.errors import ConfigurationError, ImageError, InputError

GREY = np.full((6, 6), 90, np.uint8)


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(GREY).save(path)
    return path


def reasons(listing) -> dict[str, str]:
    return {str(entry.relative): entry.code for entry in listing.quarantined}


def test_files_are_found_in_sorted_order_at_any_depth(tmp_path):
    for name in ("b/2.png", "a/x/1.png", "a/0.png"):
        save(tmp_path / name)
    found = scan(tmp_path, raster_formats())
    assert [str(item.relative) for item in found.items] == ["a/0.png", "a/x/1.png", "b/2.png"]


def test_a_single_file_is_a_source(tmp_path):
    (item,) = scan(save(tmp_path / "x.png"), raster_formats()).items
    assert item.relative == PurePosixPath("x.png")


def test_what_is_no_image_is_quarantined_and_system_files_are_counted(tmp_path):
    save(tmp_path / "a/1.png")
    (tmp_path / "a/notes.txt").write_text("hello")
    (tmp_path / "a/empty.png").touch()
    (tmp_path / "a/.DS_Store").write_text("x")
    (tmp_path / "a/Thumbs.db").write_text("x")
    (tmp_path / "labels.csv").write_text("file,label\n")
    found = scan(tmp_path, raster_formats())
    assert reasons(found) == {"a/notes.txt": "not-an-image", "a/empty.png": "empty-file"}
    assert found.ignored == 2


def test_links_are_not_followed_out_of_the_source_and_loops_are_harmless(tmp_path):
    outside = save(tmp_path / "outside/1.png")
    source = tmp_path / "source"
    inside = save(source / "a/1.png")
    (source / "a/out.png").symlink_to(outside)
    (source / "a/in.png").symlink_to(inside)
    (source / "a/loop").symlink_to(source)
    (source / "a/folder").symlink_to(outside.parent)
    (source / "a/dangling.png").symlink_to(source / "nothing")
    found = scan(source, raster_formats())
    assert [str(item.relative) for item in found.items] == ["a/1.png", "a/in.png"]
    assert reasons(found) == {
        "a/out.png": "link-outside",
        "a/folder": "link-outside",
        "a/dangling.png": "unreadable",
    }


def test_a_pipe_is_quarantined_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert reasons(scan(tmp_path, raster_formats())) == {"pipe.png": "not-a-file"}


def test_a_name_that_is_not_text_is_quarantined(tmp_path):
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(save(tmp_path / "ok.png").read_bytes())
    assert reasons(scan(tmp_path, raster_formats())) == {"bad\\xff.png": "file-name"}


def test_every_file_has_a_target_of_its_own_also_where_case_does_not_count(tmp_path):
    for name in ("a/x.png", "a/x.jpg", "a/X.jpeg", "a/x.jpg.png"):
        save(tmp_path / name)
    targets = {str(i.relative): str(i.target) for i in scan(tmp_path, raster_formats()).items}
    assert targets["a/x.png"] == "a/x.png"
    assert targets["a/x.jpg.png"] == "a/x.jpg.png"
    assert len({target.casefold() for target in targets.values()}) == 4


def test_a_missing_source_is_an_input_error(tmp_path):
    with pytest.raises(InputError) as caught:
        scan(tmp_path / "nothing", raster_formats())
    assert caught.value.code == "no-source"


TAXONOMY = Taxonomy(("Normal", "Pneumonia"), (0, 7))


@pytest.mark.parametrize(
    ("label", "index"), [("normal", 0), (" PNEUMONIA ", 1), (0, 0), (7, 1), ("7", 1), ("0", 0)]
)
def test_a_label_is_matched_by_name_or_by_stored_value(label, index):
    assert TAXONOMY.index(label) == index


@pytest.mark.parametrize(
    ("label", "code"),
    [(None, "missing-label"), (" ", "missing-label"), ("cat", "unknown-class"), (1, "unknown-class")],
)
def test_other_labels_are_refused_by_name(label, code):
    with pytest.raises(ImageError) as caught:
        TAXONOMY.index(label)
    assert caught.value.code == code


def test_classes_must_be_distinct():
    with pytest.raises(ConfigurationError):
        Taxonomy(("a", "A"), (0, 1))


def test_the_sites_own_names_come_first_and_those_for_other_bundles_are_passed_over():
    taxonomy = Taxonomy(("Normal", "Pneumonia"), (0, 7), {"Healthy": "normal", "3": "Pneumonia", "7": "Cat"})
    assert [taxonomy.index(label) for label in ("healthy ", "3", 3, "Normal", 7, "7")] == [0, 1, 1, 0, 1, 1]
    assert folder_label(PurePosixPath("train/healthy/1.png"), taxonomy) == "healthy"
    swapped = Taxonomy(("Normal", "Pneumonia"), (0, 7), {"0": "Pneumonia"})
    assert [swapped.index(label) for label in (0, "0", "Normal")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("normal/1.png", "normal"),
        ("train/Pneumonia/p1/1.png", "Pneumonia"),
        ("cats/1.png", "cats"),
        ("1.png", None),
    ],
)
def test_the_class_is_the_first_folder_that_names_one(path, label):
    assert folder_label(PurePosixPath(path), TAXONOMY) == label


def table(tmp_path: Path, text: str):
    (tmp_path / "l.csv").write_bytes(text.encode())
    return read_label_table(tmp_path / "l.csv")


def test_the_labels_file_names_each_image(tmp_path):
    found = table(tmp_path, "\ufeffid,Label,File\n1, normal ,a\\1.png\n2,pneumonia,b.png\n\n")
    assert found.label(PurePosixPath("a/1.png")) == "normal"
    assert found.label(PurePosixPath("b.png")) == "pneumonia"


@pytest.mark.parametrize(("path", "code"), [("c.png", "missing-label"), ("a.png", "label-conflict")])
def test_no_label_or_two_labels_are_refused_by_name(path, code, tmp_path):
    found = table(tmp_path, "file,label\na.png,x\na.png,y\nb.png,x\nb.png,x\n")
    assert found.label(PurePosixPath("b.png")) == "x"
    with pytest.raises(ImageError) as caught:
        found.label(PurePosixPath(path))
    assert caught.value.code == code


@pytest.mark.parametrize("text", ["", "name,class\n", 'file,label\n"a'])
def test_a_file_that_is_no_labels_file_is_refused_as_a_whole(text, tmp_path):
    with pytest.raises(InputError):
        table(tmp_path, text)
