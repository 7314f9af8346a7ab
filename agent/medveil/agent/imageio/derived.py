"""What a protected DICOM object says about itself, and what it must no longer carry.

A protected image is a derived image: a new identity, a pointer to its source, and a plain statement of what
was done and by what. Whatever would show the clean picture again, or vouch for pixels that have changed,
goes: thumbnails, signatures, histograms, smallest and largest values.

Sources: DICOM PS3.3 C.7.6.1.1.2 (Image Type), C.7.6.16.2.6 (Derivation Image), C.12.1 (SOP Common), C.12.4
(General Reference), C.7.6.1.1.5 (lossy compression stays recorded, so those attributes are not touched); PS3.16
CID 7005, 7202, 7203.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import numpy as np
from pydicom import uid as uidlib
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from medveil.agent.imageio.dicom_header import PALETTE, Layout
from medveil.agent.imageio.dicom_pixels import Encoding
from medveil.agent.imageio.references import remap_references
from medveil.agent.imageio.uid import DerivedUids
from medveil.models.errors import ImageError

__all__ = ["PIXEL_DATA", "Derivation", "derive_companion", "derive_image", "refuse_protected"]

PIXEL_DATA: Final = 0x7FE00010

PICTURES_AND_SEALS: Final = frozenset(
    {"IconImageSequence", "DigitalSignaturesSequence", "MACParametersSequence"}
)
"""Thumbnails, and signatures that no longer fit; dropped at any depth from every object."""

PIXEL_FACTS: Final = frozenset(
    {
        "SmallestImagePixelValue",
        "LargestImagePixelValue",
        "SmallestPixelValueInSeries",
        "LargestPixelValueInSeries",
        "SmallestImagePixelValueInPlane",
        "LargestImagePixelValueInPlane",
        "HistogramSequence",
        "ExtendedOffsetTable",
        "ExtendedOffsetTableLengths",
        "PixelDataProviderURL",
        "DataSetTrailingPadding",
    }
)
"""What describes or points at the clean pixels; dropped from images."""

PALETTE_TABLES: Final = range(0x00281101, 0x00281300)
"""Palette descriptors and data (0028,11xx) and (0028,12xx); meaningless once the colours are RGB."""

JPEG_SECOND_MARKERS: Final = (0xC0, 0xC3, 0xC4, 0xDB, 0xE0, 0xE1, 0xE8, 0xEE, 0xF7, 0xFE)
"""What follows the start of a JPEG or JPEG-LS stream: a frame, a table, an application segment, a comment."""

MAGIC_ANYWHERE: Final = (
    *(b"\xff\xd8\xff" + bytes([marker]) for marker in JPEG_SECOND_MARKERS),
    b"\xff\x4f\xff\x51",  # JPEG 2000 codestream
    b"\x00\x00\x00\x0cjP  ",  # JP2 file
    b"\x89PNG\r\n\x1a\n",
)
"""How a picture file begins. Private blobs are searched for it, since a thumbnail may lie behind a vendor's
own header; they are not dropped wholesale, for some (Siemens CSA) are needed to read the image."""

MAGIC_AT_START: Final = (b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
"""GIF, BMP and TIFF: too short to be trusted in the middle of other data."""

SMALLEST_PICTURE_BYTES: Final = 128
"""Private values shorter than this are no picture, whatever they begin with (our choice)."""

SERIES_NUMBER_OFFSET: Final = 9000
"""Added to the series number: a viewer then lists the protected series behind the original (our choice)."""

LONG_STRING: Final = 64
SHORT_TEXT: Final = 1024
"""Longest values of VR LO and ST, in characters (PS3.5, table 6.2-1)."""

VALID_UID: Final = re.compile(r"[012](\.(0|[1-9]\d*))+")
"""What a UID looks like (PS3.5 9.1). Old files hold others; repeating one would make the copy invalid, too."""

WORD_BYTES: Final = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}
"""Size of the words that big-endian files swap inside values which pydicom leaves as bytes (PS3.5 7.3)."""

FUNCTIONAL_GROUPS: Final = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")

SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7."
"""Root of the multi-frame secondary capture classes: they may have groups, but not this one (PS3.3 A.8)."""

LISTING_SOURCES: Final = frozenset(
    {
        uidlib.EnhancedCTImageStorage,
        uidlib.EnhancedMRImageStorage,
        uidlib.EnhancedMRColorImageStorage,
        uidlib.EnhancedPETImageStorage,
        uidlib.EnhancedXAImageStorage,
        uidlib.EnhancedXRFImageStorage,
        uidlib.LegacyConvertedEnhancedCTImageStorage,
        uidlib.LegacyConvertedEnhancedMRImageStorage,
        uidlib.LegacyConvertedEnhancedPETImageStorage,
    }
)
"""Classes that list every source image once more, with its study and series, in Source Image Evidence Sequence
(0008,9154): type 1C, required where a source image is named (PS3.3 C.8.13.2, C.8.15.2, C.8.19.2, C.8.22.3)."""

PIXEL_ADDITION: Final = ("113042", "Pixel by pixel addition")  # CID 7203
SOURCE_IMAGE: Final = ("121322", "Source image for image processing operation")  # CID 7202
MODIFYING_EQUIPMENT: Final = ("109103", "Modifying Equipment")  # CID 7005

MANUFACTURER: Final = "medveil"
MODEL: Final = "medveil site agent"
"""How we enter ourselves as equipment, and know our own copies by."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """What is written into every object of a release.

    Attributes:
        uids: makes the new UIDs.
        moment: when the release was made; given by the caller, so that a rerun writes the same bytes.
        description: what was done, one sentence without anything personal.
        version: version of medveil.
        name_source: whether the source image is named by UID; off where a release must not be linkable.
        series_suffix: appended to the series description.
    """

    uids: DerivedUids
    moment: datetime
    description: str
    version: str
    name_source: bool = True
    series_suffix: str = " protected"


def derive_image(source: FileDataset, layout: Layout, encoding: Encoding, derivation: Derivation) -> Dataset:
    """Return the protected object, still without its pixel data.

    Args:
        source: the original; not changed.
        layout: how its pixels are stored.
        encoding: how the new pixels will be stored.
        derivation: identity and provenance of the release.
    """
    derived = _copy(source, leave_out={PIXEL_DATA})
    _drop(derived, PICTURES_AND_SEALS | PIXEL_FACTS)
    remap_references(derived, derivation.uids)
    _declare_derived(derived)
    _declare_pixels(derived, layout, encoding)
    _describe(derived, source, derivation)
    return _with_new_identity(derived, encoding.syntax, derivation)


def derive_companion(source: FileDataset, derivation: Derivation) -> Dataset:
    """Return a SEG, RTSTRUCT, SR, PR or KO that refers to the protected images; its content is untouched."""
    derived = _copy(source)
    _drop(derived, PICTURES_AND_SEALS)
    remap_references(derived, derivation.uids)
    _add_equipment(derived, derivation)
    syntax = source.file_meta.TransferSyntaxUID
    little = uidlib.ExplicitVRLittleEndian if syntax == uidlib.ExplicitVRBigEndian else syntax
    return _with_new_identity(derived, little, derivation)


def refuse_protected(dataset: Dataset) -> None:
    """Refuse a protected copy as a source, whichever site made it.

    A second copy with other noise would let a receiver average the two, and a PACS that routes all it gets to us
    would send our own copies round and round.

    Raises:
        ImageError: ``already-protected``.
    """
    for equipment in dataset.get("ContributingEquipmentSequence") or ():
        if (equipment.get("Manufacturer"), equipment.get("ManufacturerModelName")) == (MANUFACTURER, MODEL):
            raise ImageError(
                "already-protected",
                "This is a protected copy that medveil made; protect its original instead.",
            )


def _copy(source: FileDataset, leave_out: frozenset[int] | set[int] = frozenset()) -> Dataset:
    """Return a deep copy, little endian. ``copy.copy`` would share the elements with the original."""
    derived = Dataset()
    if source.original_encoding[1] is False:
        for element in source:
            if element.tag not in leave_out:
                derived[element.tag] = _little_endian(element)
        return derived
    for raw in source.elements():  # elements not yet parsed are written back byte for byte
        if raw.tag not in leave_out:
            derived[raw.tag] = deepcopy(raw)
    implicit, little = source.original_encoding
    derived.set_original_encoding(implicit, little, source.original_character_set)
    return derived


def _little_endian(element: DataElement) -> DataElement:
    """Return an element of a big-endian file as a little-endian one holds it."""
    if element.VR == "SQ":
        items = []
        for item in element.value:
            swapped = Dataset()
            for inner in item:
                swapped[inner.tag] = _little_endian(inner)
            items.append(swapped)
        return DataElement(element.tag, "SQ", Sequence(items))
    value = deepcopy(element.value)
    if element.VR in WORD_BYTES and isinstance(value, bytes):
        word = WORD_BYTES[element.VR]
        value = np.frombuffer(value, f">u{word}").astype(f"<u{word}").tobytes()
    return DataElement(element.tag, element.VR, value)


def _drop(dataset: Dataset, keywords: frozenset[str]) -> None:
    """Delete the named attributes and every embedded picture, at any depth."""
    for element in list(dataset):
        if element.keyword in keywords or _shows_a_picture(element):
            del dataset[element.tag]
        elif element.VR == "SQ":
            for item in element.value or ():
                _drop(item, keywords)


def _shows_a_picture(element: DataElement) -> bool:
    """Return whether a sequence holds pixels of its own, or a private value holds a picture file."""
    if element.VR == "SQ":
        return any(PIXEL_DATA in item for item in element.value or ())
    value = element.value
    if not (element.tag.is_private and isinstance(value, bytes) and len(value) >= SMALLEST_PICTURE_BYTES):
        return False
    return value.startswith(MAGIC_AT_START) or any(magic in value for magic in MAGIC_ANYWHERE)


def _declare_derived(dataset: Dataset) -> None:
    """Set Image Type (and Frame Type) to DERIVED.

    Classic images become SECONDARY, made after the examination. Enhanced ones stay what they are in value 2:
    there the standard fixes it to PRIMARY.
    """
    values = [str(value) for value in _as_list(dataset.get("ImageType"))] or ["ORIGINAL", "PRIMARY"]
    enhanced = _is_enhanced(dataset)
    second = values[1] if enhanced and len(values) > 1 else "PRIMARY" if enhanced else "SECONDARY"
    dataset.ImageType = ["DERIVED", second, *values[2:]]
    for keyword in FUNCTIONAL_GROUPS:
        for group in dataset.get(keyword) or ():
            for element in group:
                for item in element.value if element.VR == "SQ" else ():
                    if "FrameType" in item:
                        item.FrameType = ["DERIVED", *_as_list(item.FrameType)[1:]]


def _is_enhanced(dataset: Dataset) -> bool:
    return "SharedFunctionalGroupsSequence" in dataset or "Enhanced" in UID(dataset.SOPClassUID).name


def _declare_pixels(dataset: Dataset, layout: Layout, encoding: Encoding) -> None:
    """Describe the new pixel data; nothing is touched where source and copy are stored alike."""
    if layout.is_grey:
        return
    dataset.SamplesPerPixel = 3
    dataset.PhotometricInterpretation = encoding.photometric
    dataset.PlanarConfiguration = encoding.planar
    if layout.photometric == PALETTE:
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelRepresentation = 0
        for tag in [tag for tag in list(dataset.keys()) if tag in PALETTE_TABLES]:
            del dataset[tag]


def _describe(derived: Dataset, source: Dataset, derivation: Derivation) -> None:
    """Say what was done, to what, by what, and when."""
    named = derivation.name_source and bool(VALID_UID.fullmatch(str(source.SOPInstanceUID)))
    if _has_derivation_group(derived):
        _describe_in_groups(derived, source if named else None, derivation)
        if named:
            _list_source(derived, source)
    else:
        _describe_image(derived, source if named else None, derivation)
    series = str(derived.get("SeriesDescription") or "")
    suffix = derivation.series_suffix
    derived.SeriesDescription = (series[: LONG_STRING - len(suffix)] + suffix).strip()
    if derived.get("SeriesNumber") is not None:
        derived.SeriesNumber = int(derived.SeriesNumber) + SERIES_NUMBER_OFFSET
    _add_equipment(derived, derivation)


def _has_derivation_group(dataset: Dataset) -> bool:
    """Return whether the object describes its derivation in a functional group.

    It does wherever its class has that group; the Enhanced classes allow it nowhere else, since they exclude the
    General Image module (PS3.3 A.36.2.3 and its like). A damaged object that has lost its groups gets no new ones:
    readers would take what little we know of for all there is.
    """
    if str(dataset.SOPClassUID).startswith(SECONDARY_CAPTURE):
        return False
    return any(dataset.get(keyword) for keyword in FUNCTIONAL_GROUPS)


def _describe_image(derived: Dataset, source: Dataset | None, derivation: Derivation) -> None:
    """Add to the General Reference module (C.12.4); what was derived earlier stays in front."""
    said = str(derived.get("DerivationDescription") or "")
    derived.DerivationDescription = "; ".join(filter(None, (said, derivation.description)))[-SHORT_TEXT:]
    _append(derived, "DerivationCodeSequence", _code(*PIXEL_ADDITION))
    if source is not None:
        _append(derived, "SourceImageSequence", _source_image(source))


def _describe_in_groups(derived: Dataset, source: Dataset | None, derivation: Derivation) -> None:
    """Add one item to the Derivation Image functional group (C.7.6.16.2.6).

    A group is shared by all frames or stands in each of them, never both (C.7.6.16): earlier derivations decide.
    """
    step = Dataset()
    step.DerivationDescription = derivation.description[:SHORT_TEXT]
    step.DerivationCodeSequence = Sequence([_code(*PIXEL_ADDITION)])
    step.SourceImageSequence = Sequence([] if source is None else [_source_image(source)])  # type 2
    frames = derived.get("PerFrameFunctionalGroupsSequence") or ()
    if any("DerivationImageSequence" in frame for frame in frames):
        for number, frame in enumerate(frames, start=1):
            own = deepcopy(step)
            for image in own.SourceImageSequence:
                image.ReferencedFrameNumber = number
            _append(frame, "DerivationImageSequence", own)
    else:
        shared = derived.get("SharedFunctionalGroupsSequence") or Sequence([Dataset()])
        _append(shared[0], "DerivationImageSequence", step)
        derived.SharedFunctionalGroupsSequence = shared


def _list_source(derived: Dataset, source: Dataset) -> None:
    """List the source image where the object keeps lists of all that it refers to."""
    if not source.get("SeriesInstanceUID"):
        return
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedInstanceSequence = Sequence([_reference(source)])
    _append(derived, "ReferencedSeriesSequence", series)  # C.12.2, Common Instance Reference
    if derived.SOPClassUID in LISTING_SOURCES and source.get("StudyInstanceUID"):
        series, study = Dataset(), Dataset()
        series.SeriesInstanceUID = source.SeriesInstanceUID
        series.ReferencedSOPSequence = Sequence([_reference(source)])
        study.StudyInstanceUID = source.StudyInstanceUID
        study.ReferencedSeriesSequence = Sequence([series])
        _append(derived, "SourceImageEvidenceSequence", study)


def _source_image(source: Dataset) -> Dataset:
    """Return a reference to the source image that says what part it played."""
    reference = _reference(source)
    reference.PurposeOfReferenceCodeSequence = Sequence([_code(*SOURCE_IMAGE)])
    return reference


def _reference(source: Dataset) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    return reference


def _add_equipment(dataset: Dataset, derivation: Derivation) -> None:
    """Name medveil as equipment that modified the object (C.12.1, Contributing Equipment)."""
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = Sequence([_code(*MODIFYING_EQUIPMENT)])
    equipment.Manufacturer, equipment.ManufacturerModelName = MANUFACTURER, MODEL
    equipment.SoftwareVersions = derivation.version
    equipment.ContributionDateTime = derivation.moment.strftime("%Y%m%d%H%M%S")
    equipment.ContributionDescription = derivation.description[:SHORT_TEXT]
    _append(dataset, "ContributingEquipmentSequence", equipment)


def _with_new_identity(dataset: Dataset, syntax: UID, derivation: Derivation) -> Dataset:
    """Give the object its new UIDs and a fresh file meta group; nothing of the source's preamble remains."""
    dataset.SOPInstanceUID = derivation.uids.instance(str(dataset.SOPInstanceUID))
    if dataset.get("SeriesInstanceUID"):
        dataset.SeriesInstanceUID = derivation.uids.series(str(dataset.SeriesInstanceUID))
    dataset.InstanceCreationDate = derivation.moment.strftime("%Y%m%d")
    dataset.InstanceCreationTime = derivation.moment.strftime("%H%M%S")
    if "InstanceCreatorUID" in dataset:  # names the device that made the source
        del dataset.InstanceCreatorUID
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _append(dataset: Dataset, keyword: str, item: Dataset) -> None:
    setattr(dataset, keyword, Sequence([*(dataset.get(keyword) or ()), item]))


def _as_list(value: object) -> list[object]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]


def _code(value: str, meaning: str) -> Dataset:
    """Return a code of the DICOM Controlled Terminology (PS3.16 annex D)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item
