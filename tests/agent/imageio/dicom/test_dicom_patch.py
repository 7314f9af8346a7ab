from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from medveil.agent.imageio.dicom import DicomFormat
from medveil.agent.imageio.dicom_header import read_dataset
from medveil.agent.imageio.dicom_patch import apply_patch, attribute_patch
from medveil.models.errors import SignatureError

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)


def test_a_patch_is_small_and_holds_only_what_changed(
    dicom: DicomFormat, make_dicom: Callable[..., Path]
) -> None:
    path = make_dicom(PIXELS, ImageComments="x" * 5000)
    patch = dicom.patch(dicom.inspect(path, PurePosixPath("a")))
    assert len(patch) < 1000
    assert b"xxxx" not in patch


def test_the_patch_is_the_same_every_time(dicom: DicomFormat, make_dicom: Callable[..., Path]) -> None:
    item = dicom.inspect(make_dicom(PIXELS), PurePosixPath("a"))
    assert dicom.patch(item) == dicom.patch(item)


def test_equal_objects_need_an_empty_patch(make_dicom: Callable[..., Path]) -> None:
    source = read_dataset(make_dicom(PIXELS))
    restored = apply_patch(source, attribute_patch(source, source))
    del source.PixelData
    assert restored == source


@pytest.mark.parametrize("patch", [b"", b"MVDICOM1", b"MVDICOM1\0\0\0\x05{}", b"other" * 20])
def test_what_is_no_patch_is_refused_by_name(make_dicom: Callable[..., Path], patch: bytes) -> None:
    with pytest.raises(SignatureError, match="bad-patch"):
        apply_patch(read_dataset(make_dicom(PIXELS)), patch)
