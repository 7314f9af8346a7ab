"""What an object is, and when two copies of it hold the same content.

A PACS may store an object in another lossless transfer syntax and may correct attributes of the patient. So
copies are compared by what medveil promises: the object's identity and its stored pixel values. Objects
without pictures (SEG, RTSTRUCT, SR, PR, KO) are compared element by element.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydicom.dataset import FileDataset

from medveil.agent.imageio.dicom_header import (
    damage_named,
    is_companion,
    read_dataset,
    read_layout,
)
from medveil.agent.imageio.dicom_pixels import decode_frame
from medveil.agent.imageio.image import pixel_digest
from medveil.agent.imageio.pacs.inbox import uid_of, valid_uid
from medveil.models.disk import file_sha256
from medveil.models.errors import ImageError

__all__ = ["Outgoing", "content_digest", "describe"]

IDENTITY: Final = ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One object on its way to the PACS.

    Attributes:
        path: the file.
        sop_class: SOP Class UID.
        study: Study Instance UID.
        series: Series Instance UID.
        instance: SOP Instance UID.
        syntax: transfer syntax of the file; it is sent as it is.
        sha256: digest of the file, hex.
    """

    path: Path
    sop_class: str
    study: str
    series: str
    instance: str
    syntax: str
    sha256: str


def describe(path: Path) -> Outgoing:
    """Return what a file is.

    Raises:
        ImageError: it is damaged, or lacks an identifier.
    """
    dataset = read_dataset(path)
    with damage_named():
        sop_class, study, series, instance = (uid_of(dataset, keyword) for keyword in IDENTITY)
        syntax = valid_uid(str(dataset.file_meta.TransferSyntaxUID))
    return Outgoing(path, sop_class, study, series, instance, syntax, file_sha256(path))


def content_digest(path: Path) -> str:
    """Return the SHA-256 (hex) over identity and content; equal for copies that differ in coding only.

    Raises:
        ImageError: the file cannot be read or decoded.
    """
    dataset = read_dataset(path)
    digest = hashlib.sha256()
    with damage_named():
        for keyword in IDENTITY:
            digest.update(f"{keyword}={dataset.get(keyword)}\n".encode())
        if is_companion(dataset):
            digest.update(_elements(dataset))
            return digest.hexdigest()
        layout = read_layout(dataset)
        for frame in range(layout.frames):
            digest.update(pixel_digest(decode_frame(dataset, layout, frame)))
    return digest.hexdigest()


def _elements(dataset: FileDataset) -> bytes:
    """Return every element in a form that does not depend on the transfer syntax.

    Raises:
        ImageError: ``big-endian``: its binary values cannot be compared.
    """
    if not dataset.original_encoding[1]:
        raise ImageError("big-endian", "An object in big endian byte order cannot be compared; convert it.")
    # Group lengths (gggg,0000) are retired and dropped by every modern archive.
    elements = {tag: value for tag, value in dataset.to_json_dict().items() if not str(tag).endswith("0000")}
    return json.dumps(elements, sort_keys=True).encode()
