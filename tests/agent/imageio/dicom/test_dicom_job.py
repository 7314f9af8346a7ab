"""Hospital files through a whole job: protected, sealed, verified, and restored."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pydicom
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence

from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_header import read_dataset
from medveil.agent.imageio.nifti import NiftiFormat
from medveil.agent.protect import protect
from medveil.agent.restore import restore
from medveil.agent.sealing import load_site_key


def write_segmentation(path: Path) -> None:
    reference, dataset = Dataset(), Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = uids.CTImageStorage, "1.2.3.4.5.6"
    dataset.SOPClassUID, dataset.SOPInstanceUID = uids.SegmentationStorage, "1.2.3.77"
    dataset.SeriesInstanceUID = "1.2.3.7"
    dataset.SourceImageSequence = Sequence([reference])
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def test_a_folder_of_hospital_files_is_protected_and_restored(
    analytic: ModuleType,
    dicom: DicomFormat,
    make_dicom: Callable[..., Path],
    ct_slice: np.ndarray,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    for folder in ("normal", "pneumonia", "normal/labels"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    ct = make_dicom(ct_slice, WindowCenter=40, WindowWidth=400, syntax=uids.JPEG2000Lossless, BitsStored=13)
    ct.rename(source / "normal/ct.dcm")
    cine = rng.integers(0, 256, (3, 12, 12, 3)).astype(np.uint8)
    make_dicom(cine, SOPInstanceUID="1.2.9", Modality="US").rename(source / "pneumonia/us.dcm")
    write_segmentation(source / "normal/seg.dcm")
    (source / "normal/cut.dcm").write_bytes((source / "normal/ct.dcm").read_bytes()[:900])
    for name, voxels in (
        ("normal/mr.nii.gz", rng.normal(300, 50, (9, 8, 3)).astype(np.float32)),
        ("normal/labels/mr.nii.gz", rng.integers(0, 3, (9, 8, 3)).astype(np.uint8)),
    ):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), source / name)

    formats = (dicom, NiftiFormat())
    out = tmp_path / "release"
    outcome = protect(analytic.make_job(source, out, formats=formats))

    assert outcome.totals.quarantined == {"truncated": 1}
    assert outcome.totals.verified == 1 + 3 + 3
    assert outcome.totals.epsilon_max <= 8.0001
    released = pydicom.dcmread(out / "normal/ct.dcm")
    segmentation = pydicom.dcmread(out / "normal/seg.dcm")
    assert segmentation.SourceImageSequence[0].ReferencedSOPInstanceUID == released.SOPInstanceUID
    for name in ("normal/labels/mr.nii.gz",):
        assert (out / name).read_bytes() == (source / name).read_bytes()

    back = tmp_path / "restored"
    restored = restore(out, outcome.workspace.private, back, load_site_key(), formats)
    assert restored.refused == ()
    for name in ("normal/ct.dcm", "pneumonia/us.dcm", "normal/seg.dcm"):
        before, after = read_dataset(source / name), read_dataset(back / name)
        assert before == after
        assert before.file_meta.TransferSyntaxUID == after.file_meta.TransferSyntaxUID
    assert (back / "normal/ct.dcm").read_bytes() == (source / "normal/ct.dcm").read_bytes()
    for name in ("normal/mr.nii.gz", "normal/labels/mr.nii.gz"):
        assert gzip.decompress((back / name).read_bytes()) == gzip.decompress((source / name).read_bytes())
