"""Reading a DICOM header and deciding what the object is: an image, a companion, or refused by name.

Everything is decided before a pixel is decoded, from bytes that nobody vouches for: a wrong VR, a file cut
short or a header that claims gigabytes must end in a named reason, never in a crash.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import pydicom
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_dataset as read_elements
from pydicom.filereader import read_preamble
from pydicom.uid import UID, AllTransferSyntaxes

from medveil.agent.imageio.limits import check_size, read_bytes
from medveil.agent.imageio.window import StoredRange
from medveil.models.errors import ImageError, MedveilError

__all__ = [
    "Layout",
    "check_elements",
    "check_identity",
    "damage_named",
    "is_companion",
    "looks_like_dicom",
    "missing_attribute",
    "quiet",
    "read_dataset",
    "read_layout",
    "refuse_unknown_syntax",
]

MAX_DECODED_BYTES: Final = 2**31
"""Largest object, all frames decoded. Frames are worked on one by one, but an uncompressed copy is built in
memory before it is written (our choice)."""

MAX_INFLATED_BYTES: Final = MAX_DECODED_BYTES
"""Largest data set that a deflated file may unpack to; a few kilobytes can claim gigabytes."""

INFLATE_STEP: Final = 1 << 20
"""Bytes inflated at a time while counting."""

MAX_META_BYTES: Final = 4096
"""Where the transfer syntax is looked for; file meta information takes a few hundred bytes."""

COMPANIONS: Final = frozenset(
    {
        uids.SegmentationStorage,
        UID("1.2.840.10008.5.1.4.1.1.66.7"),  # Label Map Segmentation, 2024d
        uids.SurfaceSegmentationStorage,
        uids.RTStructureSetStorage,
        uids.SpatialRegistrationStorage,
        uids.DeformableSpatialRegistrationStorage,
        uids.SpatialFiducialsStorage,
        uids.RealWorldValueMappingStorage,
        uids.KeyObjectSelectionDocumentStorage,
        uids.MicroscopyBulkSimpleAnnotationsStorage,
    }
)
"""Objects that say something *about* images. They are given the new UIDs and are never perturbed."""

COMPANION_ROOTS: Final = (
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.88.",  # structured reports, key objects, CAD results
)

REFUSED_CLASSES: Final[dict[str, tuple[str, str]]] = {
    uids.MediaStorageDirectoryStorage: (
        "dicomdir",
        "A DICOMDIR only lists other files; these are protected, and it is not needed.",
    ),
    uids.RTDoseStorage: (
        "rt-dose",
        "A dose grid is a measurement, not a picture; changing it would change a treatment record.",
    ),
    uids.ParametricMapStorage: (
        "parametric-map",
        "A parametric map holds measured quantities; changing it would change a finding.",
    ),
}

VIDEO_ROOTS: Final = ("1.2.840.10008.1.2.4.10", "1.2.840.10008.1.2.7.")
"""MPEG-2, H.264, HEVC (.100 to .108) and SMPTE streams: no decoder returns the exact frames."""

READABLE: Final = frozenset(
    {
        uids.ImplicitVRLittleEndian,
        uids.ExplicitVRLittleEndian,
        uids.ExplicitVRBigEndian,
        uids.DeflatedExplicitVRLittleEndian,
        uids.RLELossless,
        uids.JPEGBaseline8Bit,
        uids.JPEGExtended12Bit,
        uids.JPEGLossless,
        uids.JPEGLosslessSV1,
        uids.JPEGLSLossless,
        uids.JPEGLSNearLossless,
        uids.JPEG2000Lossless,
        uids.JPEG2000,
        uids.HTJ2KLossless,
        uids.HTJ2KLosslessRPCL,
        uids.HTJ2K,
    }
)

DAMAGED_HEADER: Final = "The header of this file is damaged; export it again."

GREY: Final = frozenset({"MONOCHROME1", "MONOCHROME2"})
COLOUR: Final = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
PALETTE: Final = "PALETTE COLOR"


@dataclass(frozen=True, slots=True)
class Layout:
    """How an object's pixels are stored, checked for consistency.

    Attributes:
        syntax: transfer syntax of the source.
        frames: number of frames, at least 1.
        rows: rows of a frame.
        columns: columns of a frame.
        samples: 1 for grey and palette, 3 for colour.
        photometric: photometric interpretation of the source.
        planar: planar configuration (0 pixel by pixel, 1 plane by plane), 0 where there is one sample.
        bits_allocated: 8 or 16.
        bits_stored: 2 to ``bits_allocated``; the stored bits are the lowest ones.
        signed: whether the values are two's complement.
    """

    syntax: UID
    frames: int
    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    bits_allocated: int
    bits_stored: int
    signed: bool

    @property
    def is_grey(self) -> bool:
        """Whether a frame has one grey value per pixel."""
        return self.photometric in GREY

    @property
    def is_native(self) -> bool:
        """Whether the pixels are stored without compression."""
        return not self.syntax.is_encapsulated

    @property
    def stored(self) -> StoredRange:
        """Every value that a sample can take."""
        return StoredRange.of_bits(self.bits_stored, signed=self.signed)

    @property
    def frame_samples(self) -> int:
        """Samples of one frame as stored: 4:2:2 keeps two of three."""
        stored_samples = 2 if self.photometric == "YBR_FULL_422" and self.is_native else self.samples
        return self.rows * self.columns * stored_samples

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame."""
        return self.frame_samples * self.bits_allocated // 8


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings and log: they quote values, which may be a patient's, and odd ones are kept."""
    logger = logging.getLogger("pydicom")
    handler, propagate = logging.NullHandler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


@contextmanager
def damage_named(code: str = "corrupt-header", public: str = DAMAGED_HEADER) -> Iterator[None]:
    """Turn whatever damaged bytes make a library raise into one named reason; pydicom raises nearly anything.

    Raises:
        ImageError: ``code``, with the foreign exception as its cause; an ``ImageError`` from inside as it is.
    """
    try:
        with quiet():
            yield
    except MedveilError:
        raise
    except Exception as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise  # a disk is full or gone; pydicom's own OSErrors about contents carry no number
        raise ImageError(code, public, private=repr(exc)) from exc


def looks_like_dicom(head: bytes) -> bool:
    """Return whether a file that starts with ``head`` (132 bytes) is DICOM, with or without preamble."""
    if head[128:132] == b"DICM":
        return True
    # Without preamble a file starts with the file meta group (0002), always explicit, or with group 0008.
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    if head[:2] == b"\x02\x00":
        return explicit
    return head[:2] == b"\x08\x00" and head[3:4] == b"\x00" and (explicit or head[6:8] == b"\x00\x00")


def read_dataset(path: Path) -> FileDataset:
    """Read a file whole; the pixel data stay as stored.

    Raises:
        ImageError: ``unreadable``, ``empty-file``, ``not-dicom``, ``too-large`` or ``corrupt-header``.
    """
    data = read_bytes(path)
    if not looks_like_dicom(data[:132]):
        raise ImageError("not-dicom", "This file is not a DICOM file.")
    with damage_named():
        _refuse_deflate_bomb(data)
        dataset = pydicom.dcmread(BytesIO(data), force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = _syntax_as_parsed(dataset)
    return dataset


def check_elements(dataset: FileDataset) -> None:
    """Parse every element once: pydicom leaves that to the first access, which would be too late to refuse.

    Raises:
        ImageError: ``corrupt-header``.
    """
    with damage_named():
        for _ in dataset.iterall():
            pass


def check_identity(dataset: Dataset) -> None:
    """Refuse an object without the UIDs from which its new ones are made.

    Raises:
        ImageError: ``missing-attribute``.
    """
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if not _text(dataset, keyword):
            raise missing_attribute(keyword)


def missing_attribute(keyword: str) -> ImageError:
    """Return the error of an attribute that is not there, or whose damaged value reads as none."""
    return ImageError(
        "missing-attribute",
        f"The attribute {keyword} is missing or cannot be read in this file; export it again.",
        private=keyword,
    )


def is_companion(dataset: Dataset) -> bool:
    """Return whether the object refers to images and holds none of its own (SEG, RTSTRUCT, SR, PR, KO)."""
    sop_class = _text(dataset, "SOPClassUID")
    return sop_class in COMPANIONS or sop_class.startswith(COMPANION_ROOTS)


def refuse_unknown_syntax(dataset: FileDataset) -> None:
    """Refuse a companion that pydicom could read but not write (Deflated Image Frame, 1.2.840.10008.1.2.8.1).

    Raises:
        ImageError: ``unsupported-transfer-syntax``.
    """
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    # The list, not `is_transfer_syntax`: that one answers otherwise once pynetdicom has been imported.
    if syntax not in AllTransferSyntaxes:
        raise _unknown_syntax(syntax)


def read_layout(dataset: FileDataset) -> Layout:
    """Return how the pixels of an image object are stored.

    Raises:
        ImageError: the object is not an image that medveil changes, or its header contradicts itself; the
            code says why (``rt-dose``, ``parametric-map``, ``video``, ``float-pixels``, ``32-bit``,
            ``1-bit``, ``no-pixels``, ``truncated``, ``missing-attribute``, ``corrupt-header``, ...).
    """
    _refuse_by_class(dataset)
    syntax = _transfer_syntax(dataset)
    _refuse_without_pixels(dataset)
    check_identity(dataset)
    photometric = _text(dataset, "PhotometricInterpretation")
    samples = _integer(dataset, "SamplesPerPixel")
    layout = Layout(
        syntax=syntax,
        frames=_integer(dataset, "NumberOfFrames", default=1),
        rows=_integer(dataset, "Rows"),
        columns=_integer(dataset, "Columns"),
        samples=samples,
        photometric=photometric,
        planar=_integer(dataset, "PlanarConfiguration", default=0) if samples > 1 else 0,
        bits_allocated=_integer(dataset, "BitsAllocated"),
        bits_stored=_integer(dataset, "BitsStored"),
        signed=bool(_integer(dataset, "PixelRepresentation")),
    )
    _check_layout(layout, _integer(dataset, "HighBit", default=layout.bits_stored - 1))
    _check_length(layout, dataset)
    return layout


def _refuse_deflate_bomb(data: bytes) -> None:
    """Inflate a deflated data set once, piece by piece, without keeping it; stop where it grows too large."""
    if uids.DeflatedExplicitVRLittleEndian.encode() not in data[:MAX_META_BYTES]:
        return
    stream = BytesIO(data)
    read_preamble(stream, force=True)
    read_elements(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    rest, size = data[stream.tell() :], 0
    while rest and not inflate.eof:
        size += len(inflate.decompress(rest, INFLATE_STEP))
        rest = inflate.unconsumed_tail
        if size > MAX_INFLATED_BYTES:
            raise ImageError("too-large", "This deflated file unpacks to more than medveil works on.")


def _syntax_as_parsed(dataset: FileDataset) -> UID:
    """Return the transfer syntax of a file that names none, from the way its elements could be read."""
    implicit, little = dataset.original_encoding
    if implicit:
        return uids.ImplicitVRLittleEndian
    return uids.ExplicitVRLittleEndian if little else uids.ExplicitVRBigEndian


def _refuse_by_class(dataset: FileDataset) -> None:
    """Refuse what is DICOM but no picture that may change."""
    sop_class = _text(dataset, "SOPClassUID")
    declared = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if (refused := REFUSED_CLASSES.get(sop_class) or REFUSED_CLASSES.get(declared)) is not None:
        raise ImageError(*refused)
    if not sop_class and not _text(dataset, "SOPInstanceUID"):
        raise ImageError("truncated", "This file ends before its image begins; export it again.")


def _transfer_syntax(dataset: FileDataset) -> UID:
    syntax = dataset.file_meta.TransferSyntaxUID
    if str(syntax).startswith(VIDEO_ROOTS):
        raise ImageError("video", "Video streams cannot be changed frame by frame; export single frames.")
    if syntax not in READABLE:
        raise _unknown_syntax(syntax)
    return UID(syntax)


def _unknown_syntax(syntax: UID) -> ImageError:
    return ImageError(
        "unsupported-transfer-syntax",
        "This file is compressed in a way that medveil does not read; export it uncompressed.",
        private=str(syntax),
    )


def _refuse_without_pixels(dataset: Dataset) -> None:
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise ImageError(
            "float-pixels", "Pixels stored as floating point numbers are measurements; left out."
        )
    if "PixelData" in dataset:
        return
    if "Rows" in dataset:
        raise ImageError("truncated", "This file ends before its pixels begin; export it again.")
    raise ImageError("no-pixels", "This object holds no image; leave it out of the source.")


def _check_layout(layout: Layout, high_bit: int) -> None:
    """Refuse what the rest of the code does not handle exactly."""
    allocated = layout.bits_allocated
    if allocated == 1:
        raise ImageError("1-bit", "A picture of one bit per pixel leaves no room for a small change.")
    if allocated > 16:
        raise ImageError(
            "32-bit", "Pixels of more than 16 bits are not handled; export the image in 16 bits."
        )
    coherent = (
        allocated in (8, 16)
        and 1 < layout.bits_stored <= allocated
        and high_bit == layout.bits_stored - 1
        and layout.frames >= 1
        and layout.planar in (0, 1)
    )
    colour = layout.samples == 3 and layout.photometric in COLOUR and not layout.signed
    single = layout.samples == 1 and (layout.is_grey or layout.photometric == PALETTE)
    if not coherent or not (colour or single):
        raise ImageError(
            "unsupported-layout",
            "The pixels of this file are stored in a way that medveil does not handle; export it in another one.",
            private=str(layout),
        )
    check_size(layout.rows, layout.columns)
    if layout.frame_bytes * layout.frames > MAX_DECODED_BYTES:
        raise ImageError("too-large", "This file claims more pixels than medveil works on; split it.")


def _check_length(layout: Layout, dataset: Dataset) -> None:
    """Refuse uncompressed pixels that are fewer than the header promises."""
    value = dataset.PixelData
    if not isinstance(value, bytes):
        raise ImageError("corrupt-header", DAMAGED_HEADER, private="PixelData is not a string of bytes")
    if not value or (layout.is_native and len(value) < layout.frame_bytes * layout.frames):
        raise ImageError("truncated", "The pixels of this file are cut short; export it again.")


def _text(dataset: Dataset, keyword: str) -> str:
    with damage_named():
        return str(dataset.get(keyword) or "").strip()


def _integer(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """Return a whole number from the header.

    Raises:
        ImageError: ``missing-attribute``, or ``corrupt-header`` where it is there and not a whole number.
    """
    with damage_named():  # a wrong VR makes text, bytes or a list of what should be a number
        value = dataset.get(keyword)
        if value is not None and value != "":
            return int(value)
    if default is None:
        raise missing_attribute(keyword)
    return default
