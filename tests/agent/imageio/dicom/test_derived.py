"""What the protected object says, and what it must not carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medveil.agent.imageio.derived import Derivation, derive_image
from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_header import read_dataset, read_layout
from medveil.agent.imageio.dicom_pixels import output_encoding

PIXELS = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(300)

Derive = Callable[..., Dataset]


@pytest.fixture
def derive(make_dicom: Callable[..., Path], derivation: Derivation) -> Derive:
    """Return a function that derives an object from one with the given attributes."""

    def run(
        *,
        change: Callable[[Dataset], None] | None = None,
        using: Derivation = derivation,
        pixels: np.ndarray = PIXELS,
        **settings: Any,
    ) -> Dataset:
        path = make_dicom(pixels, **settings)
        if change:
            dataset = pydicom.dcmread(path)
            change(dataset)
            dataset.save_as(path)
        source = read_dataset(path)
        layout = read_layout(source)
        return derive_image(source, layout, output_encoding(layout), using)

    return run


def item(**attributes: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def test_instance_and_series_are_new_while_study_and_geometry_stay(derive: Derive) -> None:
    derived = derive(
        PixelSpacing=[0.5, 0.5], ImagePositionPatient=[1, 2, 3], WindowCenter=40, WindowWidth=400
    )
    assert derived.SOPInstanceUID.startswith("2.25.")
    assert derived.SeriesInstanceUID.startswith("2.25.")
    assert derived.file_meta.MediaStorageSOPInstanceUID == derived.SOPInstanceUID
    assert (derived.StudyInstanceUID, derived.FrameOfReferenceUID) == ("1.2.3.4", "1.2.3.4.9")
    assert (derived.PixelSpacing, derived.ImagePositionPatient) == ([0.5, 0.5], [1, 2, 3])
    assert (derived.WindowCenter, derived.PatientID) == (40, "CANARY-7")


def test_another_policy_gives_another_instance(derive: Derive, derivation: Derivation) -> None:
    other = replace(derivation, uids=replace(derivation.uids, policy_digest="policy-2"))
    assert derive().SOPInstanceUID != derive(using=other).SOPInstanceUID


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "SECONDARY", "AXIAL"]),
        (["DERIVED", "SECONDARY"], ["DERIVED", "SECONDARY"]),
        (["ORIGINAL", "PRIMARY", "M", "NORM"], ["DERIVED", "SECONDARY", "M", "NORM"]),
        (None, ["DERIVED", "SECONDARY"]),
    ],
)
def test_a_classic_image_becomes_derived_secondary(
    derive: Derive, source: list[str] | None, expected: list[str]
) -> None:
    assert derive(ImageType=source).ImageType == expected


def frame_type() -> Dataset:
    return item(CTImageFrameTypeSequence=Sequence([item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME"])]))


def enhanced(**groups: Any) -> dict[str, Any]:
    """Return the attributes of an Enhanced CT with these functional groups."""
    return {
        "SOPClassUID": uids.EnhancedCTImageStorage,
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        **{keyword: Sequence(items) for keyword, items in groups.items()},
    }


def test_an_enhanced_image_stays_primary_and_its_frames_become_derived(derive: Derive) -> None:
    derived = derive(**enhanced(SharedFunctionalGroupsSequence=[frame_type()]))
    assert derived.ImageType == ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    group = derived.SharedFunctionalGroupsSequence[0]
    assert group.CTImageFrameTypeSequence[0].FrameType == ["DERIVED", "PRIMARY", "VOLUME"]


def test_an_enhanced_image_says_it_in_a_functional_group_and_nowhere_else(derive: Derive) -> None:
    derived = derive(**enhanced(SharedFunctionalGroupsSequence=[frame_type()]))
    (step,) = derived.SharedFunctionalGroupsSequence[0].DerivationImageSequence
    assert step.DerivationDescription == "Protected against unauthorised training"
    assert step.DerivationCodeSequence[0].CodeValue == "113042"
    (source,) = step.SourceImageSequence
    assert source.ReferencedSOPInstanceUID == "1.2.3.4.5.6"
    assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    # PS3.3 A.38.1.3: the General Image module shall not be used.
    assert not {"DerivationDescription", "DerivationCodeSequence", "SourceImageSequence"} & set(derived.dir())
    assert derived.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID
    (study,) = derived.SourceImageEvidenceSequence
    assert study.StudyInstanceUID == "1.2.3.4"
    (series,) = study.ReferencedSeriesSequence
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.5.6"


def test_frames_that_were_derived_before_each_name_their_own_source_frame(derive: Derive) -> None:
    earlier = item(DerivationCodeSequence=[item(CodeValue="113040")], SourceImageSequence=[])
    frames = [item(DerivationImageSequence=[earlier]), item(DerivationImageSequence=[earlier])]
    pixels = np.stack([PIXELS, PIXELS])
    derived = derive(
        pixels=pixels,
        **enhanced(SharedFunctionalGroupsSequence=[frame_type()], PerFrameFunctionalGroupsSequence=frames),
    )
    assert "DerivationImageSequence" not in derived.SharedFunctionalGroupsSequence[0]
    for number, frame in enumerate(derived.PerFrameFunctionalGroupsSequence, start=1):
        before, ours = frame.DerivationImageSequence
        assert before.DerivationCodeSequence[0].CodeValue == "113040"
        assert ours.SourceImageSequence[0].ReferencedFrameNumber == number


@pytest.mark.parametrize(
    ("sop_class", "grouped", "listed"),
    [
        (uids.EnhancedMRImageStorage, True, True),
        (uids.LegacyConvertedEnhancedPETImageStorage, True, True),
        (uids.BreastTomosynthesisImageStorage, True, False),
        (uids.VLWholeSlideMicroscopyImageStorage, True, False),
        (uids.MultiFrameGrayscaleWordSecondaryCaptureImageStorage, False, False),
    ],
    ids=lambda value: value.name if isinstance(value, uids.UID) else None,
)
def test_each_class_says_it_where_the_standard_has_a_place(
    derive: Derive, sop_class: uids.UID, grouped: bool, listed: bool
) -> None:
    derived = derive(**enhanced(SharedFunctionalGroupsSequence=[frame_type()]) | {"SOPClassUID": sop_class})
    assert ("DerivationImageSequence" in derived.SharedFunctionalGroupsSequence[0]) is grouped
    assert ("DerivationCodeSequence" in derived) is not grouped
    assert ("SourceImageEvidenceSequence" in derived) is listed


def test_an_enhanced_image_that_has_lost_its_groups_is_given_no_new_ones(derive: Derive) -> None:
    derived = derive(**enhanced())
    assert "SharedFunctionalGroupsSequence" not in derived
    assert derived.DerivationCodeSequence[0].CodeValue == "113042"


def test_an_enhanced_source_is_not_named_where_a_release_must_not_be_linkable(
    derive: Derive, derivation: Derivation
) -> None:
    settings = enhanced(SharedFunctionalGroupsSequence=[frame_type()])
    derived = derive(using=replace(derivation, name_source=False), **settings)
    (step,) = derived.SharedFunctionalGroupsSequence[0].DerivationImageSequence
    assert len(step.SourceImageSequence) == 0
    assert "1.2.3.4.5.6" not in str(derived)


def test_it_says_what_was_done_to_what_by_what_and_when(derive: Derive) -> None:
    derived = derive(DerivationDescription="Averaged")
    assert derived.DerivationDescription == "Averaged; Protected against unauthorised training"
    assert derived.DerivationCodeSequence[0].CodeValue == "113042"
    source = derived.SourceImageSequence[0]
    assert source.ReferencedSOPInstanceUID == "1.2.3.4.5.6"
    assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    equipment = derived.ContributingEquipmentSequence[0]
    assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109103"
    assert (equipment.Manufacturer, equipment.SoftwareVersions) == ("medveil", "0.1.0")
    assert equipment.ContributionDateTime == "20261121120000"
    assert (derived.InstanceCreationDate, derived.InstanceCreationTime) == ("20261121", "120000")
    assert (derived.SeriesDescription, derived.SeriesNumber) == ("Axial protected", 9003)


def test_the_codes_are_the_ones_of_the_standard() -> None:
    from pydicom.sr.codedict import codes

    from medveil.agent.imageio import derived

    for ours, theirs in (
        (derived.PIXEL_ADDITION, codes.cid7203.PixelByPixelAddition),
        (derived.SOURCE_IMAGE, codes.cid7202.SourceImageForImageProcessingOperation),
        (derived.MODIFYING_EQUIPMENT, codes.cid7005.ModifyingEquipment),
    ):
        assert ours[0] == theirs.value
        assert ours[1].lower() == theirs.meaning.lower()


def test_the_source_is_not_named_where_a_release_must_not_be_linkable(
    derive: Derive, derivation: Derivation
) -> None:
    derived = derive(using=replace(derivation, name_source=False))
    assert "SourceImageSequence" not in derived
    assert "1.2.3.4.5.6" not in str(derived)


def test_an_invalid_source_uid_is_not_repeated(derive: Derive) -> None:
    def spoil(dataset: Dataset) -> None:
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "999.1.2"

    assert "SourceImageSequence" not in derive(change=spoil)


def test_a_long_series_description_stays_within_the_standards_length(derive: Derive) -> None:
    description = derive(SeriesDescription="x" * 64).SeriesDescription
    assert len(description) == 64
    assert description.endswith(" protected")


@pytest.mark.parametrize("mark", ["00", "01"])
def test_lossy_compression_stays_recorded(derive: Derive, mark: str) -> None:
    derived = derive(LossyImageCompression=mark, LossyImageCompressionRatio=12)
    assert (derived.LossyImageCompression, derived.LossyImageCompressionRatio) == (mark, 12)


def test_everything_that_shows_or_vouches_for_the_clean_pixels_is_gone(derive: Derive) -> None:
    thumbnail = item(Rows=4, Columns=4, BitsAllocated=8, PixelRepresentation=0, PixelData=bytes(16))

    def plant(dataset: Dataset) -> None:
        dataset.IconImageSequence = Sequence([thumbnail])
        dataset.DigitalSignaturesSequence = Sequence([item(MACIDNumber=1)])
        dataset.MACParametersSequence = Sequence([item(MACIDNumber=1)])
        dataset.add_new(0x00280106, "US", 0)
        dataset.add_new(0x00280107, "US", 1599)
        dataset.HistogramSequence = Sequence([item(HistogramNumberOfBins=1)])
        dataset.PixelDataProviderURL = "https://pacs.example/1"
        dataset.DataSetTrailingPadding = bytes(8)
        dataset.ReferencedImageSequence = Sequence([item(IconImageSequence=Sequence([thumbnail]))])

    derived = derive(change=plant)
    found = {element.keyword for element in derived.iterall()}
    assert not found & {
        "IconImageSequence",
        "DigitalSignaturesSequence",
        "MACParametersSequence",
        "SmallestImagePixelValue",
        "LargestImagePixelValue",
        "HistogramSequence",
        "PixelDataProviderURL",
        "DataSetTrailingPadding",
        "PixelData",
    }


@pytest.mark.parametrize(
    "picture",
    [
        JPEG,
        b"vendor header " * 20 + JPEG,
        b"\xff\x4f\xff\x51" + bytes(200),
        b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(200),
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"BM" + bytes(200),
    ],
)
def test_a_picture_in_a_private_blob_is_dropped(derive: Derive, picture: bytes) -> None:
    def plant(dataset: Dataset) -> None:
        dataset.private_block(0x0009, "ACME", create=True).add_new(0x01, "OB", picture)

    assert (0x0009, 0x1001) not in derive(change=plant)


def test_a_private_sequence_with_pixels_is_dropped(derive: Derive) -> None:
    def plant(dataset: Dataset) -> None:
        block = dataset.private_block(0x0009, "ACME", create=True)
        block.add_new(0x01, "SQ", [item(Rows=1, PixelData=bytes(2), BitsAllocated=8)])

    assert (0x0009, 0x1001) not in derive(change=plant)


def test_a_private_header_without_a_picture_stays(derive: Derive) -> None:
    header = b"SV10\x04\x03\x02\x01" + b"numbers that the vendor's software needs " * 200

    def plant(dataset: Dataset) -> None:
        dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", header)

    assert derive(change=plant)[0x0029, 0x1010].value == header


def test_nothing_of_the_sources_file_meta_or_preamble_remains(
    dicom: DicomFormat, make_dicom: Callable[..., Path], protect: Callable[..., tuple[Any, Path]]
) -> None:
    path = make_dicom(PIXELS)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.SourceApplicationEntityTitle = "CANARYWARD"
    dataset.preamble = b"CANARY-PREAMBLE".ljust(128, b"\0")
    dataset.save_as(path)
    _, target = protect(path)
    head = target.read_bytes()[:600]
    assert b"CANARYWARD" not in head
    assert b"CANARY-PREAMBLE" not in head


def test_deriving_does_not_change_the_source(make_dicom: Callable[..., Path], derivation: Derivation) -> None:
    icon = item(Rows=1, Columns=1, BitsAllocated=8, PixelRepresentation=0, PixelData=bytes(2))
    source = read_dataset(make_dicom(PIXELS, IconImageSequence=Sequence([icon])))
    before = source.to_json()
    layout = read_layout(source)
    derive_image(source, layout, output_encoding(layout), derivation)
    assert source.to_json() == before
