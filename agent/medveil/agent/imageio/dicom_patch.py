"""What restoring a DICOM object needs beside its pixels: every attribute that the derivation changed.

The patch lists the tags that the derivation added and holds, as a small data set of its own, the original
form of each element that it changed or removed. Pixel data are not part of it; they come back from the stored
values.

Layout: magic, length of the list (4 bytes, big endian), the list as JSON, file meta group, changed
elements.
"""

from __future__ import annotations

import json
from copy import deepcopy
from io import BytesIO
from typing import Any, Final

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from medveil.agent.imageio.derived import PIXEL_DATA
from medveil.agent.imageio.dicom_header import quiet
from medveil.models.errors import SignatureError

__all__ = ["apply_patch", "attribute_patch"]

MAGIC: Final = b"MVDICOM1"
LENGTH_BYTES: Final = 4


def attribute_patch(original: FileDataset, derived: Dataset) -> bytes:
    """Return what turns the attributes of ``derived`` back into those of ``original``.

    Args:
        original: the source object, little endian.
        derived: the protected object; its pixel data are ignored.
    """
    implicit, little = original.original_encoding
    changed = Dataset()
    for element in original:
        if element.tag != PIXEL_DATA and (element.tag not in derived or derived[element.tag] != element):
            changed[element.tag] = original.get_item(element.tag)
    changed.set_original_encoding(implicit, little, original.original_character_set)
    added = [int(tag) for tag in list(derived.keys()) if tag not in original and tag != PIXEL_DATA]
    parts = [_encode(original.file_meta, implicit=False), _encode(changed, implicit=bool(implicit))]
    head = {"added": added, "implicit": bool(implicit), "meta_bytes": len(parts[0])}
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join([MAGIC, len(text).to_bytes(LENGTH_BYTES, "big"), text, *parts])


def apply_patch(derived: Dataset, patch: bytes) -> Dataset:
    """Return the original object, with its own file meta and without pixel data.

    Args:
        derived: the protected object as read from its file.
        patch: what ``attribute_patch`` returned.

    Raises:
        SignatureError: ``bad-patch`` where the bytes are not a patch.
    """
    try:
        head, meta, changed = _parse(patch)
    except (ValueError, KeyError, EOFError) as exc:
        raise SignatureError(
            "bad-patch", "The sealed attributes of this file are damaged.", private=repr(exc)
        ) from exc
    restored = Dataset()
    for tag in list(derived.keys()):
        if tag != PIXEL_DATA and int(tag) not in head["added"]:
            restored[tag] = deepcopy(derived.get_item(tag))
    for raw in changed.elements():
        restored[raw.tag] = raw
    restored.set_original_encoding(head["implicit"], True, changed.original_character_set)
    restored.file_meta = FileMetaDataset(meta)
    return restored


def _parse(patch: bytes) -> tuple[dict[str, Any], Dataset, Dataset]:
    if not patch.startswith(MAGIC):
        raise ValueError("wrong magic")
    start = len(MAGIC) + LENGTH_BYTES
    end = start + int.from_bytes(patch[len(MAGIC) : start], "big")
    head = json.loads(patch[start:end])
    rest = patch[end:]
    meta = read_dataset(BytesIO(rest[: head["meta_bytes"]]), is_implicit_VR=False, is_little_endian=True)
    changed = read_dataset(
        BytesIO(rest[head["meta_bytes"] :]), is_implicit_VR=head["implicit"], is_little_endian=True
    )
    return head, meta, changed


def _encode(dataset: Dataset, *, implicit: bool) -> bytes:
    with quiet(), DicomBytesIO() as stream:
        stream.is_little_endian, stream.is_implicit_VR = True, implicit
        write_dataset(stream, dataset)
        return stream.getvalue()
