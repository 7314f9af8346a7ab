"""The bundles that a coordinator offers: copies of its own, by SHA-256, read in parts."""

from __future__ import annotations

import hashlib
from pathlib import Path

from medveil.models.disk import replace_file
from medveil.models.errors import StorageError
from medveil.protos.fleet import PART_BYTES

__all__ = ["keep_bundle", "read_part"]


def keep_bundle(folder: Path, source: Path) -> bytes:
    """Copy a bundle to where campaigns find it, whatever becomes of the file that was named.

    Returns:
        Its SHA-256, of the bytes that were copied.

    Raises:
        StorageError: ``bundle-copy``.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = source.read_bytes()
        digest = hashlib.sha256(content).digest()
        replace_file(_path(folder, digest), content)
    except OSError as exc:
        raise StorageError(
            "bundle-copy",
            "The bundle cannot be copied to the coordinator's folder; make room.",
            private=str(exc),
        ) from exc
    return digest


def read_part(folder: Path, sha256: bytes, offset: int) -> bytes:
    """Return what one message carries of a bundle, from an offset on.

    Raises:
        StorageError: ``bundle-missing``.
    """
    try:
        with _path(folder, sha256).open("rb") as file:
            file.seek(offset)
            return file.read(PART_BYTES)
    except OSError as exc:
        raise StorageError(
            "bundle-missing", "The offered bundle cannot be read; create the campaign anew.", private=str(exc)
        ) from exc


def _path(folder: Path, sha256: bytes) -> Path:
    return folder / f"{sha256.hex()}.medveil"
