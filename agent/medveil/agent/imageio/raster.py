"""PNG and JPEG. Both come out as PNG: writing JPEG again breaks the budget (by up to 49/255).

JPEG is decoded by Pillow, which stops at a truncated file where other decoders fill in grey; PNG see
``medveil.models.png``.
"""

from __future__ import annotations

import json
import struct
import warnings
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import imagecodecs
import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PillowImage

from medveil.agent.imageio.base import Frames, Item
from medveil.agent.imageio.full_range import FullRange
from medveil.agent.imageio.image import Image, StoredArray
from medveil.agent.imageio.limits import check_size, occupied_maximum, read_bytes
from medveil.models.disk import DAMAGE, decode_error
from medveil.models.errors import ImageError
from medveil.models.png import PNG_MAGIC, Chunk, decode_png
from medveil.models.png import chunks as png_chunks

__all__ = ["JpegFormat", "PngFormat", "SingleFrame", "read_bytes", "without_opaque_alpha"]

_JPEG_MAGIC: Final = b"\xff\xd8\xff"
_PNG_LEVEL: Final = (
    6  # zlib's own default; noise hardly compresses further at 9 and takes three times as long
)
_PNG_COLOUR_CHUNKS: Final = (b"cHRM", b"gAMA", b"iCCP", b"pHYs", b"sRGB")
"""What a release keeps of a PNG's metadata: how its values are to be shown. Text, time and EXIF may name a
patient."""
_PALETTE: Final = 3
_ALPHA_BIT: Final = 4
_CRITICAL_CHUNKS: Final = (b"IHDR", b"PLTE", b"IDAT", b"IEND")

# What has to be done to the decoded rows and columns so that the picture stands upright (TIFF 6.0,
# Orientation).
_UPRIGHT: Final = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, 3),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a, 1),
}


@dataclass(frozen=True, slots=True)
class SingleFrame:
    """The frames of a file that holds one."""

    image: Image

    def __len__(self) -> int:
        return 1

    def __getitem__(self, frame: int) -> Image:
        if frame != 0:
            raise IndexError(frame)
        return self.image


def without_opaque_alpha(pixels: StoredArray) -> StoredArray:
    """Return grey or RGB values of a decoded raster, dropping an alpha channel that hides nothing.

    Raises:
        ImageError: ``transparent`` (a see-through pixel has no one value), ``layout`` or ``sample-type``.
    """
    if pixels.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ImageError(
            "sample-type",
            "This image is neither 8 nor 16 bit; convert it and try again.",
            private=str(pixels.dtype),
        )
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        if (pixels[:, :, -1] != np.iinfo(pixels.dtype).max).any():
            raise ImageError("transparent", "This image has transparent pixels; flatten it and try again.")
        pixels = pixels[:, :, :-1]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return pixels


def _raster_image(pixels: StoredArray, item: Item) -> Image:
    flat = without_opaque_alpha(pixels)
    maximum = occupied_maximum(int(flat.max(initial=0)), flat.dtype.itemsize * 8)
    return Image(flat, FullRange(maximum), item.relative)


def _upright(pixels: StoredArray, orientation: int) -> StoredArray:
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _orientation_of(exif: bytes) -> int:
    """Return the orientation 1 to 8 of an EXIF block; 1 (upright) where it says nothing or is damaged."""
    try:
        parsed = PillowImage.Exif()
        parsed.load(exif)
        value = parsed.get(ExifTags.Base.Orientation, 1)
    except (ValueError, SyntaxError, struct.error, OSError):
        return 1
    return value if value in _UPRIGHT else 1


# --- PNG ------------------------------------------------------------------------------------------


def _encode_png(pixels: StoredArray, extra: Sequence[Chunk]) -> bytes:
    """Encode stored values; the extra chunks follow the header, where every chunk that we keep may stand."""
    encoded = bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels), level=_PNG_LEVEL))
    header_end = len(PNG_MAGIC) + 25
    return encoded[:header_end] + b"".join(chunk.encoded() for chunk in extra) + encoded[header_end:]


@dataclass(frozen=True, slots=True)
class PngFormat:
    """PNG: 2 to 16 bits, grey, RGB, palette (becomes RGB); opaque alpha is dropped."""

    name: str = "png"

    def recognises(self, head: bytes, path: Path) -> bool:
        """Return whether ``head`` starts with the PNG signature."""
        return head.startswith(PNG_MAGIC)

    def inspect(self, path: Path, relative: PurePosixPath) -> Item:
        """Describe a PNG from its header chunk."""
        with path.open("rb") as file:
            head = file.read(len(PNG_MAGIC) + 25)
        if len(head) < len(PNG_MAGIC) + 25 or head[12:16] != b"IHDR":
            raise ImageError("truncated", "This PNG ends before its image does; copy it again.")
        columns, rows, bits, colour = struct.unpack(">IIBB", head[16:26])
        check_size(rows, columns)
        if bits == 1 and colour != _PALETTE:
            raise ImageError(
                "one-bit", "This image is black and white (1 bit): there is no room for a change."
            )
        channels = 3 if colour & 2 else 1
        return Item(
            path=path,
            relative=relative,
            target=relative if relative.suffix.lower() == ".png" else relative.with_suffix(".png"),
            format=self.name,
            frames=1,
            size_bytes=path.stat().st_size,
            pixels=rows * columns * channels,
            seals_original=bits < 8 or colour == _PALETTE or bool(colour & _ALPHA_BIT),
        )

    @contextmanager
    def open(self, item: Item, scratch: Path) -> Iterator[Frames]:
        """Decode the one frame, upright."""
        data = read_bytes(item.path)
        exif = [chunk.data for chunk in png_chunks(data) if chunk.kind == b"eXIf"]
        pixels = _upright(decode_png(data), _orientation_of(exif[0]) if exif else 1)
        yield SingleFrame(_raster_image(pixels, item))

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        """Write PNG with the source's bit depth and colour chunks, nothing else of its metadata."""
        (protected,) = pixels
        kept = [chunk for chunk in png_chunks(read_bytes(item.path)) if chunk.kind in _PNG_COLOUR_CHUNKS]
        target.write_bytes(_encode_png(protected, kept))

    @contextmanager
    def read_back(self, target: Path) -> Iterator[Iterable[StoredArray]]:
        """Decode the written PNG."""
        yield [decode_png(read_bytes(target))]

    def patch(self, item: Item) -> bytes:
        """Return the ancillary chunks; the whole file where the protected copy has another layout."""
        data = read_bytes(item.path)
        chunks = list(png_chunks(data))
        if self._needs_whole_file(item, chunks):
            return b"F" + data
        extra = [
            [chunk.kind.decode("latin-1"), b64encode(chunk.data).decode("ascii")]
            for chunk in chunks
            if chunk.kind not in _CRITICAL_CHUNKS
        ]
        return b"C" + json.dumps(extra).encode()

    def restore(self, protected: Path, pixels: Iterable[StoredArray], patch: bytes, target: Path) -> None:
        """Write the original: stored values with every ancillary chunk, or the sealed file itself."""
        if patch[:1] == b"F":
            target.write_bytes(patch[1:])
            return
        (clean,) = pixels
        extra = [Chunk(kind.encode("latin-1"), b64decode(data)) for kind, data in json.loads(patch[1:])]
        target.write_bytes(_encode_png(clean, extra))

    @staticmethod
    def _needs_whole_file(item: Item, chunks: Sequence[Chunk]) -> bool:
        turned = any(c.kind == b"eXIf" and _orientation_of(c.data) != 1 for c in chunks)
        return item.seals_original or turned or any(c.kind == b"tRNS" for c in chunks)


# --- JPEG -----------------------------------------------------------------------------------------


@contextmanager
def _pillow(path: Path) -> Iterator[PillowImage.Image]:
    """Open a file with Pillow; its many ways to fail become one of ours each."""
    with warnings.catch_warnings():
        # Pillow's own limit is lower than ours; the size is checked against ours before decoding.
        warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)
        try:
            with PillowImage.open(path, formats=["JPEG"]) as image:
                yield image
        except PillowImage.DecompressionBombError as exc:
            raise ImageError(
                "too-large", "This JPEG claims too many pixels; cut it into tiles first."
            ) from exc
        except UnidentifiedImageError as exc:
            raise ImageError("damaged", "This JPEG cannot be decoded; copy it again.") from exc
        except DAMAGE as exc:
            code = "truncated" if "truncated" in str(exc).lower() else "damaged"
            raise decode_error(exc, code, "This JPEG cannot be decoded to its end; copy it again.") from exc


@dataclass(frozen=True, slots=True)
class JpegFormat:
    """Baseline and progressive JPEG, grey or RGB, turned upright by its EXIF orientation; PNG out."""

    name: str = "jpeg"

    def recognises(self, head: bytes, path: Path) -> bool:
        """Return whether ``head`` starts with a JPEG start-of-image marker."""
        return head.startswith(_JPEG_MAGIC)

    def inspect(self, path: Path, relative: PurePosixPath) -> Item:
        """Describe a JPEG from its frame header."""
        with _pillow(path) as image:
            columns, rows = image.size
            if image.mode not in ("L", "RGB"):
                raise ImageError(
                    "cmyk", "This JPEG is CMYK (made for print); convert it to RGB and try again."
                )
            channels = len(image.getbands())
        check_size(rows, columns)
        return Item(
            path=path,
            relative=relative,
            target=relative.with_suffix(".png"),
            format=self.name,
            frames=1,
            size_bytes=path.stat().st_size,
            pixels=rows * columns * channels,
            seals_original=True,
        )

    @contextmanager
    def open(self, item: Item, scratch: Path) -> Iterator[Frames]:
        """Decode the one frame, upright."""
        with _pillow(item.path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            decoded = np.asarray(image)
        yield SingleFrame(_raster_image(_upright(decoded, orientation), item))

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        """Write PNG without any of the JPEG's metadata."""
        (protected,) = pixels
        target.write_bytes(_encode_png(protected, ()))

    @contextmanager
    def read_back(self, target: Path) -> Iterator[Iterable[StoredArray]]:
        """Decode the written PNG."""
        yield [decode_png(read_bytes(target))]

    def patch(self, item: Item) -> bytes:
        """Return the original bitstream: decoders differ by 1 to 3 levels, only the file is exact."""
        return read_bytes(item.path)

    def restore(self, protected: Path, pixels: Iterable[StoredArray], patch: bytes, target: Path) -> None:
        """Write the original bitstream."""
        target.write_bytes(patch)
