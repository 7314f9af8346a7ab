"""TIFF: whatever a file names as its compression, only decoders that check their input see it."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
from tifffile import COMPRESSION

from medveil.models.tiff import decodes, open_tiff

SIDE = 64


def written(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def read(data: bytes) -> np.ndarray:
    with open_tiff(io.BytesIO(data)) as file:
        return np.asarray(file.pages[0].asarray())


def with_strip(strip: bytes, compression: COMPRESSION) -> bytes:
    """Return a TIFF of 64 x 64 grey pixels whose one strip holds these bytes."""
    data = bytearray(written(np.zeros((SIDE, SIDE), np.uint8), metadata=None, software=False))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages[0].tags
        places = {
            name: (tags[name].valueoffset, tags[name].dtype) for name in ("Compression", "StripByteCounts")
        }
        offset = file.pages[0].dataoffsets[0]
    for name, value in (("Compression", int(compression)), ("StripByteCounts", len(strip))):
        at, kind = places[name]
        size = {3: 2, 4: 4}[int(kind)]
        data[at : at + size] = value.to_bytes(size, "little")
    return bytes(data[:offset]) + strip


def codes(*values: int) -> bytes:
    """Return LZW codes of 9 bits, most significant bit first (TIFF 6.0, section 13)."""
    bits = "".join(f"{value:09b}" for value in values)
    return int(bits.ljust(-len(bits) // 8 * -8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


CLEAR, END = 256, 257


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"predictor": True},
        {"rowsperstrip": 7},
        {"tile": (16, 32)},
        {"byteorder": ">"},
        {"bigtiff": True, "predictor": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_lzw_gives_back_what_was_written(seed, dtype, options, channels):
    rng = np.random.default_rng(seed)
    shape = (SIDE, SIDE + 9) if channels == 1 else (SIDE, SIDE + 9, 3)
    for pixels in (
        rng.integers(0, np.iinfo(dtype).max, shape, dtype),
        (np.indices(shape)[1] // 9).astype(dtype),
    ):
        np.testing.assert_array_equal(read(written(pixels, compression="lzw", **options)), pixels)


@pytest.mark.parametrize("length", [1, 2, 255, 5000, 300_000])
def test_one_segment_of_lzw_is_what_imagecodecs_wrote(length, rng):
    for values in (rng.integers(0, 256, length, np.uint8), (np.arange(length) // 97 % 7).astype(np.uint8)):
        pixels = values.reshape(1, length)
        np.testing.assert_array_equal(read(written(pixels, compression="lzw")), pixels)


@pytest.mark.parametrize("code", [258, 300, 511])
@pytest.mark.parametrize("before", [(), (CLEAR, 65, 66, 258)], ids=["at-the-start", "later"])
def test_a_code_that_nothing_was_said_about_is_damage(code, before):
    """imagecodecs' own decoder follows the pointer of such a code wherever it leads: the process may die of it."""
    strip = codes(*before, CLEAR, code, 65, code, 65, END)
    with pytest.raises(imagecodecs.TiffError):
        read(with_strip(strip, COMPRESSION.LZW))


def test_a_strip_of_lzw_that_ends_early_is_damage():
    with pytest.raises(imagecodecs.TiffError):
        read(with_strip(codes(CLEAR, 65, END), COMPRESSION.LZW))


@pytest.mark.parametrize(
    ("compression", "read_by_medveil"),
    [
        *(
            (name, True)
            for name in ("NONE", "LZW", "ADOBE_DEFLATE", "PACKBITS", "ZSTD", "LZMA", "JPEG", "JPEG2000")
        ),
        *(
            (name, False)
            for name in ("LERC", "JPEGXR", "JPEGXL", "PNG", "JETRAW", "EER_V1", "SGILOG", "JBIG2")
        ),
    ],
)
def test_what_is_read_and_what_is_not(compression, read_by_medveil):
    code = COMPRESSION[compression]
    assert decodes(code) is read_by_medveil
    if not read_by_medveil:
        with pytest.raises(ValueError, match=r"\w"):
            read(with_strip(b"anything", code))


@pytest.mark.parametrize("compression", ["zlib", "packbits", "zstd", "lzma", "jpeg2000"])
def test_other_compressions_give_back_what_was_written(compression, rng):
    pixels = rng.integers(0, 256, (SIDE, SIDE), np.uint8)
    np.testing.assert_array_equal(read(written(pixels, compression=compression)), pixels)
