"""Decoding and encoding DICOM pixel data, one frame at a time.

The decoder of each transfer syntax is named here and never left to pydicom, whose own order tries gdcm first
and fails on signed JPEG-LS (pydicom 3.0.2: "output array is read-only"). For lossy sources the choice even
decides what "the original" is, because decoders differ by one grey level. pylibjpeg-libjpeg is GPL and not
used; JPEG Lossless and 12-bit JPEG go through imagecodecs.

Frames come out as ``(rows, columns)`` stored values for grey, ``(rows, columns, 3)`` RGB for all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.encoders.base import get_encoder
from pydicom.pixels.processing import apply_color_lut, convert_color_space
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import UID

from medveil.agent.imageio.dicom_header import PALETTE, Layout, quiet
from medveil.agent.imageio.dicom_streams import codestream_size
from medveil.agent.imageio.image import StoredArray
from medveil.models.errors import ImageError

__all__ = ["Encoding", "decode_frame", "encode_frames", "output_encoding", "rebuilds_exactly"]

NATIVE_PLUGIN: Final = ""  # uncompressed pixels need no plugin

DECODERS: Final = {
    uids.RLELossless: "pylibjpeg",
    uids.JPEGBaseline8Bit: "pillow",
    uids.JPEGExtended12Bit: "pillow",  # where it holds 8 bits; 12 bits see _decode_jpeg
    uids.JPEGLSLossless: "pyjpegls",
    uids.JPEGLSNearLossless: "pyjpegls",
    uids.JPEG2000Lossless: "pylibjpeg",
    uids.JPEG2000: "pylibjpeg",
    uids.HTJ2KLossless: "pylibjpeg",
    uids.HTJ2KLosslessRPCL: "pylibjpeg",
    uids.HTJ2K: "pylibjpeg",
}

ENCODERS: Final = {
    uids.RLELossless: "pylibjpeg",
    uids.JPEGLSLossless: "pyjpegls",
    uids.JPEG2000Lossless: "pylibjpeg",
}

SMALLEST_ENCODED_SIDE: Final = 32
"""OpenJPEG's five wavelet levels need 2^5 pixels a side, and pyjpegls' buffer is too small for noise below 16.
Smaller frames are left uncompressed; at 32 both take white noise of any depth (measured)."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the pixels of a derived object are written.

    Attributes:
        syntax: transfer syntax of the new file; always lossless.
        photometric: its photometric interpretation.
        planar: its planar configuration; None for one sample per pixel.
        bits_allocated: 8 or 16.
        bits_stored: bits that carry the value.
    """

    syntax: UID
    photometric: str
    planar: int | None
    bits_allocated: int
    bits_stored: int


def output_encoding(layout: Layout, *, keep_uncompressed: bool = False) -> Encoding:
    """Choose how the protected pixels are written: as the source, unless that would lose or mislead.

    Args:
        layout: of the source.
        keep_uncompressed: the object has overlay bits beside the pixels, which no compressed form carries.
    """
    syntax = _output_syntax(layout, keep_uncompressed)
    if layout.is_grey:
        return Encoding(syntax, layout.photometric, None, layout.bits_allocated, layout.bits_stored)
    bits = 8 if layout.photometric == PALETTE else layout.bits_allocated
    stored = 8 if layout.photometric == PALETTE else layout.bits_stored
    # A J2K codestream of RGB uses the reversible transform; dciodvfy objects to a header that still says RGB.
    photometric = "YBR_RCT" if syntax == uids.JPEG2000Lossless else "RGB"
    return Encoding(syntax, photometric, layout.planar if layout.is_native else 0, bits, stored)


def _output_syntax(layout: Layout, keep_uncompressed: bool) -> UID:
    if layout.is_native:
        # Big endian is retired; the other three stay what they are.
        return uids.ExplicitVRLittleEndian if layout.syntax == uids.ExplicitVRBigEndian else layout.syntax
    if keep_uncompressed or min(layout.rows, layout.columns) < SMALLEST_ENCODED_SIDE:
        return uids.ExplicitVRLittleEndian
    unused_bits = layout.bits_stored < layout.bits_allocated
    if layout.syntax == uids.JPEGLSLossless and not (layout.signed and unused_bits):
        return uids.JPEGLSLossless
    if layout.syntax == uids.RLELossless:
        misread = layout.samples == 3 and layout.bits_allocated == 16  # by SimpleITK 2.5
        return uids.ExplicitVRLittleEndian if misread else uids.RLELossless
    # JPEG-LS carries no sign: words come out of gdcm, dcmtk and Orthanc without sign extension.
    return uids.JPEG2000Lossless


def rebuilds_exactly(layout: Layout, dataset: Dataset) -> bool:
    """Return whether the stored values alone make the original Pixel Data element again, byte for byte.

    Only uncompressed grey and RGB of the right length and VR do. A lossless stream holds the same values whoever made
    it, but its bytes are its encoder's, and the promise is that every element comes back equal. Big endian
    files are retired and rare: not worth a way back of their own.
    """
    if not layout.is_native or layout.syntax == uids.ExplicitVRBigEndian:
        return False
    pixels = layout.frame_bytes * layout.frames
    even = pixels + pixels % 2  # PS3.5 8.1.1: a value of odd length is padded
    valid = layout.bits_allocated == 8 or dataset["PixelData"].VR == "OW"  # PS3.5 A.2 (b): 16 bits are words
    return valid and (layout.is_grey or layout.photometric == "RGB") and len(dataset.PixelData) == even


def decode_frame(dataset: Dataset, layout: Layout, frame: int) -> StoredArray:
    """Return one frame: stored values of grey, RGB of everything else.

    Raises:
        ImageError: ``corrupt-pixels`` or ``size-mismatch``.
    """
    try:
        with quiet():
            _check_stream(dataset, layout, frame)
            pixels = _decode(dataset, layout, frame)
            if layout.photometric == PALETTE:
                pixels = _to_rgb(pixels, dataset)
    except (ImageError, KeyboardInterrupt, SystemExit):
        raise
    # Whatever damaged data leads to: a panic of pylibjpeg-rle (Rust) is not even an Exception.
    except BaseException as exc:
        raise ImageError(
            "corrupt-pixels", "The pixels of this file cannot be decoded; export it again.", private=repr(exc)
        ) from exc
    _check_values(pixels, layout)
    # pydicom hands out big-endian arrays for big-endian files; their bytes would be written as they are.
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def encode_frames(
    frames: Iterable[StoredArray], source: Dataset, layout: Layout, encoding: Encoding
) -> bytes:
    """Return the value of Pixel Data (7FE0,0010) for the protected frames.

    Args:
        frames: all frames in order, as ``decode_frame`` gives them.
        source: the object they came from; bits beside the stored ones (overlays) are carried over from it.
        layout: of the source.
        encoding: how to write.
    """
    if not encoding.syntax.is_encapsulated:
        parts = [_native(pixels, source, layout, encoding, number) for number, pixels in enumerate(frames)]
        value = b"".join(parts)
        return value + _padding_byte(source, layout) * (len(value) % 2)
    return encapsulate([_compress(pixels, layout, encoding) for pixels in frames])


def _decode(dataset: Dataset, layout: Layout, frame: int) -> StoredArray:
    if layout.syntax in (uids.JPEGLossless, uids.JPEGLosslessSV1):
        return _decode_jpeg(dataset, layout, frame, imagecodecs.jpegsof3_decode)
    if layout.syntax == uids.JPEGExtended12Bit and layout.bits_allocated == 16:
        return _decode_jpeg(dataset, layout, frame, imagecodecs.jpeg_decode)
    plugin = DECODERS.get(layout.syntax, NATIVE_PLUGIN)
    # One Dataset, never a path: pixel_array(path, raw=True) fails on files that pixel_array(dataset) reads.
    return next(iter_pixels(dataset, indices=[frame], decoding_plugin=plugin))


def _decode_jpeg(
    dataset: Dataset, layout: Layout, frame: int, decode: Callable[[bytes], StoredArray]
) -> StoredArray:
    """Decode a JPEG stream without pydicom and give the words the sign that JPEG cannot carry."""
    stream = get_frame(dataset.PixelData, frame, number_of_frames=layout.frames)
    words = decode(stream).astype(np.uint16 if layout.bits_allocated == 16 else np.uint8)
    if layout.photometric.startswith("YBR"):
        return convert_color_space(words, "YBR_FULL", "RGB")
    if not layout.signed:
        return words
    return _sign_extended(words, layout).view(np.int16 if layout.bits_allocated == 16 else np.int8)


def _check_stream(dataset: Dataset, layout: Layout, frame: int) -> None:
    """Refuse a compressed frame whose own header disagrees with the DICOM header, before it is decoded."""
    if layout.is_native or layout.syntax == uids.RLELossless:
        return
    size = codestream_size(get_frame(dataset.PixelData, frame, number_of_frames=layout.frames))
    if size is not None and size != (layout.rows, layout.columns):
        raise ImageError(
            "size-mismatch",
            "The compressed pixels have another size than the header says; export this file again.",
            private=f"stream {size}, header {(layout.rows, layout.columns)}",
        )


def _check_values(pixels: StoredArray, layout: Layout) -> None:
    shape = (layout.rows, layout.columns) if layout.is_grey else (layout.rows, layout.columns, 3)
    if pixels.shape != shape:
        raise ImageError(
            "size-mismatch",
            "The decoded pixels have another size than the header says; export this file again.",
        )
    if layout.is_grey and (pixels.min() < layout.stored.low or pixels.max() > layout.stored.high):
        raise ImageError(
            "out-of-range",
            "Pixels of this file lie outside the range that its header declares; export it again.",
        )


def _to_rgb(indices: StoredArray, dataset: Dataset) -> StoredArray:
    """Return the colours that a palette shows, in 8 bits; 16-bit palettes hold 8-bit colours times 256."""
    colours = apply_color_lut(indices, dataset)
    return (colours if colours.dtype == np.uint8 else colours >> 8).astype(np.uint8)


def _native(pixels: StoredArray, source: Dataset, layout: Layout, encoding: Encoding, frame: int) -> bytes:
    """Return one uncompressed frame: little endian, whatever the byte order of the source was."""
    if layout.is_grey and layout.is_native and layout.bits_stored < layout.bits_allocated:
        pixels = _with_unused_bits(pixels, source, layout, frame)
    if encoding.planar == 1:
        pixels = np.moveaxis(pixels, 2, 0)
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<")).tobytes()


def _padding_byte(source: Dataset, layout: Layout) -> bytes:
    """Return the byte that makes an odd length even: the source's own, so that it comes back equal."""
    odd = layout.is_native and layout.frame_bytes * layout.frames % 2 == 1
    return source.PixelData[-1:] if odd and len(source.PixelData) % 2 == 0 else b"\0"


def _with_unused_bits(pixels: StoredArray, source: Dataset, layout: Layout, frame: int) -> StoredArray:
    """Return words whose bits above the stored ones are the source's: old files keep overlays there."""
    order = ">" if layout.syntax == uids.ExplicitVRBigEndian else "<"
    words = np.frombuffer(
        source.PixelData,
        f"{order}u{layout.bits_allocated // 8}",
        count=layout.frame_samples,
        offset=frame * layout.frame_bytes,
    ).reshape(pixels.shape)
    native = words.astype(words.dtype.newbyteorder("="))
    if layout.signed and np.array_equal(_sign_extended(native, layout), native):
        return pixels
    mask = np.array((1 << layout.bits_stored) - 1, native.dtype)
    merged: StoredArray = (native & ~mask) | (pixels.view(native.dtype) & mask)
    return merged


def _sign_extended(words: StoredArray, layout: Layout) -> StoredArray:
    """Return unsigned words with their unused bits set as the sign bit of the stored ones."""
    unused = layout.bits_allocated - layout.bits_stored
    signed: npt.NDArray[np.signedinteger[Any]] = words.view(f"i{words.dtype.itemsize}")
    return ((signed << unused) >> unused).view(words.dtype)


def _compress(pixels: StoredArray, layout: Layout, encoding: Encoding) -> bytes:
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1 if layout.is_grey else 3,
        "photometric_interpretation": encoding.photometric,
        "bits_allocated": encoding.bits_allocated,
        "bits_stored": encoding.bits_stored,
        "pixel_representation": int(layout.signed),
    }
    if encoding.planar is not None:
        options["planar_configuration"] = 0  # of the array handed over; the encoder orders its stream itself
    with quiet():
        encoder = get_encoder(encoding.syntax)
        return encoder.encode(
            np.ascontiguousarray(pixels), encoding_plugin=ENCODERS[encoding.syntax], **options
        )
