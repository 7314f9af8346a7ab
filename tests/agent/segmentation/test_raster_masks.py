"""What a mask file stores is read as stored: indices, bits and 16-bit numbers, never the colours of a viewer."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage

from medveil.agent.imageio import Item
from medveil.agent.segmentation.raster_masks import read_raster_mask
from medveil.models.errors import ImageError

LABELS = np.array([[0, 1, 2], [3, 2, 0]], np.uint8)


def item(path: Path) -> Item:
    return Item(path, PurePosixPath(path.name), PurePosixPath(path.name), path.suffix[1:], 1, 1, 1)


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "RGB", "RGBA", "LA"])
def test_every_way_to_store_labels_in_a_png_is_read_as_the_same_labels(mode, tmp_path):
    labels = LABELS > 0 if mode == "1" else LABELS.astype(np.uint16) if mode == "I;16" else LABELS
    image = PillowImage.fromarray(labels)
    if mode == "P":
        image = PillowImage.fromarray(labels, "L")
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    elif mode in ("RGB", "RGBA", "LA"):
        image = image.convert(mode)
    image.save(tmp_path / "m.png")
    found = read_raster_mask(item(tmp_path / "m.png"), 0)
    assert found.astype(int).tolist() == labels.astype(int).tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_an_indexed_png_of_few_bits_gives_its_indices(bits, tmp_path):
    image = PillowImage.fromarray(LABELS, "L")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    image.save(tmp_path / "m.png", bits=bits)
    assert read_raster_mask(item(tmp_path / "m.png"), 0).tolist() == LABELS.tolist()


def test_an_indexed_tiff_gives_its_indices_and_every_page_its_own(tmp_path):
    table = np.linspace(0, 65535, 3 * 256).reshape(3, 256).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "m.tiff") as file:
        for page in (LABELS, LABELS[::-1]):
            file.write(page, photometric="palette", colormap=table)
    for page, expected in enumerate((LABELS, LABELS[::-1])):
        assert read_raster_mask(item(tmp_path / "m.tiff"), page).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "mask-damaged"), (b"", "empty-file"), (b"\x89PNG", "mask-damaged")],
)
def test_a_damaged_mask_is_refused_by_name(content, code, tmp_path):
    (tmp_path / "m.png").write_bytes(content)
    with pytest.raises(ImageError) as refused:
        read_raster_mask(item(tmp_path / "m.png"), 0)
    assert refused.value.code == code


@pytest.mark.parametrize("compression", ["lzw", "zlib", "zstd", "packbits"])
def test_a_compressed_mask_with_broken_data_is_refused_by_name(compression, tmp_path):
    """Each codec has errors of its own; one of them once ended a whole job."""
    file = tmp_path / "m.tiff"
    tifffile.imwrite(file, np.kron(LABELS, np.ones((20, 20), np.uint8)), compression=compression)
    with tifffile.TiffFile(file) as written:
        (start,), (count,) = written.pages[0].dataoffsets, written.pages[0].databytecounts
    data = bytearray(file.read_bytes())
    data[start : start + count] = b"\xfe" * count
    file.write_bytes(data)
    with pytest.raises(ImageError, match="mask-damaged"):
        read_raster_mask(item(file), 0)


def test_a_colour_picture_is_no_mask(tmp_path, rng):
    PillowImage.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(ImageError, match="mask-colour"):
        read_raster_mask(item(tmp_path / "m.png"), 0)
