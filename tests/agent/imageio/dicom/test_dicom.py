"""Round trips: what is written is what was meant, and what is restored is what was there."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from medveil.agent.imageio import dicom_pixels, scan
from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_header import READABLE, quiet, read_dataset, read_layout
from medveil.agent.imageio.dicom_pixels import decode_frame

MakeDicom = Callable[..., Path]
Protect = Callable[..., tuple[list[np.ndarray], Path]]

LOSSLESS = [
    uids.ImplicitVRLittleEndian,
    uids.ExplicitVRLittleEndian,
    uids.DeflatedExplicitVRLittleEndian,
    uids.RLELossless,
    uids.JPEGLSLossless,
    uids.JPEG2000Lossless,
]


def frames_of(dicom: DicomFormat, path: Path) -> list[np.ndarray]:
    with dicom.read_back(path) as frames:
        return list(frames)


def assert_restores(dicom: DicomFormat, source: Path, protected: Path) -> None:
    """Check that every element of the source comes back, its transfer syntax, and its pixels."""
    item = dicom.inspect(source, PurePosixPath(source.name))
    restored = protected.with_name("restored.dcm")
    with dicom.open(item, protected.parent) as frames:
        clean = [frames[number].pixels for number in range(item.frames)]
    dicom.restore(protected, iter(clean), dicom.patch(item), restored)
    before, after = read_dataset(source), read_dataset(restored)
    assert before == after
    assert before.file_meta.TransferSyntaxUID == after.file_meta.TransferSyntaxUID
    if item.seals_original:
        assert restored.read_bytes() == source.read_bytes()
        return
    for meant, found in zip(clean, frames_of(dicom, restored), strict=True):
        assert np.array_equal(meant, found)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize(
    ("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.uint16, 16), (np.int16, 16), (np.int16, 13)]
)
def test_grey_is_read_back_exactly_and_restored(
    dicom: DicomFormat,
    make_dicom: MakeDicom,
    protect: Protect,
    rng: np.random.Generator,
    syntax: UID,
    dtype: Any,
    bits: int,
) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype is np.int16 else (0, 2**bits)
    pixels = rng.integers(low, high, (2, 40, 33)).astype(dtype)
    source = make_dicom(pixels, syntax=syntax, BitsStored=bits, Modality="MR")
    meant, target = protect(source)
    assert all(np.array_equal(a, b) for a, b in zip(meant, frames_of(dicom, target), strict=True))
    assert not np.array_equal(meant[0], pixels[0])
    assert_restores(dicom, source, target)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("shape", [(40, 33, 3), (3, 3, 3), (2, 40, 36, 3)])
def test_colour_is_read_back_exactly_and_restored(
    dicom: DicomFormat,
    make_dicom: MakeDicom,
    protect: Protect,
    rng: np.random.Generator,
    syntax: UID,
    shape: tuple[int, ...],
) -> None:
    if syntax in (uids.JPEG2000Lossless, uids.JPEGLSLossless) and shape == (3, 3, 3):
        shape = (32, 32, 3)  # the smallest frame that OpenJPEG takes
    pixels = rng.integers(0, 256, shape).astype(np.uint8)
    source = make_dicom(pixels, syntax=syntax, Modality="US")
    meant, target = protect(source)
    assert all(np.array_equal(a, b) for a, b in zip(meant, frames_of(dicom, target), strict=True))
    assert_restores(dicom, source, target)


@pytest.mark.parametrize("syntax", [uids.RLELossless, uids.JPEGLSLossless, uids.JPEG2000Lossless])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_even_white_noise_fits_every_encoder(
    dicom: DicomFormat,
    make_dicom: MakeDicom,
    protect: Protect,
    rng: np.random.Generator,
    syntax: UID,
    dtype: Any,
) -> None:
    limits = np.iinfo(dtype)
    pixels = rng.integers(limits.min, limits.max, (32, 32), endpoint=True).astype(dtype)
    meant, target = protect(make_dicom(pixels, syntax=syntax, Modality="MR"))
    assert np.array_equal(frames_of(dicom, target)[0], meant[0])


def test_colour_moves_in_luma(make_dicom: MakeDicom, protect: Protect, rng: np.random.Generator) -> None:
    pixels = rng.integers(50, 200, (20, 20, 3)).astype(np.uint8)
    meant, _ = protect(make_dicom(pixels))
    step = meant[0].astype(int) - pixels
    assert np.abs(step).max() == 8
    assert (step == step[:, :, :1]).all()


def test_planes_stay_planes(
    dicom: DicomFormat, make_dicom: MakeDicom, protect: Protect, rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 256, (9, 7, 3)).astype(np.uint8)
    source = make_dicom(np.moveaxis(pixels, 2, 0).reshape(9, 7, 3), PlanarConfiguration=1)
    meant, target = protect(source)
    assert pydicom.dcmread(target).PlanarConfiguration == 1
    assert np.array_equal(frames_of(dicom, target)[0], meant[0])
    assert_restores(dicom, source, target)


@pytest.mark.parametrize(
    ("syntax", "signed", "bits", "expected"),
    [
        (uids.JPEGLSLossless, True, 13, uids.JPEG2000Lossless),
        (uids.JPEGLSLossless, True, 16, uids.JPEGLSLossless),
        (uids.JPEGLSLossless, False, 12, uids.JPEGLSLossless),
        (uids.JPEG2000Lossless, True, 13, uids.JPEG2000Lossless),
        (uids.RLELossless, True, 13, uids.RLELossless),
        (uids.ImplicitVRLittleEndian, True, 13, uids.ImplicitVRLittleEndian),
    ],
)
def test_jpeg_ls_is_never_written_for_signed_data_with_unused_bits(
    make_dicom: MakeDicom, protect: Protect, syntax: UID, signed: bool, bits: int, expected: UID
) -> None:
    pixels = np.arange(40 * 40).reshape(40, 40).astype(np.int16 if signed else np.uint16)
    _, target = protect(make_dicom(pixels, syntax=syntax, BitsStored=bits))
    assert pydicom.dcmread(target).file_meta.TransferSyntaxUID == expected


def test_colour_jpeg_2000_says_ybr_rct(
    make_dicom: MakeDicom, protect: Protect, rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    _, target = protect(make_dicom(pixels, syntax=uids.JPEG2000Lossless))
    assert pydicom.dcmread(target).PhotometricInterpretation == "YBR_RCT"


def test_frames_too_small_for_the_encoders_are_written_uncompressed(
    dicom: DicomFormat, make_dicom: MakeDicom, protect: Protect
) -> None:
    pixels = np.arange(9, dtype=np.int16).reshape(3, 3) * 100
    source = make_dicom(pixels, syntax=uids.RLELossless, BitsStored=13, Modality="MR")
    meant, target = protect(source)
    assert pydicom.dcmread(target).file_meta.TransferSyntaxUID == uids.ExplicitVRLittleEndian
    assert np.array_equal(frames_of(dicom, target)[0], meant[0])


def test_signed_jpeg_ls_with_unused_bits_is_decoded_where_pydicoms_own_order_fails(
    make_dicom: MakeDicom,
) -> None:
    pixels = np.arange(-800, 800, dtype=np.int16).reshape(40, 40)
    dataset = read_dataset(make_dicom(pixels, syntax=uids.JPEGLSLossless, BitsStored=13))
    assert np.array_equal(decode_frame(dataset, read_layout(dataset), 0), pixels)


@pytest.fixture
def make_jpeg(make_dataset: Callable[..., Dataset], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that puts a JPEG stream made elsewhere into a DICOM file."""

    def write(pixels: np.ndarray, stream: bytes, syntax: UID, **settings: Any) -> Path:
        dataset = make_dataset(pixels, Modality="MR", **settings)
        dataset.PixelData = encapsulate([stream])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(tmp_path / "jpeg.dcm", dataset, enforce_file_format=True)
        return tmp_path / "jpeg.dcm"

    return write


@pytest.mark.parametrize("syntax", [uids.JPEGLossless, uids.JPEGLosslessSV1])
@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.int16, 13), (np.int16, 16)])
def test_jpeg_lossless_gets_its_sign_back_and_is_written_as_jpeg_2000(
    dicom: DicomFormat,
    make_jpeg: Callable[..., Path],
    protect: Protect,
    rng: np.random.Generator,
    syntax: UID,
    dtype: Any,
    bits: int,
) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype is np.int16 else (0, 2**bits)
    pixels = rng.integers(low, high, (40, 36)).astype(dtype)
    words = pixels.view(f"u{pixels.itemsize}") & np.array((1 << bits) - 1, f"u{pixels.itemsize}")
    source = make_jpeg(pixels, imagecodecs.ljpeg_encode(words, bitspersample=bits), syntax, BitsStored=bits)
    meant, target = protect(source, epsilon=0)
    assert np.array_equal(meant[0], pixels)
    assert np.array_equal(frames_of(dicom, target)[0], pixels)
    assert pydicom.dcmread(target).file_meta.TransferSyntaxUID == uids.JPEG2000Lossless
    assert_restores(dicom, source, target)


def test_twelve_bit_jpeg_is_decoded_without_the_gpl_plugin(
    dicom: DicomFormat, make_jpeg: Callable[..., Path], protect: Protect
) -> None:
    rows, columns = np.mgrid[0:48, 0:40]
    pixels = (columns * 40 + rows * 30).astype(np.uint16)
    stream = imagecodecs.jpeg_encode(pixels, level=95, bitspersample=12)
    source = make_jpeg(pixels, stream, uids.JPEGExtended12Bit, BitsStored=12, LossyImageCompression="01")
    meant, target = protect(source, epsilon=0)
    assert np.abs(meant[0].astype(int) - pixels).max() <= 1
    assert pydicom.dcmread(target).LossyImageCompression == "01"
    assert_restores(dicom, source, target)


def test_baseline_jpeg_becomes_lossless_colour(
    dicom: DicomFormat, make_jpeg: Callable[..., Path], protect: Protect, rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    stream = imagecodecs.jpeg_encode(pixels, level=95, outcolorspace="YCBCR", subsampling="422")
    source = make_jpeg(pixels, stream, uids.JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422")
    meant, target = protect(source)
    released = pydicom.dcmread(target)
    assert np.abs(meant[0].astype(int) - pixels).mean() < 12
    assert np.array_equal(frames_of(dicom, target)[0], meant[0])
    assert (released.PhotometricInterpretation, released.file_meta.TransferSyntaxUID) == (
        "YBR_RCT",
        uids.JPEG2000Lossless,
    )
    assert_restores(dicom, source, target)


def test_the_gpl_decoder_is_never_named() -> None:
    assert "libjpeg" not in {*dicom_pixels.DECODERS.values(), *dicom_pixels.ENCODERS.values()}
    assert "gdcm" not in {*dicom_pixels.DECODERS.values(), *dicom_pixels.ENCODERS.values()}
    handled = {*dicom_pixels.DECODERS, uids.JPEGLossless, uids.JPEGLosslessSV1}
    assert {syntax for syntax in READABLE if syntax.is_encapsulated} == handled


def test_overlays_in_unused_bits_survive(
    dicom: DicomFormat, make_dicom: MakeDicom, protect: Protect, rng: np.random.Generator
) -> None:
    values = rng.integers(0, 4096, (16, 16)).astype(np.uint16)
    overlay = (rng.integers(0, 2, (16, 16)) << 12).astype(np.uint16)
    source = make_dicom(values | overlay, BitsStored=12, Modality="MR")
    dataset = pydicom.dcmread(source)
    for element, vr, value in (
        (0x0010, "US", 16),
        (0x0011, "US", 16),
        (0x0102, "US", 12),
        (0x0100, "US", 16),
    ):
        dataset.add_new((0x6000, element), vr, value)
    dataset.save_as(source)
    meant, target = protect(source)
    words = np.frombuffer(pydicom.dcmread(target).PixelData, "<u2").reshape(16, 16)
    assert np.array_equal(words & 0xF000, overlay)
    assert np.array_equal(words & 0x0FFF, meant[0])
    assert_restores(dicom, source, target)


def test_big_endian_files_become_little_endian_with_the_same_values(
    dicom: DicomFormat, make_dataset: Callable[..., Dataset], protect: Protect, tmp_path: Path
) -> None:
    pixels = np.arange(12 * 10, dtype=np.uint16).reshape(12, 10) * 30
    dataset = make_dataset(pixels, BitsStored=12, Modality="MR", WindowCenter=1800, WindowWidth=3600)
    dataset.PixelData = pixels.astype(">u2").tobytes()
    dataset.add_new(0x60003000, "OW", np.arange(8, dtype=">u2").tobytes())
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRBigEndian
    source = tmp_path / "big.dcm"
    pydicom.dcmwrite(source, dataset, implicit_vr=False, little_endian=False, enforce_file_format=True)
    with dicom.open(dicom.inspect(source, PurePosixPath("a")), tmp_path) as frames:
        assert frames[0].pixels.dtype.isnative
        assert np.array_equal(frames[0].pixels, pixels)
    meant, target = protect(source)
    protected = pydicom.dcmread(target)
    assert protected.file_meta.TransferSyntaxUID == uids.ExplicitVRLittleEndian
    assert np.array_equal(np.frombuffer(protected.PixelData, "<u2").reshape(12, 10), meant[0])
    assert protected[0x60003000].value == np.arange(8, dtype="<u2").tobytes()
    assert np.abs(meant[0].astype(int) - pixels).max() == 112  # 8/255 of 3599, floored
    assert_restores(dicom, source, target)


def test_a_palette_becomes_the_colours_it_shows(
    dicom: DicomFormat, make_dicom: MakeDicom, protect: Protect
) -> None:
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    settings: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR", "Modality": "US"}
    shades = {"Red": np.arange(256), "Green": 255 - np.arange(256), "Blue": np.full(256, 100)}
    for colour, shade in shades.items():
        settings[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        settings[f"{colour}PaletteColorLookupTableData"] = (shade * 257).astype("<u2").tobytes()
    source = make_dicom(indices, **settings)
    meant, target = protect(source, epsilon=0)
    protected = pydicom.dcmread(target)
    assert np.array_equal(meant[0], np.stack(list(shades.values()), axis=1).reshape(16, 16, 3))
    assert (protected.PhotometricInterpretation, protected.SamplesPerPixel) == ("RGB", 3)
    assert not any("Palette" in element.keyword for element in protected)
    assert_restores(dicom, source, target)


def test_ybr_is_written_as_rgb_because_converting_back_would_cost_a_grey_level(
    dicom: DicomFormat, make_dicom: MakeDicom, protect: Protect, rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    source = make_dicom(pixels, PhotometricInterpretation="YBR_FULL")
    meant, target = protect(source)
    assert pydicom.dcmread(target).PhotometricInterpretation == "RGB"
    assert np.array_equal(frames_of(dicom, target)[0], meant[0])
    assert_restores(dicom, source, target)


def test_uncompressed_422_is_read_as_the_colours_it_shows(
    dicom: DicomFormat, make_dicom: MakeDicom, protect: Protect, rng: np.random.Generator
) -> None:
    luma = rng.integers(60, 180, (8, 8)).astype(np.uint8)
    pairs = np.stack([luma[:, 0::2], luma[:, 1::2], np.full((8, 4), 128), np.full((8, 4), 128)], axis=2)
    source = make_dicom(np.zeros((8, 8, 3), np.uint8), PhotometricInterpretation="YBR_FULL_422")
    dataset = pydicom.dcmread(source)
    dataset.PixelData = pairs.astype(np.uint8).tobytes()
    dataset.save_as(source)
    meant, target = protect(source, epsilon=0)
    assert np.array_equal(meant[0], np.repeat(luma[:, :, None], 3, axis=2))
    assert pydicom.dcmread(target).PhotometricInterpretation == "RGB"
    assert_restores(dicom, source, target)


def test_memory_is_bound_by_the_file_and_a_few_frames(
    dicom: DicomFormat, make_dicom: MakeDicom, rng: np.random.Generator, tmp_path: Path
) -> None:
    pixels = rng.integers(0, 16, (60, 2, 2, 3)).astype(np.uint8).repeat(80, 1).repeat(80, 2)
    source = make_dicom(pixels, syntax=uids.RLELossless)
    frame_bytes, everything = pixels[0].nbytes, pixels.nbytes
    del pixels
    item = dicom.inspect(source, PurePosixPath("a"))
    tracemalloc.start()
    try:
        with dicom.open(item, tmp_path) as frames:
            copies = (frames[number].pixels for number in range(item.frames))
            dicom.write(item, range(item.frames), copies, tmp_path / "out.dcm")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * item.size_bytes + 12 * frame_bytes
    assert peak < everything / 3


def test_padding_stays_where_it_was_declared_or_not(
    make_dicom: MakeDicom, protect: Protect, ct_slice: np.ndarray
) -> None:
    for settings in ({}, {"PixelPaddingValue": -2000}):
        meant, _ = protect(make_dicom(ct_slice, WindowCenter=40, WindowWidth=400, **settings))
        assert np.array_equal(meant[0] == -2000, ct_slice == -2000)
        assert np.abs(meant[0].astype(int) - ct_slice).max() == 12


@pytest.mark.parametrize(("slope", "width", "epsilon"), [(25, 100, 8), (1, 128, 2), (1, 80, 2)])
def test_where_one_step_exceeds_the_budget_nothing_changes_and_the_window_says_so(
    dicom: DicomFormat,
    make_dicom: MakeDicom,
    ct_slice: np.ndarray,
    tmp_path: Path,
    slope: float,
    width: float,
    epsilon: float,
) -> None:
    source = make_dicom(ct_slice, WindowCenter=40, WindowWidth=width, RescaleSlope=slope, RescaleIntercept=0)
    with dicom.open(dicom.inspect(source, PurePosixPath("a")), tmp_path) as frames:
        image = frames[0]
        low, high = image.window.bounds(image.pixels, epsilon)
    assert np.array_equal(low, image.pixels)
    assert np.array_equal(high, image.pixels)


def test_the_same_source_gives_the_same_bytes(
    make_dicom: MakeDicom, protect: Protect, ct_slice: np.ndarray
) -> None:
    source = make_dicom(ct_slice)
    once = protect(source)[1].read_bytes()
    assert protect(source)[1].read_bytes() == once


def test_the_source_is_not_touched(make_dicom: MakeDicom, protect: Protect, ct_slice: np.ndarray) -> None:
    source = make_dicom(ct_slice, syntax=uids.JPEG2000Lossless)
    before = source.read_bytes()
    protect(source)
    assert source.read_bytes() == before


def test_a_file_without_preamble_is_read(
    dicom: DicomFormat, make_dicom: MakeDicom, protect: Protect, ct_slice: np.ndarray
) -> None:
    source = make_dicom(ct_slice)
    source.write_bytes(source.read_bytes()[132:])
    meant, target = protect(source)
    assert np.array_equal(frames_of(dicom, target)[0], meant[0])


def test_frames_are_read_singly_and_in_any_order(
    dicom: DicomFormat, make_dicom: MakeDicom, tmp_path: Path
) -> None:
    pixels = np.arange(5 * 32 * 32, dtype=np.uint16).reshape(5, 32, 32)
    source = make_dicom(pixels, syntax=uids.JPEG2000Lossless)
    with dicom.open(dicom.inspect(source, PurePosixPath("a")), tmp_path) as frames:
        for number in (4, 0, 2):
            assert np.array_equal(frames[number].pixels, pixels[number])
        with pytest.raises(IndexError):
            frames[5]


def test_lossy_sources_seal_the_original_and_stay_marked_as_lossy(
    dicom: DicomFormat, shared_data: Path, protect: Protect
) -> None:
    source = shared_data / "dicom_pydicom_data" / "MR2_J2KI.dcm"
    item = dicom.inspect(source, PurePosixPath(source.name))
    assert item.seals_original
    assert dicom.patch(item) == source.read_bytes()
    _, target = protect(source)
    with quiet():
        protected = pydicom.dcmread(target)
        assert protected.file_meta.TransferSyntaxUID == uids.JPEG2000Lossless
        assert protected.LossyImageCompression == "01"


def test_two_files_that_claim_to_be_one_object_are_both_left_out(
    dicom: DicomFormat, make_dicom: MakeDicom, ct_slice: np.ndarray, tmp_path: Path
) -> None:
    for name in ("a.dcm", "b.dcm"):
        make_dicom(ct_slice, name=name)
    make_dicom(ct_slice, name="c.dcm", SOPInstanceUID="1.2.3.4.5.7")
    listing = scan(tmp_path, (dicom,))
    assert [str(item.relative) for item in listing.items] == ["c.dcm"]
    assert [(str(q.relative), q.code) for q in listing.quarantined] == [
        ("a.dcm", "duplicate-instance"),
        ("b.dcm", "duplicate-instance"),
    ]
