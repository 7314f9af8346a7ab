"""One suite that every raster format passes: what is written reads back, what is restored is the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage

from medveil.agent.imageio import ImageFormat, Item, raster_formats

Draw = Callable[..., np.ndarray]


def _png(path: Path, pixels: np.ndarray) -> None:
    path.write_bytes(imagecodecs.png_encode(pixels))


def _npz(path: Path, **arrays: np.ndarray) -> None:
    np.savez_compressed(path, **arrays)


def _palette(path: Path, pixels: np.ndarray) -> None:
    PillowImage.fromarray(pixels).convert("P").save(path)


def _turned_jpeg(path: Path, pixels: np.ndarray) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    PillowImage.fromarray(pixels).save(path, exif=exif, quality=95)


def _opaque(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [pixels, np.full((*pixels.shape[:2], 1), np.iinfo(pixels.dtype).max, pixels.dtype)], 2
    )


def _plain_pages(path: Path, stack: np.ndarray) -> None:
    with tifffile.TiffWriter(path) as writer:
        for page in stack:
            writer.write(page, metadata=None, compression="zlib", predictor=True, description="a page")


WRITERS: dict[str, tuple[str, Callable[[Path, Draw], object]]] = {
    "png grey 8": ("x.png", lambda p, d: _png(p, d(9, 7))),
    "png grey 16": ("x.png", lambda p, d: _png(p, d(9, 7, dtype="uint16"))),
    "png rgb 8": ("x.png", lambda p, d: _png(p, d(9, 7, 3))),
    "png rgb 16": ("x.png", lambda p, d: _png(p, d(9, 7, 3, dtype="uint16"))),
    "png opaque rgba": ("x.png", lambda p, d: _png(p, _opaque(d(9, 7, 3)))),
    "png palette": ("x.png", lambda p, d: _palette(p, d(9, 7))),
    "jpeg grey": ("x.jpg", lambda p, d: PillowImage.fromarray(d(9, 7)).save(p)),
    "jpeg rgb": ("x.jpg", lambda p, d: PillowImage.fromarray(d(9, 7, 3)).save(p)),
    "jpeg turned": ("x.jpg", lambda p, d: _turned_jpeg(p, d(9, 7, 3))),
    "tiff grey 8": ("x.tif", lambda p, d: tifffile.imwrite(p, d(9, 7))),
    "tiff plain": ("x.tif", lambda p, d: tifffile.imwrite(p, d(9, 7), metadata=None)),
    "tiff plain 16 bit pages": ("x.tif", lambda p, d: _plain_pages(p, d(3, 9, 7, dtype="uint16"))),
    "tiff grey 16 big-endian": (
        "x.tif",
        lambda p, d: tifffile.imwrite(p, d(9, 7, dtype="uint16"), byteorder=">"),
    ),
    "tiff rgb 16 lzw": (
        "x.tif",
        lambda p, d: tifffile.imwrite(p, d(9, 7, 3, dtype="uint16"), compression="lzw"),
    ),
    "tiff rgb planar": (
        "x.tif",
        lambda p, d: tifffile.imwrite(p, d(3, 9, 7), planarconfig="separate", photometric="rgb"),
    ),
    "tiff white is zero": ("x.tif", lambda p, d: tifffile.imwrite(p, d(9, 7), photometric="miniswhite")),
    "tiff jpeg inside": ("x.tif", lambda p, d: tifffile.imwrite(p, d(16, 16), compression="jpeg")),
    "tiff three pages": (
        "x.tif",
        lambda p, d: tifffile.imwrite(p, d(3, 9, 7), photometric="minisblack", compression="zstd"),
    ),
    "npz grey": (
        "x.npz",
        lambda p, d: np.savez(p, train_images=d(5, 9, 7), train_labels=np.zeros((5, 1), int)),
    ),
    "npz one channel": (
        "x.npz",
        lambda p, d: np.savez_compressed(
            p, a_images=d(5, 9, 7, 1), a_labels=np.zeros(5, "u1"), names=np.array(["a"])
        ),
    ),
    "npz rgb 16": (
        "x.npz",
        lambda p, d: np.savez(p, a_images=d(2, 9, 7, 3, dtype="uint16"), a_labels=np.zeros(2, "u1")),
    ),
}


@pytest.fixture(params=list(WRITERS))
def written(request: pytest.FixtureRequest, tmp_path: Path, picture: Draw) -> tuple[ImageFormat, Item]:
    name, write = WRITERS[request.param]
    path = tmp_path / name
    write(path, picture)
    head = path.read_bytes()[:512]
    format_ = next(f for f in raster_formats() if f.recognises(head, path))
    return format_, format_.inspect(path, PurePosixPath(name))


def _read(format_: ImageFormat, item: Item, scratch: Path) -> list[np.ndarray]:
    with format_.open(item, scratch) as frames:
        assert len(frames) == item.frames
        return [frames[i].pixels for i in range(item.frames)]


def _moved(pixels: np.ndarray) -> np.ndarray:
    return pixels + np.array(1, pixels.dtype)


def test_what_was_written_reads_back_value_by_value(written, tmp_path):
    format_, item = written
    protected = [_moved(pixels) for pixels in _read(format_, item, tmp_path)]
    target = tmp_path / f"out{item.target.suffix}"
    format_.write(item, range(item.frames), protected, target)
    with format_.read_back(target) as found:
        pairs = list(zip(found, protected, strict=True))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_writing_twice_gives_the_same_bytes(written, tmp_path):
    format_, item = written
    pixels = _read(format_, item, tmp_path)
    for name in ("one", "two"):
        format_.write(item, range(item.frames), pixels, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_restoring_gives_the_stored_values_back(written, tmp_path):
    format_, item = written
    clean = _read(format_, item, tmp_path)
    target = tmp_path / f"out{item.target.suffix}"
    format_.write(item, range(item.frames), [_moved(pixels) for pixels in clean], target)
    restored = tmp_path / f"restored{item.relative.suffix}"
    format_.restore(target, iter(clean), format_.patch(item), restored)
    again = _read(format_, format_.inspect(restored, item.relative), tmp_path)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(again, clean, strict=True))
    if item.seals_original:
        assert restored.read_bytes() == item.path.read_bytes()


def test_reading_changes_nothing_on_the_disk(written, tmp_path):
    format_, item = written
    before = item.path.read_bytes(), item.path.stat().st_mtime_ns, sorted(tmp_path.iterdir())
    _read(format_, item, tmp_path)
    assert (item.path.read_bytes(), item.path.stat().st_mtime_ns, sorted(tmp_path.iterdir())) == before


def test_pixels_cannot_be_written_to(written, tmp_path):
    format_, item = written
    with format_.open(item, tmp_path) as frames, pytest.raises(ValueError, match="read-only"):
        frames[0].pixels[0, 0] = 0


def test_the_header_told_the_truth(written, tmp_path):
    format_, item = written
    assert sum(pixels.size for pixels in _read(format_, item, tmp_path)) == item.pixels
