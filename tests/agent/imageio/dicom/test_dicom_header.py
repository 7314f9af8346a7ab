"""Whatever bytes come in, the answer is an image or a named reason."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset

from medveil.agent.imageio import dicom_header
from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_streams import codestream_size
from medveil.models.errors import ImageError

MakeDicom = Callable[..., Path]

PIXELS = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)


def read_all(dicom: DicomFormat, path: Path) -> None:
    """Inspect a file and read every frame."""
    item = dicom.inspect(path, PurePosixPath("a"))
    with dicom.open(item, path.parent) as frames:
        for number in range(len(frames)):
            frames[number]


def refusal(dicom: DicomFormat, path: Path) -> str:
    """Return the code under which a file is refused, when inspected or when read."""
    with pytest.raises(ImageError) as refused:
        read_all(dicom, path)
    return refused.value.code


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"SOPClassUID": uids.RTDoseStorage}, "rt-dose"),
        ({"SOPClassUID": uids.ParametricMapStorage}, "parametric-map"),
        ({"SOPClassUID": uids.MediaStorageDirectoryStorage}, "dicomdir"),
        ({"SOPInstanceUID": ""}, "missing-attribute"),
        ({"Rows": 0}, "no-pixels"),
        ({"Rows": None}, "missing-attribute"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "32-bit"),
        ({"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, "1-bit"),
        ({"BitsStored": 17, "HighBit": 16}, "unsupported-layout"),
        ({"HighBit": 11}, "unsupported-layout"),
        ({"SamplesPerPixel": 4}, "unsupported-layout"),
        ({"PhotometricInterpretation": "CMYK"}, "unsupported-layout"),
        ({"NumberOfFrames": 2}, "truncated"),
        ({"NumberOfFrames": -1}, "unsupported-layout"),
        ({"Rows": 65535, "Columns": 65535}, "too-large"),
        ({"NumberOfFrames": 10_000_000}, "too-large"),
        ({"WindowCenter": 40, "WindowWidth": 0.5}, "bad-window"),
    ],
)
def test_what_cannot_be_protected_is_refused_by_name(
    dicom: DicomFormat,
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
    attributes: dict[str, Any],
    code: str,
) -> None:
    dataset = make_dataset(PIXELS, Modality="MR")
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    path = tmp_path / "bad.dcm"
    pydicom.dcmwrite(path, dataset)
    assert refusal(dicom, path) == code


def test_a_missing_rows_attribute_is_named_in_the_message(
    dicom: DicomFormat, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset = make_dataset(PIXELS)
    del dataset.Rows
    pydicom.dcmwrite(tmp_path / "a.dcm", dataset, enforce_file_format=True)
    with pytest.raises(ImageError, match="Rows is missing"):
        dicom.inspect(tmp_path / "a.dcm", PurePosixPath("a"))


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels_are_refused_by_name(
    dicom: DicomFormat, make_dataset: Callable[..., Dataset], tmp_path: Path, keyword: str
) -> None:
    dataset = make_dataset(PIXELS)
    del dataset.PixelData
    setattr(dataset, keyword, bytes(8))
    pydicom.dcmwrite(tmp_path / "a.dcm", dataset, enforce_file_format=True)
    assert refusal(dicom, tmp_path / "a.dcm") == "float-pixels"


def test_an_object_without_any_image_is_refused_by_name(
    dicom: DicomFormat, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset = make_dataset(PIXELS, SOPClassUID=uids.TwelveLeadECGWaveformStorage)
    for keyword in ("PixelData", "Rows", "Columns"):
        delattr(dataset, keyword)
    pydicom.dcmwrite(tmp_path / "a.dcm", dataset, enforce_file_format=True)
    assert refusal(dicom, tmp_path / "a.dcm") == "no-pixels"


@pytest.mark.parametrize(
    ("syntax", "code"),
    [
        (uids.MPEG4HP41, "video"),
        ("1.2.840.10008.1.2.4.110", "unsupported-transfer-syntax"),  # JPEG XL
        (uids.JPIPHTJ2KReferenced, "unsupported-transfer-syntax"),
    ],
)
def test_unreadable_transfer_syntaxes_are_refused_by_name(
    dicom: DicomFormat, make_dicom: MakeDicom, syntax: str, code: str
) -> None:
    path = make_dicom(PIXELS, syntax=uids.JPEG2000Lossless)
    old = uids.JPEG2000Lossless.encode()
    new = str(syntax).encode()
    data = path.read_bytes()
    at = data.index(old)
    length = len(new) + len(new) % 2
    old_length = len(old) + len(old) % 2
    data = data[: at - 2] + struct.pack("<H", length) + new.ljust(length, b"\0") + data[at + old_length :]
    path.write_bytes(data)
    assert refusal(dicom, path) == code


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty-file"),
        (b"\0" * 5000, "not-dicom"),
        (b"\x89PNG\r\n" + bytes(500), "not-dicom"),
        (b"text\n" * 100, "not-dicom"),
    ],
)
def test_other_files_are_not_taken_for_dicom(
    dicom: DicomFormat, tmp_path: Path, data: bytes, code: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    assert not dicom.recognises(data[:512], path)
    assert refusal(dicom, path) == code


def test_a_file_zeroed_behind_its_preamble_is_refused_by_name(
    dicom: DicomFormat, make_dicom: MakeDicom
) -> None:
    path = make_dicom(PIXELS)
    path.write_bytes(path.read_bytes()[:132] + bytes(4000))
    assert refusal(dicom, path) in ("truncated", "corrupt-header", "missing-attribute")


@pytest.mark.parametrize(
    "syntax", [uids.ExplicitVRLittleEndian, uids.RLELossless, uids.JPEG2000Lossless, uids.JPEGLSLossless]
)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_refused_by_name(
    dicom: DicomFormat, make_dicom: MakeDicom, rng: np.random.Generator, syntax: str, kept: float
) -> None:
    noise = rng.integers(0, 4096, (2, 40, 40)).astype(np.uint16)
    path = make_dicom(noise, syntax=syntax, BitsStored=12)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert refusal(dicom, path) in ("truncated", "corrupt-header", "corrupt-pixels", "missing-attribute")


def test_a_wrong_vr_is_refused_by_name(
    dicom: DicomFormat, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset = make_dataset(PIXELS)
    del dataset.Rows
    dataset.add_new(0x00280010, "LO", "forty")
    pydicom.dcmwrite(tmp_path / "a.dcm", dataset, enforce_file_format=True)
    assert refusal(dicom, tmp_path / "a.dcm") == "corrupt-header"


@pytest.mark.parametrize("syntax", [uids.JPEG2000Lossless, uids.JPEGLSLossless])
def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(
    dicom: DicomFormat, make_dataset: Callable[..., Dataset], tmp_path: Path, syntax: str
) -> None:
    dataset = make_dataset(PIXELS, syntax=syntax)
    stream = dataset.PixelData
    claimed = (
        struct.pack(">II", 65535, 65535)
        if syntax == uids.JPEG2000Lossless
        else struct.pack(">HH", 65535, 65535)
    )
    at = stream.index(b"\xff\x51") + 6 if syntax == uids.JPEG2000Lossless else stream.index(b"\xff\xf7") + 5
    dataset.PixelData = stream[:at] + claimed + stream[at + len(claimed) :]
    pydicom.dcmwrite(tmp_path / "a.dcm", dataset, enforce_file_format=True)
    assert refusal(dicom, tmp_path / "a.dcm") == "size-mismatch"


def test_the_size_of_a_stream_is_read_from_its_own_header(make_dataset: Callable[..., Dataset]) -> None:
    for syntax in (uids.JPEG2000Lossless, uids.JPEGLSLossless):
        dataset = make_dataset(PIXELS[:33], syntax=syntax)
        (stream,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
        assert codestream_size(stream) == (33, 40)
    assert codestream_size(b"\xff\xd8\xff") is None
    assert codestream_size(b"no stream") is None


def test_a_deflated_file_that_unpacks_without_end_is_refused_by_name(
    dicom: DicomFormat, make_dicom: MakeDicom, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_dicom(np.zeros((400, 400), np.uint16), syntax=uids.DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 3000
    monkeypatch.setattr(dicom_header, "MAX_INFLATED_BYTES", 100_000)
    assert refusal(dicom, path) == "too-large"


def test_sequences_nested_without_end_are_refused_by_name(dicom: DicomFormat, make_dicom: MakeDicom) -> None:
    path = make_dicom(PIXELS)
    opened = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    data = path.read_bytes()
    at = data.index(b"\x08\x00\x60\x00CS")
    path.write_bytes(data[:at] + opened * 20_000)
    assert refusal(dicom, path) in ("corrupt-header", "truncated", "missing-attribute")


@pytest.mark.parametrize("syntax", [uids.ExplicitVRLittleEndian, uids.JPEG2000Lossless, uids.RLELossless])
def test_flipped_bits_never_crash(
    dicom: DicomFormat, make_dicom: MakeDicom, rng: np.random.Generator, tmp_path: Path, syntax: str
) -> None:
    """Every outcome is allowed but one: an exception that is not an ``ImageError``."""
    path = make_dicom(PIXELS, syntax=syntax, WindowCenter=800, WindowWidth=1600)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    end = min(900, data.size)  # mostly the header: flipped pixels are only another image
    outcomes: set[str] = set()
    for _ in range(150):
        broken = data.copy()
        at = rng.integers(132, end, 3)
        broken[at] ^= (1 << rng.integers(0, 8, 3)).astype(np.uint8)
        path.write_bytes(broken.tobytes())
        try:
            item = dicom.inspect(path, PurePosixPath("a"))
            with dicom.open(item, tmp_path) as frames:
                changed = [frames[number].pixels for number in range(len(frames))]
            dicom.write(item, range(len(changed)), iter(changed), tmp_path / "out.dcm")
            dicom.patch(item)
            outcomes.add("protected")
        except ImageError as error:
            outcomes.add(error.code)
    assert "protected" in outcomes
    assert len(outcomes) > 2


def test_no_refusal_says_anything_personal(
    dicom: DicomFormat, make_dicom: MakeDicom, rng: np.random.Generator
) -> None:
    path = make_dicom(PIXELS, name="Canary-Cora.dcm")
    data = path.read_bytes()
    for length in range(140, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError) as refused:
            dicom.inspect(path, PurePosixPath("Canary-Cora.dcm"))
        assert "canary" not in str(refused.value).lower()
        assert str(path.parent) not in str(refused.value)


def test_a_corrupt_deflate_stream_is_refused_by_name(dicom: DicomFormat, make_dicom: MakeDicom) -> None:
    path = make_dicom(PIXELS, syntax=uids.DeflatedExplicitVRLittleEndian)
    data = path.read_bytes()
    path.write_bytes(data[:400] + zlib.compress(b"something else"))
    assert refusal(dicom, path) in ("corrupt-header", "truncated")
