"""Whatever happened to a file, it is read or refused by name: one damaged file never ends a job."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image as PillowImage
from pydicom import uid as uids

from medveil.agent.demo.sites import draw_sites
from medveil.agent.formats import reading_formats
from medveil.agent.imageio import ImageFormat
from medveil.agent.segmentation.raster_masks import RASTER_FORMATS, read_raster_mask
from medveil.models.errors import ImageError

FORMATS = reading_formats()
GREY = np.random.default_rng(1).integers(20, 230, (24, 20), np.uint8)
LABELS = (np.arange(24)[:, None] // 8 + np.zeros((1, 20))).astype(np.uint8)
DAMAGED_COPIES = 40


def pillow(kind: str, pixels: np.ndarray = GREY) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, train_images=np.stack([GREY] * 3), train_labels=np.zeros((3, 1), int))
    return buffer.getvalue()


def volume() -> bytes:
    return bytes(nib.Nifti1Image(np.stack([GREY.astype(np.int16)] * 4, axis=-1), np.eye(4)).to_bytes())


@pytest.fixture(
    scope="module", params=[None, uids.RLELossless, uids.JPEG2000Lossless], ids=["native", "rle", "j2k"]
)
def dicom(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A drawn DICOM object. JPEG-LS is left out: its decoder takes seconds to give a broken stream up."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_sites(folder)
    dataset = pydicom.dcmread(min(folder.rglob("*.dcm")))
    if request.param is not None:
        dataset.compress(request.param, encoding_plugin="pylibjpeg")
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


SAMPLES: dict[str, Callable[[], bytes]] = {
    "x.png": lambda: bytes(imagecodecs.png_encode(GREY)),
    "x.jpg": lambda: pillow("JPEG"),
    "plain.tif": lambda: tiff(GREY),
    "lzw.tif": lambda: tiff(GREY, compression="lzw", predictor=True, rowsperstrip=5),
    "pages.tif": lambda: tiff(np.stack([GREY] * 3), photometric="minisblack", compression="zlib"),
    "x.npz": npz,
    "x.nii": volume,
    "x.nii.gz": lambda: gzip.compress(volume()),
}
MASKS: dict[str, Callable[[], bytes]] = {
    "m.png": lambda: bytes(imagecodecs.png_encode(LABELS)),
    **{f"{c}.tif": lambda c=c: tiff(LABELS, compression=c) for c in ("lzw", "zlib", "zstd", "packbits")},
}


def damaged(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Yield copies that were cut, overwritten or shifted, mostly in the head, where the tables are."""
    for _ in range(DAMAGED_COPIES):
        head = int(rng.choice([min(len(data), size) for size in (16, 64, 400, len(data))]))
        at, count = int(rng.integers(1, head)), int(rng.choice([1, 2, 8, 40]))
        noise = rng.integers(0, 256, count, np.uint8).tobytes()
        yield data[:at]
        yield data[:at] + noise + data[at + count :]
        yield data[:at] + noise + data[at:]


def format_of(path: Path) -> ImageFormat | None:
    head = path.read_bytes()[:512]
    return next((f for f in FORMATS if f.recognises(head, path)), None)


def read_all(path: Path) -> None:
    """Read every image of a file as a job does."""
    format_ = format_of(path)
    if format_ is None:  # no longer an image by its first bytes: a name of its own in the quarantine
        return
    with format_.open(format_.inspect(path, PurePosixPath(path.name)), path.parent) as frames:
        for image in frames:
            image.window.display(image.pixels)


def read_mask(path: Path) -> None:
    format_ = format_of(path)
    if format_ is None or format_.name not in RASTER_FORMATS:
        return
    read_raster_mask(format_.inspect(path, PurePosixPath(path.name)), 0)


def outcomes(read: Callable[[Path], None], data: bytes, path: Path, seed: int) -> set[str]:
    """Read many damaged copies; return the names of their refusals. Any other error fails the test."""
    found = set()
    for copy in damaged(data, np.random.default_rng(seed)):
        path.write_bytes(copy)
        try:
            read(path)
        except ImageError as refusal:
            found.add(refusal.code)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SAMPLES)
def test_a_damaged_image_is_read_or_refused_by_name(name, seed, tmp_path):
    assert outcomes(read_all, SAMPLES[name](), tmp_path / name, seed)


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_dicom_file_is_read_or_refused_by_name(dicom, seed, tmp_path):
    assert outcomes(read_all, dicom, tmp_path / "x.dcm", seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MASKS)
def test_a_damaged_mask_is_read_or_refused_by_name(name, seed, tmp_path):
    assert "mask-damaged" in outcomes(read_mask, MASKS[name](), tmp_path / name, seed)


def test_a_jpeg_whose_first_marker_is_none_is_refused_by_name(tmp_path):
    """Pillow has no opener of its own for MPO; to ask for one once ended a whole job at such a file."""
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff" + bytes(200))
    with pytest.raises(ImageError, match="damaged"):
        read_all(tmp_path / "x.jpg")


def test_a_camera_that_keeps_two_pictures_in_one_jpeg_gives_the_first(tmp_path):
    first, second = (PillowImage.fromarray(pixels) for pixels in (GREY, 255 - GREY))
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second], quality=95)
    format_ = format_of(tmp_path / "x.jpg")
    with format_.open(format_.inspect(tmp_path / "x.jpg", PurePosixPath("x.jpg")), tmp_path) as frames:
        assert np.abs(frames[0].pixels.astype(int) - GREY).max() < 60


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "plain.tif", "x.npz", "x.nii"])
def test_an_error_of_ours_is_no_damage_of_the_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(SAMPLES[name]())
    format_ = format_of(path)
    item = format_.inspect(path, PurePosixPath(name))
    with pytest.raises(ValueError, match="a bug"), format_.open(item, tmp_path):
        raise ValueError("a bug")


def test_nothing_is_said_past_the_screen(tmp_path, capfd):
    """nibabel reports what it mends straight to stderr."""
    data = bytearray(volume())
    data[:4] = b"\x5d\x01\0\0"
    (tmp_path / "x.nii").write_bytes(data)
    read_all(tmp_path / "x.nii")
    assert capfd.readouterr().err == ""
