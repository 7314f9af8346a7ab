"""PNG, JPEG and TIFF that are damaged, unusual or hostile: refused by name, or handled as stated."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path, PurePosixPath

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage
from PIL import ImageOps, PngImagePlugin

from medveil.agent.imageio import Image, raster_formats
from medveil.models.errors import ImageError


def read(path: Path) -> Image:
    """Read the first image of a file, whatever its format."""
    head = path.read_bytes()[:512]
    format_ = next(f for f in raster_formats() if f.recognises(head, path))
    with format_.open(format_.inspect(path, PurePosixPath(path.name)), path.parent) as frames:
        return frames[0]


def png(pixels: np.ndarray) -> bytes:
    return bytes(imagecodecs.png_encode(pixels))


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    body = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + body
    return png(GREY)[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0" * 20


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def one_bit() -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(GREY).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def cmyk() -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(COLOUR).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def see_through() -> bytes:
    alpha = np.full((20, 20, 1), 255, np.uint8)
    alpha[3, 3] = 254
    return png(np.concatenate([COLOUR, alpha], 2))


def mixed_pages() -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(GREY)
        writer.write(GREY[:5])
    return buffer.getvalue()


GREY = np.random.default_rng(1).integers(20, 230, (20, 20), np.uint8)
COLOUR = np.random.default_rng(2).integers(20, 230, (20, 20, 3), np.uint8)

REFUSED = [
    ("truncated", png(GREY)[:-30]),
    ("truncated", png(GREY)[:20]),
    ("truncated", png(GREY)[:-1]),
    ("damaged", flipped(png(GREY), 60)),
    ("too-large", huge_png()),
    ("one-bit", one_bit()),
    ("transparent", see_through()),
    ("truncated", jpeg(GREY)[:-100]),
    ("cmyk", cmyk()),
    ("damaged", tiff(GREY)[:200]),
    ("damaged", tiff(GREY, compression="zlib")[:-40]),
    ("one-bit", tiff(GREY > 100, photometric="minisblack")),
    ("sample-type", tiff(GREY.astype(np.float32))),
    ("sample-type", tiff(GREY.astype(np.int16))),
    ("cmyk", tiff(np.zeros((8, 8, 4), np.uint8), photometric="separated")),
    ("mixed-pages", mixed_pages()),
]


@pytest.mark.parametrize(
    ("code", "data"), REFUSED, ids=[f"{i}-{code}" for i, (code, _) in enumerate(REFUSED)]
)
def test_what_cannot_be_used_is_refused_by_name(code, data, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        read(path)
    assert caught.value.code == code


def test_sixteen_bit_rgb_is_not_cut_to_eight(tmp_path):
    pixels = np.arange(60, dtype=np.uint16).reshape(4, 5, 3) * 1000
    (tmp_path / "x.png").write_bytes(png(pixels))
    assert np.array_equal(read(tmp_path / "x.png").pixels, pixels)


def test_palette_becomes_rgb(tmp_path):
    PillowImage.fromarray(COLOUR).convert("P", palette=PillowImage.Palette.ADAPTIVE).save(tmp_path / "x.png")
    found = read(tmp_path / "x.png")
    assert found.is_colour
    assert np.array_equal(found.pixels, np.asarray(PillowImage.open(tmp_path / "x.png").convert("RGB")))


def test_tiff_palette_becomes_rgb(tmp_path):
    colours = np.random.default_rng(3).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4)
    tifffile.imwrite(tmp_path / "x.tif", indices, photometric="palette", colormap=colours)
    assert np.array_equal(read(tmp_path / "x.tif").pixels, (colours[:, indices] // 257).transpose(1, 2, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_stand_upright_as_other_programs_show_them(orientation, suffix, tmp_path):
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    PillowImage.fromarray(GREY[:, :11]).save(path, exif=exif)
    with PillowImage.open(path) as opened:
        assert np.array_equal(read(path).pixels, np.asarray(ImageOps.exif_transpose(opened)))


def test_a_format_is_known_by_content_not_by_name(tmp_path):
    (tmp_path / "x.tif").write_bytes(jpeg(GREY))
    assert read(tmp_path / "x.tif").size == (20, 20)


def test_white_is_zero_shows_bright_where_stored_values_are_small(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", GREY, photometric="miniswhite")
    found = read(tmp_path / "x.tif")
    assert np.array_equal(found.pixels, GREY)
    assert np.allclose(found.window.display(found.pixels), 1 - GREY / 255, atol=1e-6)


def test_twelve_bits_in_sixteen_count_the_budget_in_twelve(tmp_path):
    pixels = np.full((4, 4), 3000, np.uint16)
    (tmp_path / "x.png").write_bytes(png(pixels))
    found = read(tmp_path / "x.png")
    low, high = found.window.bounds(found.pixels, 8.0)
    assert (int(low[0, 0]), int(high[0, 0])) == (3000 - 128, 3000 + 128)


def test_a_protected_png_carries_colour_chunks_and_no_text(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("PatientName", "CANARY")
    PillowImage.fromarray(GREY).save(tmp_path / "x.png", pnginfo=notes, dpi=(300, 300))
    format_ = raster_formats()[0]
    item = format_.inspect(tmp_path / "x.png", PurePosixPath("x.png"))
    format_.write(item, [0], [GREY], tmp_path / "out.png")
    assert b"CANARY" not in (tmp_path / "out.png").read_bytes()
    assert b"pHYs" in (tmp_path / "out.png").read_bytes()
    format_.restore(tmp_path / "out.png", [GREY], format_.patch(item), tmp_path / "back.png")
    with PillowImage.open(tmp_path / "back.png") as back:
        assert back.text == {"PatientName": "CANARY"}


def test_a_protected_tiff_carries_resolution_and_no_text(tmp_path):
    format_ = raster_formats()[2]
    tifffile.imwrite(
        tmp_path / "x.tif",
        GREY,
        description="CANARY",
        metadata=None,
        resolution=(300, 300),
        compression="lzw",
    )
    item = format_.inspect(tmp_path / "x.tif", PurePosixPath("x.tif"))
    format_.write(item, [0], [GREY], tmp_path / "out.tif")
    assert b"CANARY" not in (tmp_path / "out.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "out.tif") as out:
        assert out.pages[0].compression == tifffile.COMPRESSION.LZW
        assert out.pages[0].resolution == (300.0, 300.0)
    format_.restore(tmp_path / "out.tif", [GREY], format_.patch(item), tmp_path / "back.tif")
    with tifffile.TiffFile(tmp_path / "back.tif") as back:
        assert back.pages[0].description == "CANARY"


def test_a_jpeg_comes_out_as_png_without_its_exif(tmp_path):
    exif = PillowImage.Exif()
    exif[0x010E] = "CANARY"
    (tmp_path / "x.jpg").write_bytes(jpeg(GREY, exif=exif))
    format_ = raster_formats()[1]
    item = format_.inspect(tmp_path / "x.jpg", PurePosixPath("a/x.jpg"))
    assert item.target == PurePosixPath("a/x.png")
    format_.write(item, [0], [GREY], tmp_path / "out.png")
    assert b"CANARY" not in (tmp_path / "out.png").read_bytes()
    assert np.array_equal(read(tmp_path / "out.png").pixels, GREY)
