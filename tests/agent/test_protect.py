"""The main job on an analytic surrogate: every image accounted for, nothing exceeds the budget, nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage

from medveil.agent import batching
from medveil.agent.imageio import Item, raster_formats
from medveil.agent.ledger import Ledger
from medveil.agent.protect import Job, Outcome, protect
from medveil.agent.restore import restore
from medveil.agent.sealing import load_site_key
from medveil.agent.workspace import open_workspace
from medveil.models.errors import BusyError, ConfigurationError, ImageError, InputError, StorageError


def tree(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(analytic: ModuleType, tmp_path: Path) -> Callable[..., Outcome]:
    """Protect a source into ``tmp_path/out``."""

    def go(source: Path, out: Path | None = None, **changes: object) -> Outcome:
        return protect(analytic.make_job(source, out or tmp_path / "out", **changes))

    return go


def test_every_image_of_a_tree_is_verified_and_mirrored(run, folder_source, tmp_path):
    outcome = run(folder_source)
    assert (outcome.totals.images, outcome.totals.verified) == (6, 6)
    images = {name for name in tree(tmp_path / "out") if name.endswith(".png")}
    assert images == set(tree(folder_source))


def test_no_image_exceeds_the_budget_or_the_mask(run, folder_source, tmp_path):
    run(folder_source, epsilon=5.0, mask=0.2)
    for path in folder_source.rglob("*.png"):
        clean = np.asarray(PillowImage.open(path)).astype(int)
        written = np.asarray(PillowImage.open(tmp_path / "out" / path.relative_to(folder_source))).astype(int)
        assert 0 < np.abs(written - clean).max() <= 5
        assert np.count_nonzero(written != clean) <= math.ceil(0.2 * clean.size)


def test_the_source_is_not_touched(run, folder_source):
    before = tree(folder_source), [p.stat().st_mtime_ns for p in sorted(folder_source.rglob("*"))]
    run(folder_source)
    assert (tree(folder_source), [p.stat().st_mtime_ns for p in sorted(folder_source.rglob("*"))]) == before


def test_pixels_of_a_file_that_was_finished_just_before_a_kill_are_removed(run, npz_source, tmp_path):
    run(npz_source)
    left = tmp_path / "out.private/spool/1.frames"
    left.write_bytes(b"protected pixels")
    run(npz_source)
    assert not left.exists()


def test_every_split_of_an_npz_is_protected(run, npz_source, tmp_path):
    outcome = run(npz_source)
    assert outcome.totals.verified == 40
    with np.load(npz_source) as clean, np.load(tmp_path / "out/set.npz") as written:
        assert list(clean) == list(written)
        for name in clean:
            change = np.abs(written[name].astype(int) - clean[name])
            if name.endswith("_images"):
                assert (change.max(axis=(1, 2)) > 0).all()
                assert change.max() <= 8
            else:
                assert change.max() == 0


def test_the_same_job_gives_the_same_bytes_anywhere(run, folder_source, tmp_path):
    run(folder_source, tmp_path / "one")
    run(folder_source, tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_an_image_gets_the_same_noise_in_any_company(run, folder_source, tmp_path):
    run(folder_source, tmp_path / "all")
    for path in sorted(folder_source.rglob("*.png"))[1:]:
        path.unlink()
    run(folder_source, tmp_path / "alone")
    name = "normal/0.png"
    assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_a_batch_changes_no_byte(size, run, folder_source, npz_source, tmp_path, monkeypatch):
    for source in (folder_source, npz_source):
        run(source, tmp_path / f"usual-{source.name}")
        with monkeypatch.context() as patch:
            patch.setattr(batching, "_BATCH_IMAGES", size)
            run(source, tmp_path / f"other-{source.name}")
        assert tree(tmp_path / f"usual-{source.name}") == tree(tmp_path / f"other-{source.name}")


def test_noise_does_not_depend_on_the_name(run, folder_source, tmp_path):
    (folder_source / "normal/zzz.png").write_bytes((folder_source / "normal/0.png").read_bytes())
    run(folder_source)
    assert (tmp_path / "out/normal/zzz.png").read_bytes() == (tmp_path / "out/normal/0.png").read_bytes()


def test_a_second_run_repeats_nothing_and_changes_nothing(analytic, folder_source, tmp_path):
    oracle = analytic.LinearOracle()
    protect(analytic.make_job(folder_source, tmp_path / "out", oracle=oracle))
    before, asked = tree(tmp_path / "out"), oracle.images_seen
    outcome = protect(analytic.make_job(folder_source, tmp_path / "out", oracle=oracle))
    assert (outcome.finished, oracle.images_seen) == (0, asked)
    assert outcome.totals.verified == 6
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["delete", "change", "no sidecar"])
def test_a_released_file_that_is_gone_or_changed_is_made_again(damage, run, folder_source, tmp_path):
    run(folder_source)
    before = tree(tmp_path / "out")
    target = tmp_path / "out/normal/1.png"
    if damage == "delete":
        target.unlink()
    elif damage == "change":
        target.write_bytes(b"x")
    else:
        (tmp_path / "out.private/sidecars/normal/1.png.sealed").unlink()
    assert run(folder_source).finished == 1
    assert tree(tmp_path / "out") == before


def test_images_added_later_join_the_release(run, folder_source, picture):
    run(folder_source)
    save(folder_source / "normal/9.png", picture())
    outcome = run(folder_source)
    assert (outcome.finished, outcome.totals.verified) == (1, 7)


def test_a_source_file_that_changed_is_protected_anew(run, folder_source, tmp_path, picture):
    run(folder_source)
    before = tree(tmp_path / "out")
    save(folder_source / "normal/1.png", picture(9, 9))
    assert run(folder_source).finished == 1
    after = tree(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {
        "normal/1.png",
        "medveil-release.json",
    }


@pytest.mark.parametrize(("kept", "reason"), [(-20, "truncated"), (0, "empty-file"), (4, "not-an-image")])
def test_a_source_file_that_became_unusable_takes_its_old_copy_with_it(
    kept, reason, run, folder_source, tmp_path
):
    run(folder_source)
    path = folder_source / "normal/1.png"
    path.write_bytes(path.read_bytes()[:kept])
    outcome = run(folder_source)
    assert outcome.totals.quarantined == {reason: 1}
    assert not (tmp_path / "out/normal/1.png").exists()
    assert run(folder_source).totals.verified == 5


def test_other_settings_need_another_folder(run, folder_source):
    run(folder_source)
    with pytest.raises(ConfigurationError) as caught:
        run(folder_source, epsilon=4.0)
    assert caught.value.code == "settings-changed"


# --- bad input


def test_an_empty_folder_is_an_input_error_and_creates_nothing(run, tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(InputError) as caught:
        run(tmp_path / "source")
    assert caught.value.code == "nothing-found"
    assert not (tmp_path / "out").exists()


def test_bad_files_are_quarantined_by_name_and_the_batch_goes_on(run, folder_source, tmp_path, picture):
    good = (folder_source / "normal/0.png").read_bytes()
    (folder_source / "normal/cut.png").write_bytes(good[:-30])
    (folder_source / "normal/nothing.png").touch()
    (folder_source / "normal/notes.txt").write_text("hello")
    save(folder_source / "cats/1.png", picture())
    save(folder_source / "loose.png", picture())
    outcome = run(folder_source)
    assert outcome.totals.verified == 6
    assert outcome.totals.quarantined == {
        "truncated": 1,
        "empty-file": 1,
        "not-an-image": 1,
        "unknown-class": 1,
        "missing-label": 1,
    }
    assert not any("cut" in name or "cats" in name for name in tree(tmp_path / "out"))


def test_an_npz_with_object_arrays_is_quarantined_and_never_unpickled(run, folder_source, tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    np.savez(folder_source / "bad.npz", a_images=np.array([Bomb()], object))
    assert run(folder_source).totals.quarantined == {"object-array": 1}
    assert not (tmp_path / "exploded").exists()


def test_unknown_classes_of_an_npz_are_left_out_row_by_row(run, tmp_path, rng):
    images = rng.integers(30, 220, (4, 8, 8), np.uint8)
    np.savez(tmp_path / "s.npz", a_images=images, a_labels=np.array([0, 5, 1, 9], np.uint8))
    outcome = run(tmp_path / "s.npz")
    assert outcome.totals.verified == 2
    assert outcome.totals.quarantined == {"unknown-class": 2}
    with np.load(tmp_path / "out/s.npz") as written:
        assert written["a_labels"].tolist() == [0, 1]
        assert len(written["a_images"]) == 2


def test_a_labels_file_decides_and_goes_into_the_release_without_other_columns(run, folder_source, tmp_path):
    rows = [
        "file,label,patient",
        "normal/0.png,pneumonia,CANARY",
        "normal/1.png,cat,CANARY",
        "gone.png,normal,x",
    ]
    (folder_source / "labels.csv").write_text("\n".join(rows))
    outcome = run(folder_source)
    assert outcome.totals.verified == 1
    assert outcome.totals.quarantined == {"missing-label": 4, "unknown-class": 1, "missing-file": 1}
    assert (tmp_path / "out/labels.csv").read_text() == "file,label\nnormal/0.png,pneumonia\n"


def test_a_label_corrected_later_gives_other_noise(run, folder_source, tmp_path):
    labels = folder_source / "labels.csv"
    names = sorted(p.relative_to(folder_source).as_posix() for p in folder_source.rglob("*.png"))
    labels.write_text("file,label\n" + "".join(f"{name},normal\n" for name in names))
    run(folder_source)
    before = tree(tmp_path / "out")
    labels.write_text(labels.read_text().replace("pneumonia/2.png,normal", "pneumonia/2.png,pneumonia"))
    assert run(folder_source).finished == 1
    changed = {name for name, digest in tree(tmp_path / "out").items() if before.get(name) != digest}
    assert changed == {"pneumonia/2.png", "labels.csv", "medveil-release.json"}


def test_an_image_that_gets_its_label_later_leaves_quarantine_at_the_next_run(run, folder_source):
    labels = folder_source / "labels.csv"
    names = sorted(p.relative_to(folder_source).as_posix() for p in folder_source.rglob("*.png"))
    labels.write_text(
        "file,label\n" + "".join(f"{name},normal\n" for name in names[:5]) + f"{names[5]},cat\n"
    )
    assert run(folder_source).totals.quarantined == {"unknown-class": 1}
    labels.write_text(labels.read_text().replace(",cat", ",pneumonia"))
    outcome = run(folder_source)
    assert (outcome.finished, outcome.totals.verified, outcome.totals.quarantined) == (1, 6, {})


def test_a_labels_file_that_is_not_there_is_an_input_error(run, folder_source, tmp_path):
    with pytest.raises(InputError):
        run(folder_source, labels_file=tmp_path / "nothing.csv")


def test_what_does_not_fit_into_the_budget_is_never_success(run, folder_source, tmp_path):
    outcome = run(folder_source, epsilon=0.9)
    assert (outcome.totals.verified, outcome.totals.not_protectable) == (0, 6)
    assert tree(tmp_path / "out") == {}


def test_an_image_that_would_show_too_much_is_not_released(run, folder_source, tmp_path):
    outcome = run(folder_source, minimum_psnr_db=90.0)
    assert outcome.totals.not_protectable == 6
    assert tree(tmp_path / "out") == {}


def test_a_format_that_the_policy_does_not_allow_is_quarantined(run, folder_source):
    outcome = run(folder_source, allows_format=lambda name: name != "png")
    assert outcome.totals.quarantined == {"format-not-allowed": 6}


def test_a_stack_is_released_as_a_whole_or_not_at_all(run, tmp_path, picture):
    stack = picture(3, 8, 8)
    (tmp_path / "s/normal").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "s/normal/good.tif", stack, photometric="minisblack")
    outcome = run(tmp_path / "s")
    assert (outcome.totals.images, outcome.totals.verified) == (3, 3)
    written = tifffile.imread(tmp_path / "out/normal/good.tif")
    assert (np.abs(written.astype(int) - stack).max(axis=(1, 2)) > 0).all()


def test_one_page_that_cannot_be_protected_keeps_the_whole_stack_back(analytic, tmp_path, picture):
    class Half(analytic.LinearOracle):  # type: ignore[misc]
        """Sees nothing in dark images."""

        def loss_and_gradient(self, images, targets):
            losses, gradients = super().loss_and_gradient(images, targets)
            gradients[images.mean(axis=(1, 2, 3)) < 0.2] = 0
            return losses, gradients

    stack = picture(3, 8, 8)
    stack[1] //= 8
    (tmp_path / "s/normal").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "s/normal/a.tif", stack, photometric="minisblack")
    outcome = protect(analytic.make_job(tmp_path / "s", tmp_path / "out", oracle=Half()))
    assert (outcome.totals.verified, outcome.totals.not_protectable) == (0, 3)
    assert tree(tmp_path / "out") == {}

    stack[1] = 5  # a blank page shows nothing that could be learned
    tifffile.imwrite(tmp_path / "s/normal/a.tif", stack, photometric="minisblack")
    outcome = protect(analytic.make_job(tmp_path / "s", tmp_path / "out", oracle=Half()))
    assert outcome.totals.verified == 3
    assert np.array_equal(tifffile.imread(tmp_path / "out/normal/a.tif")[1], stack[1])


def test_a_gradient_that_is_no_number_costs_one_image_not_the_batch(analytic, folder_source, tmp_path):
    class Poisoned(analytic.LinearOracle):  # type: ignore[misc]
        def loss_and_gradient(self, images, targets):
            losses, gradients = super().loss_and_gradient(images, targets)
            first = np.asarray(PillowImage.open(folder_source / "normal/0.png"))
            near = np.abs(images[:, 0] * 255 - first).max(axis=(1, 2)) < 20
            gradients[near] = np.nan
            return losses, gradients

    outcome = protect(analytic.make_job(folder_source, tmp_path / "out", oracle=Poisoned()))
    assert outcome.totals.verified == 5
    assert outcome.totals.quarantined == {"not-finite": 1}


def test_a_method_that_cheats_is_held_to_the_budget(analytic, folder_source, tmp_path):
    class Cheat:
        def __init__(self, honest):
            self.settings = honest.settings

        def wanted(self, images, classes, budget):
            return np.full((len(images), 1, 8, 8), 0.5, np.float32)

    job = analytic.make_job(folder_source, tmp_path / "out", mask=0.25)
    protect(analytic.replace(job, perturber=Cheat(job.perturber)))
    for path in folder_source.rglob("*.png"):
        clean = np.asarray(PillowImage.open(path)).astype(int)
        written = np.asarray(PillowImage.open(tmp_path / "out" / path.relative_to(folder_source))).astype(int)
        assert np.abs(written - clean).max() == 8
        assert np.count_nonzero(written != clean) == 16


@pytest.fixture
def careless():
    """The formats, with a PNG writer that does not write what was meant."""
    png, *others = raster_formats()

    class Careless(type(png)):  # type: ignore[misc]
        def write(self, item, frames, pixels, target):
            super().write(item, frames, [array ^ 1 for array in pixels], target)

    return (Careless(), *others)


def test_a_writer_that_does_not_write_what_was_meant_is_caught(run, careless, folder_source, tmp_path):
    assert run(folder_source, formats=careless).totals.quarantined == {"read-back": 6}
    assert tree(tmp_path / "out") == {}


def test_quarantined_images_get_another_try_only_when_asked(analytic, careless, folder_source, tmp_path):
    protect(analytic.make_job(folder_source, tmp_path / "out", formats=careless))
    job = analytic.make_job(folder_source, tmp_path / "out")
    assert protect(job).totals.quarantined == {"read-back": 6}
    assert protect(job, retry=lambda reason: reason == "truncated").totals.quarantined == {"read-back": 6}
    assert protect(job, retry=lambda reason: reason == "read-back").totals.verified == 6


class ContourFormat:
    """A companion: text that belongs to images; written with a mark, refused where it says so."""

    name = "contour"

    def recognises(self, head, path):
        return head.startswith(b"contour")

    def inspect(self, path, relative):
        return Item(path, relative, relative, self.name, 0, path.stat().st_size, 0)

    def write(self, item, frames, pixels, target):
        text = item.path.read_text()
        if "damaged" in text:
            raise ImageError("damaged", "This contour is damaged.")
        assert list(pixels) == []
        target.write_text(f"{text} of a protected image")

    @contextmanager
    def read_back(self, target):
        yield ()

    def patch(self, item):
        return item.path.read_bytes()

    def restore(self, protected, pixels, patch, target):
        target.write_bytes(patch)

    @contextmanager
    def open(self, item, scratch):
        yield ()


def test_companions_are_carried_over_and_come_back_and_a_bad_one_is_quarantined(run, folder_source, tmp_path):
    (folder_source / "normal/0.txt").write_text("contour 1")
    (folder_source / "normal/1.txt").write_text("contour damaged")
    formats = (*raster_formats(), ContourFormat())
    for _ in range(2):
        outcome = run(folder_source, formats=formats)
        assert (outcome.totals.verified, outcome.totals.quarantined) == (6, {"damaged": 1})
        assert (tmp_path / "out/normal/0.txt").read_text() == "contour 1 of a protected image"
        assert not (tmp_path / "out/normal/1.txt").exists()
    done = restore(tmp_path / "out", tmp_path / "out.private", tmp_path / "back", load_site_key(), formats)
    assert not done.refused
    assert (tmp_path / "back/normal/0.txt").read_text() == "contour 1"


# --- folders


def test_someone_elses_files_are_not_touched(run, folder_source, tmp_path):
    save(tmp_path / "out/normal/0.png", np.zeros((2, 2), np.uint8))
    before = tree(tmp_path / "out")
    with pytest.raises(StorageError) as caught:
        run(folder_source)
    assert caught.value.code == "foreign-files"
    assert tree(tmp_path / "out") == before


def test_files_that_appear_in_the_release_later_are_noticed(run, folder_source, tmp_path):
    run(folder_source)
    (tmp_path / "out/normal/extra.txt").write_text("x")
    with pytest.raises(StorageError):
        run(folder_source)


def test_a_private_folder_of_someone_else_is_not_touched(run, folder_source, tmp_path):
    (tmp_path / "out.private").mkdir()
    (tmp_path / "out.private/diary.txt").write_text("x")
    with pytest.raises(StorageError):
        run(folder_source)
    assert set(tree(tmp_path / "out.private")) == {"diary.txt"}


@pytest.mark.parametrize("out", ["source", "source/out", ".", "file"])
def test_folders_inside_one_another_are_refused(out, run, folder_source, tmp_path):
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        run(folder_source, tmp_path / out)
    assert caught.value.code == "folders"
    assert {k: v for k, v in tree(tmp_path).items() if "home/" not in k} == {
        k: v for k, v in before.items() if "home/" not in k
    }


def test_a_private_folder_inside_the_release_is_refused(run, folder_source, tmp_path):
    with pytest.raises(ConfigurationError):
        run(folder_source, private=tmp_path / "out/private")


def test_nothing_private_lies_in_the_release(run, folder_source, tmp_path):
    run(folder_source)
    assert set(tree(tmp_path / "out")) == {*tree(folder_source), "medveil-release.json"}
    text = (tmp_path / "out/medveil-release.json").read_text()
    assert str(tmp_path) not in text
    manifest = json.loads(text)
    assert manifest["verified"] == 6
    digests = tree(tmp_path / "out")
    assert all(digests[file["path"]] == file["sha256"] for file in manifest["files"])
    assert (tmp_path / "out.private").stat().st_mode & 0o077 == 0


def test_two_processes_do_not_work_on_one_folder(run, folder_source, tmp_path):
    with open_workspace(folder_source, tmp_path / "out", None), pytest.raises(BusyError):
        run(folder_source)


def test_names_as_long_as_a_disk_allows_are_no_problem(run, folder_source, tmp_path, picture):
    save(folder_source / "normal" / ("x" * 251 + ".png"), picture())
    assert run(folder_source).totals.verified == 7
    assert not give_back(tmp_path).refused


# --- disks


class PowerCut(BaseException):
    """The machine stops here: no handler of ours may catch it."""


class Stopping:
    """Stands in for ``os.fsync`` and fails at the n-th call."""

    def __init__(self, sync: Callable[[int], None], at: int, failure: BaseException) -> None:
        self._sync, self._left, self._failure = sync, at, failure

    def __call__(self, handle: int) -> None:
        if self._left == 0:
            raise self._failure
        self._left -= 1
        self._sync(handle)


def _stopped(
    job: Job, at: int, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> BaseException | None:
    """Run a job that fails at its n-th durable step; return what came out, or None if it has fewer steps."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Stopping(os.fsync, at, failure))
        try:
            protect(job)
        except (PowerCut, StorageError) as error:
            return error
        return None


FAILURES = {
    "power-cut": (PowerCut(), PowerCut),
    "disk-full": (OSError(errno.ENOSPC, "no space"), StorageError),
    "not-writable": (OSError(errno.EROFS, "read-only"), StorageError),
}


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_stop_at_any_durable_step_loses_nothing_and_leaves_nothing_half_written(
    kind, name, analytic, folder_source, npz_source, tmp_path, monkeypatch
):
    for path in folder_source.rglob("[12].png"):
        path.unlink()
    source = folder_source if kind == "folder" else npz_source
    protect(analytic.make_job(source, tmp_path / "whole"))
    expected = tree(tmp_path / "whole")
    failure, wanted = FAILURES[name]
    step = 0
    while error := _stopped(analytic.make_job(source, tmp_path / f"o{step}"), step, failure, monkeypatch):
        assert isinstance(error, wanted)
        assert getattr(error, "code", name) == name
        assert tree(tmp_path / f"o{step}").items() <= expected.items()
        outcome = protect(analytic.make_job(source, tmp_path / f"o{step}"))
        assert outcome.totals.verified == outcome.totals.images
        assert tree(tmp_path / f"o{step}") == expected
        step += 1
    assert step > 4


def test_a_job_that_cannot_fit_is_refused_before_it_begins(run, folder_source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(StorageError) as caught:
        run(folder_source)
    assert caught.value.code == "disk-full"
    assert tree(tmp_path / "out") == {}


def test_an_output_folder_that_cannot_be_made_is_a_storage_error(run, folder_source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        run(folder_source, tmp_path / "file/out")


# --- the way back


def give_back(tmp_path: Path, out: str = "back", key: Path | None = None):
    return restore(
        tmp_path / "out", tmp_path / "out.private", tmp_path / out, load_site_key(key), raster_formats()
    )


def test_every_original_comes_back(run, folder_source, tmp_path, picture):
    save(folder_source / "normal/photo.jpg", picture(20, 20, 3))
    save(folder_source / "normal/colour.png", picture(9, 7, 3))
    tifffile.imwrite(
        folder_source / "normal/scan.tif", picture(2, 9, 7, dtype="uint16"), photometric="minisblack"
    )
    run(folder_source)
    done = give_back(tmp_path)
    assert not done.refused
    assert set(tree(tmp_path / "back")) == set(tree(folder_source))
    for path in folder_source.rglob("*.*"):
        back = tmp_path / "back" / path.relative_to(folder_source)
        if path.suffix == ".tif":
            assert np.array_equal(tifffile.imread(back), tifffile.imread(path))
        else:
            assert np.array_equal(np.asarray(PillowImage.open(back)), np.asarray(PillowImage.open(path)))
    assert (tmp_path / "back/normal/photo.jpg").read_bytes() == (
        folder_source / "normal/photo.jpg"
    ).read_bytes()


def test_an_npz_comes_back_with_the_rows_that_were_left_out(run, tmp_path, rng):
    images = rng.integers(30, 220, (5, 8, 8, 3), np.uint8)
    labels = np.array([[0], [5], [1], [9], [0]], np.uint8)
    np.savez_compressed(tmp_path / "s.npz", a_images=images, a_labels=labels, note=np.array(["x"]))
    run(tmp_path / "s.npz", oracle=None)
    assert not give_back(tmp_path).refused
    with np.load(tmp_path / "back/s.npz") as back:
        assert np.array_equal(back["a_images"], images)
        assert np.array_equal(back["a_labels"], labels)
        assert back["note"].tolist() == ["x"]


def refusals(done) -> set[str]:
    return {refusal.code for refusal in done.refused}


def test_another_key_restores_nothing(run, folder_source, tmp_path):
    run(folder_source)
    load_site_key(tmp_path / "other.age", create=True)
    done = give_back(tmp_path, key=tmp_path / "other.age")
    assert refusals(done) == {"wrong-key"}
    assert tree(tmp_path / "back") == {}


def test_swapped_altered_and_missing_files_are_refused_by_name_and_the_rest_comes_back(
    run, folder_source, tmp_path
):
    run(folder_source)
    sealed = tmp_path / "out.private/sidecars/normal"
    (sealed / "0.png.sealed").write_bytes((sealed / "1.png.sealed").read_bytes())
    (sealed / "2.png.sealed").unlink()
    altered = tmp_path / "out/pneumonia/0.png"
    altered.write_bytes(altered.read_bytes() + b"x")
    (tmp_path / "out/pneumonia/1.png").unlink()
    done = give_back(tmp_path)
    assert {str(r.target): r.code for r in done.refused} == {
        "normal/0.png": "wrong-sidecar",
        "normal/2.png": "no-sidecar",
        "pneumonia/0.png": "altered",
        "pneumonia/1.png": "missing",
    }
    assert set(tree(tmp_path / "back")) == {"normal/1.png", "pneumonia/2.png"}


def test_restoring_does_not_write_into_a_folder_in_use(run, folder_source, tmp_path):
    run(folder_source)
    with pytest.raises(StorageError):
        give_back(tmp_path, "source")
    with pytest.raises(ConfigurationError):
        give_back(tmp_path, "out")


def test_the_log_of_a_job_is_whole_and_names_each_image_once(run, folder_source, tmp_path):
    run(folder_source)
    run(folder_source)
    with Ledger(tmp_path / "out.private/ledger.sqlite") as ledger:
        assert ledger.first_changed_line() is None
        subjects = [line.subject for line in ledger.log_lines() if line.event == "verified"]
    assert sorted(subjects) == sorted(tree(folder_source))


def test_a_watcher_sees_every_image_once(analytic, npz_source, tmp_path):
    class Counter:
        total = seen = 0

        def begin(self, total: int, done: int) -> None:
            self.total = total - done

        def advance(self, images: int) -> None:
            self.seen += images

    counter = Counter()
    protect(analytic.make_job(npz_source, tmp_path / "out"), counter)
    assert counter.seen == counter.total == 40


def test_nothing_runs_in_the_background_afterwards(run, folder_source):
    before = threading.active_count()
    run(folder_source)
    assert threading.active_count() == before
