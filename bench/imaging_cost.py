"""What it costs: images and megabytes per second, peak memory; and two things that need no bundle to be shown."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset

import report
from imaging_files import PROTECTED, agent
from medveil.agent.formats import reading_formats
from medveil.agent.imageio import Derivation, DerivedUids, DicomFormat
from medveil.agent.imageio.dicom_survey import Outcome, sign_noise, survey
from medveil.models.phantoms import CLASS_NAMES, draw

SPEED_FILES = {
    "CT 512x512, uncompressed": "dicom_pydicom_data/693_UNCR.dcm",
    "CT 512x512, JPEG 2000": "dicom_pydicom_data/693_J2KR.dcm",
    "CR 1760x1760, JPEG 2000": "dicom_pydicom_data/RG3_J2KR.dcm",
    "US 640x480 colour, JPEG 2000": "dicom_pydicom_data/US1_J2KR.dcm",
    "MR 10x64x64, JPEG-LS": "dicom_pydicom_data/emri_small_jpeg_ls_lossless.dcm",
}
EPSILON = 8.0
COPIES = 3
"""Of each file in a job; each is another object to the agent."""

WAYS = ("plain_s", "bounded_s", "job_s")

DX_SIZE = (3000, 2500)
DX_BITS = 14
US_FRAMES, US_SIZE = 30, (600, 800)
AIM_BYTES = 2**30


def dry_run(data: Path, chosen: Sequence[Path], scratch: Path) -> str:
    """Return what became of files that were protected with sign noise, read back and restored."""
    shutil.rmtree(scratch, ignore_errors=True)
    source, copies = scratch / "source", scratch / "copies"
    copies.mkdir(parents=True)
    for path in chosen:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / path, source / path)
    counts = Counter(result.outcome for result in survey(source, reading_formats(), EPSILON, copies))
    assert not counts[Outcome.DIFFERS]
    shutil.rmtree(scratch)
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def speed(data: Path, bundle: Path, work: Path) -> tuple[str, dict[str, Any]]:
    """Measure decode + encode + write without a change, with the budget, and the whole job."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    figures: dict[str, Any] = {}
    for number, (label, name) in enumerate(SPEED_FILES.items()):
        path = data / name
        frames, size = _shape(path)
        plain_s = _rewritten(path, work, change=False)
        bounded_s = _rewritten(path, work, change=True)
        job = agent(work / "home", *_job(path, work / str(number), bundle))
        job_s = job.cpu_s / COPIES
        figures[label] = {"frames": frames, "bytes": size, "plain_s": plain_s, "bounded_s": bounded_s}
        figures[label] |= {"job_s": job_s}
    return speed_table(figures), figures


def speed_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Return images and megabytes per processor second, each way."""
    rows = [
        [label, *(f"{one['frames'] / one[way]:.3g} / {one['bytes'] / one[way] / 1e6:.3g}" for way in WAYS)]
        for label, one in figures.items()
    ]
    header = (
        "object",
        "decode + write: images/s / MB/s",
        "with noise and budget",
        "whole job (28 surrogate steps, read back, sealed)",
    )
    text = (
        "Of one core, by processor time, so that other work on the machine does not count; MB are decoded bytes. The "
        "middle column adds sign noise at full budget, the right one is `medveil-agent protect` over "
        f"{COPIES} objects, its start-up included, with the shipped bundle."
    )
    return text + "\n\n" + report.markdown_table(header, rows)


def _shape(path: Path) -> tuple[int, int]:
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array
    return int(dataset.get("NumberOfFrames") or 1), int(pixels.nbytes)


def _rewritten(path: Path, work: Path, *, change: bool) -> float:
    """Return the processor seconds that reading and writing an object takes; the best of three."""
    writer = DicomFormat(Derivation(DerivedUids(bytes(16), "", ""), datetime(2026, 1, 1), "bench", "0"))
    taken = []
    for _ in range(3):
        begun = time.process_time()
        item = writer.inspect(path, PurePosixPath(path.name))
        with writer.open(item, work) as frames:
            images = (frames[number] for number in range(item.frames))
            pixels = (sign_noise(image, EPSILON) if change else image.pixels for image in images)
            writer.write(item, range(item.frames), pixels, work / "copy.dcm")
        taken.append(time.process_time() - begun)
    return min(taken)


def _job(path: Path, place: Path, bundle: Path) -> list[object]:
    """Lay out copies of one object under identities of their own; return the command's arguments."""
    source = place / "source" / CLASS_NAMES[0]
    source.mkdir(parents=True)
    for number in range(COPIES):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = uids.generate_uid(entropy_srcs=[path.name, str(number)])
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(source / f"{number}.dcm")
    return ["protect", source.parent, "--out", place / "release", "--bundle", bundle]


def memory(bundle: Path, work: Path) -> tuple[str, dict[str, Any]]:
    """Measure the peak memory of a job over one large object, drawn here."""
    shutil.rmtree(work, ignore_errors=True)
    rows, figures = [], {}
    for name, dataset in (("DX 3000x2500, 14 bits", drawn_dx()), ("US 30x600x800, colour", drawn_us())):
        place = work / dataset.Modality
        source = place / "source" / CLASS_NAMES[0]
        source.mkdir(parents=True)
        pydicom.dcmwrite(source / "drawn.dcm", dataset, enforce_file_format=True)
        ran = agent(work / "home", "protect", source.parent, "--out", place / "release", "--bundle", bundle)
        assert ran.code == 0, ran.report
        figures[name] = {"peak_bytes": ran.peak_bytes, "cpu_s": ran.cpu_s}
        verdict = "yes" if ran.peak_bytes < AIM_BYTES else "NO"
        rows.append([name, f"{ran.peak_bytes / 2**20:.0f}", verdict, f"{ran.cpu_s:.0f}"])
    text = "Both objects are drawn phantoms, uncompressed; `medveil-agent protect` with the shipped bundle."
    return text + "\n\n" + report.markdown_table(
        ("object", "peak MiB", "under 1 GiB", "processor s"), rows
    ), figures


def drawn_dx() -> Dataset:
    """Return a drawn chest radiograph of a flat-panel detector's size."""
    pixels = _drawn(DX_SIZE, 2**DX_BITS - 1).astype(np.uint16)
    dataset = _object(uids.DigitalXRayImageStorageForPresentation, "DX", pixels, DX_BITS)
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.WindowCenter, dataset.WindowWidth = 2 ** (DX_BITS - 1), 2**DX_BITS
    return dataset


def drawn_us() -> Dataset:
    """Return a drawn colour cine."""
    one = _drawn(US_SIZE, 255).astype(np.uint8)
    frames = np.stack([np.roll(one, 2 * number, axis=1) for number in range(US_FRAMES)])
    dataset = _object(uids.UltrasoundMultiFrameImageStorage, "US", np.repeat(frames[..., None], 3, axis=3), 8)
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "RGB", 3
    dataset.PlanarConfiguration, dataset.NumberOfFrames = 0, US_FRAMES
    return dataset


def _drawn(size: tuple[int, int], highest: int) -> Any:
    """Return one phantom, enlarged to ``size``, with detector noise at full resolution."""
    rng = np.random.default_rng(0)
    phantom = draw(1, rng, size=128)[0][0]
    rows = np.arange(size[0]) * phantom.shape[0] // size[0]
    columns = np.arange(size[1]) * phantom.shape[1] // size[1]
    picture = phantom[rows[:, None], columns] / 255 + rng.normal(0, 0.01, size)
    return np.rint(np.clip(picture, 0, 1) * highest)


def _object(sop_class: str, modality: str, pixels: Any, bits: int) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.Modality = sop_class, modality
    dataset.SOPInstanceUID, dataset.StudyInstanceUID = "1.2.3.1", "1.2.3.2"
    dataset.SeriesInstanceUID = "1.2.3.3"
    dataset.Rows, dataset.Columns = pixels.shape[1:3] if pixels.ndim == 4 else pixels.shape
    dataset.BitsAllocated = pixels.itemsize * 8
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, 0
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    return dataset


def volume(data: Path, job: Path) -> tuple[str, dict[str, Any]]:
    """Compare a protected brain MR volume with its original, and its labels, in the job that part (a) ran."""
    release = job / "job-0" / "release" / "nii_hippocampus_a"
    name = min(path.name for path in (release / "images").iterdir())
    before, after = (nib.load(root / "images" / name) for root in (data / "nii_hippocampus_a", release))
    labels = nib.load(release / "labels" / name)
    same_labels = (release / "labels" / name).read_bytes() == (
        data / "nii_hippocampus_a" / "labels" / name
    ).read_bytes()
    clean, protected = (np.asanyarray(image.dataobj).astype(np.float64) for image in (before, after))
    structures = np.asanyarray(labels.dataobj)
    span = float(np.ptp(np.percentile(clean, (0.5, 99.5))))
    shifts = {
        str(label): float((protected - clean)[structures == label].mean() / span * 255)
        for label in np.unique(structures)
    }
    checks = {
        "label file equal byte by byte": same_labels,
        "shape equal": before.shape == after.shape == labels.shape,
        "affine equal to the original's": bool(np.array_equal(before.affine, after.affine)),
        "affine equal to the labels'": bool(np.array_equal(after.affine, labels.affine)),
        "header equal": before.header == after.header,
        "voxels changed": bool((clean != protected).any()),
    }
    assert all(checks.values()), checks
    moved = ", ".join(f"label {label}: {shift:+.2f}/255" for label, shift in shifts.items())
    rows = [[name, "yes" if held else "NO"] for name, held in checks.items()]
    text = f"`{name}`, {PROTECTED} in part (a). Mean shift inside each structure: {moved}."
    return text + "\n\n" + report.markdown_table(("check", ""), rows), {"checks": checks, "shift_255": shifts}
