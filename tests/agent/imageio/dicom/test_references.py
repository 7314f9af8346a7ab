"""References follow the images into the release; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence

from medveil.agent.imageio.derived import Derivation
from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_header import read_dataset
from medveil.agent.imageio.references import remap_references

IMAGE, SERIES = "1.2.3.4.5.6", "1.2.3.4.5"


def item(**attributes: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, Sequence(value) if keyword.endswith("Sequence") else value)
    return dataset


def image_reference(uid: str = IMAGE, sop_class: str = uids.CTImageStorage) -> Dataset:
    return item(ReferencedSOPClassUID=sop_class, ReferencedSOPInstanceUID=uid)


COMPANIONS = {
    "seg": (
        uids.SegmentationStorage,
        {
            "ReferencedSeriesSequence": [
                item(SeriesInstanceUID=SERIES, ReferencedInstanceSequence=[image_reference()])
            ],
            "PerFrameFunctionalGroupsSequence": [
                item(DerivationImageSequence=[item(SourceImageSequence=[image_reference()])])
            ],
        },
        3,
    ),
    "rtstruct": (
        uids.RTStructureSetStorage,
        {
            "ReferencedFrameOfReferenceSequence": [
                item(
                    FrameOfReferenceUID="1.2.3.4.9",
                    RTReferencedStudySequence=[
                        item(
                            ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
                            ReferencedSOPInstanceUID="1.2.3.4",
                            RTReferencedSeriesSequence=[
                                item(SeriesInstanceUID=SERIES, ContourImageSequence=[image_reference()])
                            ],
                        )
                    ],
                )
            ],
            "ROIContourSequence": [item(ContourSequence=[item(ContourImageSequence=[image_reference()])])],
        },
        3,
    ),
    "presentation state": (
        uids.GrayscaleSoftcopyPresentationStateStorage,
        {
            "ReferencedSeriesSequence": [
                item(SeriesInstanceUID=SERIES, ReferencedImageSequence=[image_reference()])
            ],
            "DisplayedAreaSelectionSequence": [item(ReferencedImageSequence=[image_reference()])],
        },
        3,
    ),
    "key objects": (
        uids.KeyObjectSelectionDocumentStorage,
        {
            "CurrentRequestedProcedureEvidenceSequence": [
                item(
                    StudyInstanceUID="1.2.3.4",
                    ReferencedSeriesSequence=[
                        item(SeriesInstanceUID=SERIES, ReferencedSOPSequence=[image_reference()])
                    ],
                )
            ],
            "ContentSequence": [item(ReferencedSOPSequence=[image_reference()])],
        },
        3,
    ),
    "report": (
        uids.ComprehensiveSRStorage,
        {
            "ContentSequence": [
                item(
                    ValueType="CONTAINER",
                    ContentSequence=[item(ValueType="IMAGE", ReferencedSOPSequence=[image_reference()])],
                )
            ]
        },
        1,
    ),
}


@pytest.fixture
def make_companion(tmp_path: Path) -> Callable[[str], Path]:
    def write(kind: str) -> Path:
        sop_class, attributes, _ = COMPANIONS[kind]
        dataset = item(**attributes)
        dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, "1.2.3.77"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.4", "1.2.3.7"
        dataset.DigitalSignaturesSequence = Sequence([item(MACIDNumber=1)])
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
        path = tmp_path / "companion.dcm"
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
        return path

    return write


def nested_uids(dataset: Dataset) -> list[str]:
    return [str(element.value) for element in dataset.iterall() if element.VR == "UI"]


@pytest.mark.parametrize("kind", COMPANIONS)
def test_every_reference_to_an_image_or_its_series_is_renamed(
    dicom: DicomFormat,
    derivation: Derivation,
    make_companion: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
) -> None:
    path = make_companion(kind)
    companion = dicom.inspect(path, PurePosixPath("a"))
    assert (companion.frames, companion.pixels) == (0, 0)
    dicom.write(companion, (), (), tmp_path / "out.dcm")
    released = pydicom.dcmread(tmp_path / "out.dcm")
    found = nested_uids(released)
    renamed = {derivation.uids.instance(IMAGE), derivation.uids.series(SERIES)}
    assert sum(uid in renamed for uid in found) == COMPANIONS[kind][2]
    assert not {IMAGE, SERIES} & set(found)
    assert found.count("1.2.3.4") == nested_uids(pydicom.dcmread(path)).count("1.2.3.4")
    assert "DigitalSignaturesSequence" not in released
    assert released.SOPInstanceUID == derivation.uids.instance("1.2.3.77")


@pytest.mark.parametrize("kind", COMPANIONS)
def test_a_companion_is_restored_element_by_element(
    dicom: DicomFormat, make_companion: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    path = make_companion(kind)
    companion = dicom.inspect(path, PurePosixPath("a"))
    dicom.write(companion, (), (), tmp_path / "out.dcm")
    dicom.restore(tmp_path / "out.dcm", (), dicom.patch(companion), tmp_path / "restored.dcm")
    assert read_dataset(tmp_path / "restored.dcm") == read_dataset(path)


@pytest.mark.parametrize(
    "reference",
    [
        image_reference(sop_class=uids.RTDoseStorage),
        image_reference(sop_class=uids.RTPlanStorage),
        image_reference(sop_class="1.2.840.10008.3.1.2.3.3"),  # a performed procedure step
        item(ReferencedSOPInstanceUID=IMAGE),  # of no known class
        item(TrackingUID=IMAGE, FrameOfReferenceUID=IMAGE),
    ],
)
def test_what_medveil_does_not_release_keeps_its_name(derivation: Derivation, reference: Dataset) -> None:
    dataset = item(ContentSequence=[item(ContentSequence=[reference])])
    before = dataset.to_json()
    assert remap_references(dataset, derivation.uids) == 0
    assert dataset.to_json() == before


def test_the_objects_own_identifiers_are_not_references(derivation: Derivation) -> None:
    dataset = item(SOPInstanceUID=IMAGE, SeriesInstanceUID=SERIES, ContentSequence=[image_reference()])
    remap_references(dataset, derivation.uids)
    assert (dataset.SOPInstanceUID, dataset.SeriesInstanceUID) == (IMAGE, SERIES)


def test_an_image_and_what_refers_to_it_still_fit(
    dicom: DicomFormat,
    make_dicom: Callable[..., Path],
    make_companion: Callable[[str], Path],
    protect: Callable[..., tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    _, image_path = protect(make_dicom(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    companion = dicom.inspect(make_companion("seg"), PurePosixPath("a"))
    dicom.write(companion, (), (), tmp_path / "out.dcm")
    image, segmentation = pydicom.dcmread(image_path), pydicom.dcmread(tmp_path / "out.dcm")
    series = segmentation.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == image.SeriesInstanceUID
    assert series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID


def test_a_segmentations_own_pixels_are_untouched(
    dicom: DicomFormat, shared_data: Path, tmp_path: Path
) -> None:
    for name in ("liver.dcm", "liver_expb.dcm", "liver_j2k.dcm", "liver_nonbyte_aligned.dcm"):
        path = shared_data / "dicom_pydicom_data" / name
        dicom.write(dicom.inspect(path, PurePosixPath(name)), (), (), tmp_path / name)
        before, after = pydicom.dcmread(path), pydicom.dcmread(tmp_path / name)
        assert np.array_equal(before.pixel_array, after.pixel_array)
