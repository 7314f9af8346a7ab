"""PNG: no byte reaches libpng unless every chunk before the end is whole."""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np
import pytest

from medveil.models import png
from medveil.models.errors import ImageError
from medveil.models.png import PNG_MAGIC, Chunk, chunks, decode_png


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 2), (7, 5, 3), (7, 5, 4)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_stored_samples_come_out(shape, dtype, rng):
    pixels = rng.integers(0, np.iinfo(dtype).max, shape, dtype)
    np.testing.assert_array_equal(decode_png(bytes(imagecodecs.png_encode(pixels))), pixels)


def test_a_file_that_is_cut_anywhere_never_reaches_the_decoder(rng, monkeypatch):
    """imagecodecs hands over nothing where the file ends, and libpng goes on with what its buffers happen to hold."""
    whole = bytes(imagecodecs.png_encode(rng.integers(0, 256, (20, 20), np.uint8)))
    monkeypatch.setattr(png.imagecodecs, "png_decode", lambda data: pytest.fail("libpng saw a cut file"))
    for length in range(len(PNG_MAGIC), len(whole)):
        with pytest.raises(ImageError) as refusal:
            decode_png(whole[:length])
        assert refusal.value.code == "truncated"


def test_a_byte_that_does_not_fit_its_checksum_is_damage(rng):
    whole = bytearray(imagecodecs.png_encode(rng.integers(0, 256, (20, 20), np.uint8)))
    whole[60] ^= 1
    with pytest.raises(ImageError, match="checksum") as refusal:
        decode_png(bytes(whole))
    assert refusal.value.code == "damaged"


@pytest.mark.parametrize("data", [b"", b"no stream of zlib", zlib.compress(b"\x09" * 21)])
def test_image_data_that_says_no_image_is_damage(data):
    """Every chunk is whole, the image is not; what the library says about it is memory that it has left."""
    header = Chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
    whole = PNG_MAGIC + b"".join(c.encoded() for c in (header, Chunk(b"IDAT", data), Chunk(b"IEND", b"")))
    assert [chunk.kind for chunk in chunks(whole)] == [b"IHDR", b"IDAT", b"IEND"]
    with pytest.raises(ImageError) as refusal:
        decode_png(whole)
    assert (refusal.value.code, refusal.value.private) == ("damaged", "")
