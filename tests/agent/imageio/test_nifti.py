"""Only voxels change in a NIfTI file, and only by whole steps of the grid they lie on."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medveil.agent.imageio.nifti import NiftiFormat
from medveil.agent.imageio.nifti_window import SpanWindow, grid_step, volume_window
from medveil.models.errors import ImageError

MakeNifti = Callable[..., Path]
AFFINE = np.array([[1.0, 0.1, 0, -9], [0, 1.2, 0, 3], [0, 0, 2.5, 7], [0, 0, 0, 1]])
NIFTI = NiftiFormat()
HALF_WIDTH = 8 / 255


@pytest.fixture
def make_nifti(tmp_path: Path) -> MakeNifti:
    def write(
        voxels: np.ndarray, name: str = "image.nii.gz", kind: Any = nib.Nifti1Image, **scaling: float
    ) -> Path:
        image = kind(voxels, AFFINE)
        image.header.set_data_dtype(voxels.dtype)
        image.header.set_slope_inter(scaling.get("slope", np.nan), scaling.get("intercept", np.nan))
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept as it is"))
        image.set_qform(AFFINE, code=1)
        image.set_sform(AFFINE, code=2)
        data = image.to_bytes()
        # to_bytes would rescale integers by the slope; the stored values are put in place of its guess.
        data = data[: -voxels.nbytes] + voxels.astype(
            voxels.dtype.newbyteorder(image.header.endianness)
        ).tobytes("F")
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def protect(path: Path, relative: str = "image.nii.gz") -> tuple[list[np.ndarray], list[np.ndarray], Path]:
    """Write a protected copy next to ``path``; return clean frames, meant frames, target."""
    item = NIFTI.inspect(path, PurePosixPath(relative))
    target = path.with_name("protected" + "".join(path.suffixes))
    generator = np.random.default_rng(1)
    clean, meant = [], []
    with NIFTI.open(item, path.parent) as frames:
        for number in range(item.frames):
            image = frames[number]
            delta = generator.choice(np.array([-HALF_WIDTH, HALF_WIDTH], np.float32), image.size)
            low, high = image.window.bounds(image.pixels, 8)
            clean.append(image.pixels)
            meant.append(np.clip(image.window.shifted(image.pixels, delta), low, high))
    NIFTI.write(item, range(item.frames), iter(meant), target)
    return clean, meant, target


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "i2", "<u2", "i4", "f4", "f8"])
def test_only_voxels_change_and_they_are_read_back_exactly(
    make_nifti: MakeNifti, rng: np.random.Generator, name: str, kind: Any, dtype: str
) -> None:
    voxels = rng.integers(0, 250, (7, 6, 5)).astype(dtype)
    source = make_nifti(voxels, name, kind)
    clean, meant, target = protect(source)
    with NIFTI.read_back(target) as frames:
        assert all(np.array_equal(a, b) for a, b in zip(frames, meant, strict=True))
    before, after = unpacked(source), unpacked(target)
    head = len(before) - voxels.nbytes
    assert after[:head] == before[:head]
    assert len(after) == len(before)
    assert after != before
    assert np.array_equal(np.stack(clean), voxels.T)


def test_slope_and_intercept_stay_and_scaled_values_follow(
    make_nifti: MakeNifti, rng: np.random.Generator
) -> None:
    voxels = rng.integers(0, 4000, (7, 6, 5)).astype(np.int16)
    source = make_nifti(voxels, slope=0.5, intercept=-1024.0)
    _, meant, target = protect(source)
    before: Any = nib.load(source)
    after: Any = nib.load(target)
    assert after.dataobj.slope == before.dataobj.slope == 0.5
    assert after.dataobj.inter == before.dataobj.inter == -1024.0
    assert np.array_equal(after.get_fdata(), np.stack(meant).T * 0.5 - 1024.0)
    assert np.array_equal(after.affine, before.affine)
    assert (int(after.header["qform_code"]), int(after.header["sform_code"])) == (1, 2)
    assert after.header.extensions[0].get_content() == b"kept as it is"


def test_restoring_gives_the_same_unpacked_bytes(make_nifti: MakeNifti, rng: np.random.Generator) -> None:
    source = make_nifti(rng.normal(100, 20, (7, 6, 5)).astype(np.float32))
    clean, _, target = protect(source)
    NIFTI.restore(target, iter(clean), NIFTI.patch(NIFTI.inspect(source, PurePosixPath("a"))), target)
    assert unpacked(target) == unpacked(source)


def test_the_same_volume_gives_the_same_bytes(make_nifti: MakeNifti, rng: np.random.Generator) -> None:
    source = make_nifti(rng.integers(0, 250, (7, 6, 5)).astype(np.uint8))
    once = protect(source)[2].read_bytes()
    assert protect(source)[2].read_bytes() == once


def test_big_endian_volumes_stay_big_endian(make_nifti: MakeNifti, rng: np.random.Generator) -> None:
    voxels = rng.integers(0, 250, (7, 6, 5)).astype(np.int16)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(np.int16)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    source = make_nifti(voxels, "image.nii")
    source.write_bytes(header.binaryblock + bytes(4) + voxels.astype(">i2").tobytes("F"))
    clean, meant, target = protect(source, "image.nii")
    assert np.array_equal(np.stack(clean), voxels.T)
    after: Any = nib.load(target)
    assert after.header.endianness == ">"
    assert np.array_equal(np.asarray(after.dataobj), np.stack(meant).T)


def test_float_volumes_that_were_integers_stay_on_their_grid(
    make_nifti: MakeNifti, rng: np.random.Generator
) -> None:
    step = 9.1504
    voxels = (rng.integers(0, 256, (12, 11, 10)) * step).astype(np.float32)
    clean, meant, _ = protect(make_nifti(voxels))
    moved = (np.stack(meant).astype(np.float64) - np.stack(clean)) / step
    assert np.abs(moved - np.rint(moved)).max() < 1e-3
    assert np.abs(np.rint(moved)).max() == 7  # 8/255 of the percentile window, in whole steps


@pytest.mark.parametrize("share", [0.1, 0.33, 0.5, 1.0])
def test_changes_of_any_size_are_whole_steps(share: float) -> None:
    values = (np.arange(256) * 5.35).astype(np.float32)
    window = volume_window(values, None, 1.0, 0.0, (0.5, 99.5))
    moved = window.shifted(values[50:200], np.full(150, share * HALF_WIDTH, np.float32))
    assert np.isin(moved, values).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.arange(256) * 5.35, 5.35),
        (np.array([0.0, 0.5, 2.0]), 0.5),
        (np.array([1.0]), 0.0),
        (np.array([0.0, 1.0, 2.5001, 3.7]), 0.0),
        (np.random.default_rng(0).normal(size=1000), 0.0),
    ],
)
def test_a_grid_is_found_where_there_is_one(values: np.ndarray, expected: float) -> None:
    assert grid_step(values.astype(np.float32)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_bounds_never_show_more_than_epsilon(rng: np.random.Generator, dtype: Any, epsilon: float) -> None:
    values = rng.normal(100, 50, 5000).astype(dtype)
    window = volume_window(values, None, 1.0, 0.0, (0.5, 99.5))
    low, high = window.bounds(values, epsilon)
    assert low.dtype == high.dtype == dtype
    assert (low <= values).all()
    assert (high >= values).all()
    reach = epsilon / 255 * (window.white - window.black) * (1 + 1e-12)  # of float64 arithmetic itself
    assert (values.astype(np.float64) - low).max() <= reach
    assert (high.astype(np.float64) - values).max() <= reach
    assert low.min() >= values.min()
    assert high.max() <= values.max()


def test_a_policy_window_is_given_in_scaled_units() -> None:
    voxels = np.arange(0, 4000, dtype=np.int16)
    window = volume_window(voxels, (-160.0, 240.0), 0.5, -1024.0, (0.5, 99.5))
    assert (window.black, window.white) == (1728.0, 2528.0)
    low, high = window.bounds(np.array([2000], np.int16), 8)
    assert (int(low[0]), int(high[0])) == (1975, 2025)
    assert not window.guessed


def test_where_the_grid_is_coarser_than_the_budget_nothing_moves() -> None:
    window = SpanWindow(black=0, white=20, lowest=0, highest=20, step=1)
    values = np.arange(21, dtype=np.uint8)
    low, high = window.bounds(values, 8)
    assert np.array_equal(low, values)
    assert np.array_equal(high, values)


@pytest.mark.parametrize(
    "relative",
    [
        "labelsTr/hippocampus_001.nii.gz",
        "labels/a.nii.gz",
        "derivatives/labels/sub-1/anat/sub-1_T1w_seg-manual.nii.gz",
        "patient1/mask.nii.gz",
        "patient1/patient1_frame01_gt.nii.gz",
    ],
)
def test_label_maps_are_copied_byte_for_byte(
    make_nifti: MakeNifti, rng: np.random.Generator, relative: str
) -> None:
    source = make_nifti(rng.integers(0, 3, (7, 6, 5)).astype(np.uint8))
    item = NIFTI.inspect(source, PurePosixPath(relative))
    assert item.frames == 0
    target = source.with_name("copy")
    NIFTI.write(item, (), (), target)
    assert target.read_bytes() == source.read_bytes()
    with NIFTI.open(item, source.parent) as frames, NIFTI.read_back(target) as written:
        assert len(frames) == len(list(written)) == 0
    NIFTI.restore(target, (), NIFTI.patch(item), target.with_name("restored"))
    assert target.with_name("restored").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("relative", "labels"),
    [("images/a.nii.gz", True), ("labels/a.nii.gz", False), ("unlabelled/a.nii.gz", True)],
)
def test_what_may_be_a_label_map_or_an_image_is_not_guessed_at(
    make_nifti: MakeNifti, rng: np.random.Generator, relative: str, labels: bool
) -> None:
    source = make_nifti(rng.integers(0, 3 if labels else 250, (9, 9, 9)).astype(np.uint8))
    with pytest.raises(ImageError, match="label-or-image"):
        NIFTI.inspect(source, PurePosixPath(relative))


def with_nan() -> np.ndarray:
    voxels = np.arange(210, dtype=np.float32).reshape(7, 6, 5)
    voxels[0, 0, 0] = np.nan
    return voxels


@pytest.mark.parametrize(
    ("voxels", "code"),
    [
        (np.zeros((4, 4, 4, 2), np.int16), "4d"),
        (with_nan(), "not-finite"),
        (np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "rgb"),
        (np.zeros((4, 4, 4), np.complex64), "unsupported-layout"),
    ],
)
def test_what_cannot_be_protected_is_refused_by_name(
    make_nifti: MakeNifti, voxels: np.ndarray, code: str
) -> None:
    with pytest.raises(ImageError) as refused:
        NIFTI.inspect(make_nifti(voxels), PurePosixPath("a"))
    assert refused.value.code == code


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_volume_cut_short_is_refused_by_name(
    make_nifti: MakeNifti, rng: np.random.Generator, name: str, kept: float
) -> None:
    source = make_nifti(rng.integers(0, 250, (30, 30, 30)).astype(np.uint8), name)
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match="truncated"):
        NIFTI.inspect(source, PurePosixPath(name))


def test_a_header_that_claims_a_huge_volume_is_refused_by_name(make_nifti: MakeNifti) -> None:
    source = make_nifti(np.zeros((4, 4, 4), np.uint8), "image.nii")
    data = bytearray(source.read_bytes())
    data[40:48] = np.array([3, 32767, 32767, 32767], "<i2").tobytes()
    source.write_bytes(bytes(data))
    with pytest.raises(ImageError, match="too-large"):
        NIFTI.inspect(source, PurePosixPath("a"))


def test_a_pair_is_refused_by_name(make_nifti: MakeNifti) -> None:
    source = make_nifti(np.zeros((4, 4, 4), np.uint8), "image.nii")
    data = bytearray(source.read_bytes())
    data[344:348] = b"ni1\0"
    source.write_bytes(bytes(data))
    with pytest.raises(ImageError, match="nifti-pair"):
        NIFTI.inspect(source, PurePosixPath("a"))


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
def test_content_decides_what_is_nifti(make_nifti: MakeNifti, name: str) -> None:
    source = make_nifti(np.zeros((4, 4, 4), np.uint8), name)
    renamed = source.rename(source.with_name("volume"))
    assert NIFTI.recognises(renamed.read_bytes()[:512], renamed)
    for other in (b"", b"\x1f\x8bbroken", gzip.compress(b"text"), bytes(600)):
        assert not NIFTI.recognises(other[:512], renamed)
