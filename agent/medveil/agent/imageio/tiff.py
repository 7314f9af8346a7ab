"""TIFF: 8 and 16 bit, grey (either polarity), RGB or palette, one page or several of one size."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, PREDICTOR

from medveil.agent.imageio.base import Frames, Item
from medveil.agent.imageio.full_range import FullRange
from medveil.agent.imageio.image import Image, StoredArray
from medveil.agent.imageio.limits import check_size, occupied_maximum, read_bytes
from medveil.agent.imageio.raster import without_opaque_alpha
from medveil.models.disk import DAMAGE, decode_error
from medveil.models.errors import ImageError
from medveil.models.tiff import TIFF_MAGICS, decodes, open_tiff

__all__ = ["TiffFormat"]

_GREY: Final = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
_COLOUR: Final = (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR, PHOTOMETRIC.PALETTE)
_LOSSLESS: Final = {
    COMPRESSION.NONE: "none",
    COMPRESSION.LZW: "lzw",
    COMPRESSION.ADOBE_DEFLATE: "zlib",
    COMPRESSION.DEFLATE: "zlib",
    COMPRESSION.PACKBITS: "packbits",
    COMPRESSION.ZSTD: "zstd",
}
"""Compression families that a protected copy keeps; whatever else the source used becomes zlib."""
_TEXT_TAGS: Final = (270, 271, 272, 285, 305, 306, 315, 316, 33432)
"""ImageDescription, Make, Model, PageName, Software, DateTime, Artist, HostComputer, Copyright: sealed, never
released, because they may name a patient."""

# tifffile reports what it puts up with through logging; a steward's screen is no place for it, and what
# matters raises. Its records still reach a handler that someone installs on purpose.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turn whatever goes wrong while a TIFF is read into one of our errors."""
    try:
        yield
    except DAMAGE as exc:
        raise decode_error(exc, "damaged", "This TIFF cannot be decoded to its end; copy it again.") from exc


@contextmanager
def _tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF to read it; what goes wrong inside is the file's fault."""
    with _damage_named(), open_tiff(path) as file:
        yield file


def _pages(file: tifffile.TiffFile) -> Sequence[Any]:
    """Return the pages; tifffile's own types allow for a lighter kind of page that is not in use here."""
    return list(file.pages)


def _check_page(page: Any) -> None:
    """Refuse by name what cannot be perturbed in stored integers.

    Raises:
        ImageError: ``one-bit``, ``cmyk``, ``sample-type``, ``layout``, ``compression``, ``too-large`` or
            ``no-pixels``.
    """
    check_size(page.imagelength, page.imagewidth)
    if page.bitspersample == 1:
        raise ImageError("one-bit", "This image is black and white (1 bit): there is no room for a change.")
    if page.photometric == PHOTOMETRIC.SEPARATED:
        raise ImageError("cmyk", "This TIFF is CMYK (made for print); convert it to RGB and try again.")
    if page.photometric not in (*_GREY, *_COLOUR):
        raise ImageError(
            "layout", "This TIFF is neither grey nor RGB; convert it.", private=str(page.photometric)
        )
    if page.bitspersample not in (8, 16) or page.sampleformat != tifffile.SAMPLEFORMAT.UINT:
        raise ImageError(
            "sample-type",
            "This TIFF is neither 8 nor 16 bit unsigned; convert it and try again.",
            private=f"{page.bitspersample} bit, sample format {page.sampleformat}",
        )
    if not decodes(page.compression):
        raise ImageError(
            "compression",
            "This TIFF is compressed in a way that is not read; export it uncompressed, or with LZW or ZIP.",
            private=str(page.compression),
        )
    if page.imagedepth != 1:
        raise ImageError("layout", "This TIFF holds a volume in one page; save it as one page per slice.")


def _pixels_of(page: Any) -> StoredArray:
    """Decode one page to ``(rows, columns)`` or ``(rows, columns, 3)``, native byte order."""
    decoded = page.asarray()
    if page.photometric == PHOTOMETRIC.PALETTE:
        # TIFF colour maps hold 16 bits per entry, filled from 8 bits by repetition.
        return np.ascontiguousarray((page.colormap[:, decoded] >> 8).astype(np.uint8).transpose(1, 2, 0))
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and decoded.ndim == 3:
        decoded = decoded.transpose(1, 2, 0)
    return without_opaque_alpha(np.ascontiguousarray(decoded, decoded.dtype.newbyteorder("=")))


@dataclass(frozen=True, slots=True)
class _Pages:
    """The pages of an open TIFF; all share the range of the first, so that a stack keeps one scale."""

    file: tifffile.TiffFile
    item: Item
    maximum: int

    def __len__(self) -> int:
        return self.item.frames

    def __getitem__(self, frame: int) -> Image:
        page = _pages(self.file)[frame]  # past the last one an IndexError, which ends an iteration
        inverted = page.photometric == PHOTOMETRIC.MINISWHITE
        with _damage_named():
            pixels = _pixels_of(page)
        return Image(pixels, FullRange(self.maximum, inverted), self.item.relative, frame)


@dataclass(frozen=True, slots=True)
class TiffFormat:
    """TIFF and BigTIFF, either byte order, any lossless compression (a lossy one becomes zlib)."""

    name: str = "tiff"

    def recognises(self, head: bytes, path: Path) -> bool:
        """Return whether ``head`` starts with one of the four TIFF signatures."""
        return head.startswith(TIFF_MAGICS)

    def inspect(self, path: Path, relative: PurePosixPath) -> Item:
        """Describe a TIFF from its directories."""
        with _tiff(path) as file:
            pages = _pages(file)
            for page in pages:
                _check_page(page)
            first = pages[0]
            layout = {(p.imagelength, p.imagewidth, p.samplesperpixel, p.photometric, p.dtype) for p in pages}
            if len(layout) != 1:
                raise ImageError(
                    "mixed-pages", "The pages of this TIFF differ in size or kind; save them as single files."
                )
            transformed = first.photometric in (PHOTOMETRIC.PALETTE, PHOTOMETRIC.YCBCR) or first.extrasamples
            lossy = any(p.compression not in _LOSSLESS for p in pages)
            # OME, ImageJ, GeoTIFF, tifffile's own: tags that describe the layout of the file they stand in.
            structured = bool(file.flags)
            channels = 1 if first.photometric in _GREY else 3
            return Item(
                path=path,
                relative=relative,
                target=relative
                if relative.suffix.lower() in (".tif", ".tiff")
                else relative.with_suffix(".tif"),
                format=self.name,
                frames=len(pages),
                size_bytes=path.stat().st_size,
                pixels=first.imagelength * first.imagewidth * channels * len(pages),
                seals_original=bool(transformed) or lossy or structured,
            )

    @contextmanager
    def open(self, item: Item, scratch: Path) -> Iterator[Frames]:
        """Open the pages; the stored range is the one that all of them together occupy."""
        with ExitStack() as closed:
            with _damage_named():  # not what is done with the images: its errors are no fault of the file
                file = closed.enter_context(open_tiff(item.path))
                pages = _pages(file)
                largest = max(int(_pixels_of(page).max()) for page in pages)
                bits = 8 if pages[0].photometric == PHOTOMETRIC.PALETTE else pages[0].bitspersample
            yield _Pages(file, item, occupied_maximum(largest, bits))

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        """Write the pages with the source's compression family, resolution and colour profile."""
        with _tiff(item.path) as source, _writer(target, source) as writer:
            for page, protected in zip(_pages(source), pixels, strict=True):
                writer.write(protected, **_page_options(page))

    @contextmanager
    def read_back(self, target: Path) -> Iterator[Iterable[StoredArray]]:
        """Decode the written pages in order."""
        with _tiff(target) as file:
            yield (_pixels_of(page) for page in _pages(file))

    def patch(self, item: Item) -> bytes:
        """Return the text tags of every page; the whole file where the protected copy has another layout."""
        if item.seals_original:
            return b"F" + read_bytes(item.path)
        with _tiff(item.path) as file:
            texts = [
                [(tag.code, str(tag.value)) for tag in page.tags if tag.code in _TEXT_TAGS]
                for page in _pages(file)
            ]
        return b"T" + json.dumps(texts).encode()

    def restore(self, protected: Path, pixels: Iterable[StoredArray], patch: bytes, target: Path) -> None:
        """Write the original stored values with the source's text tags, or the sealed file itself."""
        if patch[:1] == b"F":
            target.write_bytes(patch[1:])
            return
        texts = json.loads(patch[1:])
        with _tiff(protected) as source, _writer(target, source) as writer:
            for page, clean, tags in zip(_pages(source), pixels, texts, strict=True):
                extra = [(code, "s", 0, text, True) for code, text in tags]
                writer.write(clean, **_page_options(page), extratags=extra)


def _writer(target: Path, source: tifffile.TiffFile) -> tifffile.TiffWriter:
    return tifffile.TiffWriter(target, bigtiff=source.is_bigtiff, byteorder=source.byteorder)


def _page_options(page: Any) -> dict[str, Any]:
    """Return how a page is written: only what depends on the source, no clock and no program name."""
    compression = _LOSSLESS.get(page.compression, "zlib")
    predictable = compression in ("lzw", "zlib", "zstd")
    return {
        "photometric": page.photometric if page.photometric in _GREY else PHOTOMETRIC.RGB,
        "planarconfig": None if page.photometric in _GREY else tifffile.PLANARCONFIG.CONTIG,
        "compression": None if compression == "none" else compression,
        "predictor": PREDICTOR.HORIZONTAL if predictable else None,
        "resolution": page.resolution,
        "resolutionunit": page.resolutionunit,
        "iccprofile": page.iccprofile,
        "metadata": None,
        "software": False,
        "contiguous": False,
    }
