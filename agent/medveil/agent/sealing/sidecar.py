"""Sidecars: what a protected file needs to become the original again, sealed with the site's key.

Layout: magic, length of the header, header (JSON, readable), then the payload in sealed blocks.

* header: the two digests and the settings digest that the payload belongs to, and the data key wrapped
by age for
  the site's recipients. The header is authenticated: it is part of every block's associated data.
* payload: one zstd stream of [length of the patch, patch, the change of every frame], cut into
blocks; each is
  AES-256-GCM under the data key, with its number as nonce and a mark on the last, so that blocks cannot be
  dropped, swapped or taken from another sidecar.

The data key is drawn anew for every sidecar, so a nonce never meets the same key twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import numpy.typing as npt
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medveil.agent.sealing.identity import SiteKey, unwrap, wrap
from medveil.models.disk import disk_errors, part_beside, publish
from medveil.models.errors import RefusedError

__all__ = [
    "Binding",
    "SidecarReader",
    "clean_digest",
    "difference",
    "frame_change",
    "open_sidecar",
    "undo",
    "write_sidecar",
]

_Stored = npt.NDArray[Any]

_MAGIC: Final = b"medveil sidecar 1\n"
_BLOCK_BYTES: Final = 2**20
_TAG_BYTES: Final = 16
_MAX_HEADER_BYTES: Final = 2**20
_FRAME_HEAD: Final = struct.Struct(">?3s3I")  # released, dtype, rows, columns, channels (0: grey)
_ZSTD_LEVEL: Final = 9  # sparse differences shrink little further at 19, at a tenth of the speed


@dataclass(frozen=True, slots=True)
class Binding:
    """What a sidecar belongs to; opening it for anything else fails.

    Attributes:
        protected_sha256: of the released file's bytes, hex.
        clean_sha256: what the restored original must give (`clean_digest`), hex.
        settings_digest: bundle, budget and policy of the job, hex.
        whole_file: the patch is the original file, and ``clean_sha256`` that file's own SHA-256.
    """

    protected_sha256: str
    clean_sha256: str
    settings_digest: str
    whole_file: bool


def clean_digest(frame_digests: Iterable[bytes]) -> str:
    """Return one digest over the digests of a file's frames, hex."""
    return hashlib.sha256(b"medveil file 1|" + b"".join(frame_digests)).hexdigest()


def difference(clean: _Stored, protected: _Stored | None) -> bytes:
    """Return ``clean - protected`` as wrapped integers of the stored width, exact for every dtype.

    Floats are taken by their bit patterns. Without a protected array (a frame that was left out) the
    difference is the clean array itself.
    """
    unsigned = np.dtype(f"<u{clean.dtype.itemsize}")
    bits = _bits(clean)
    return (bits if protected is None else np.subtract(bits, _bits(protected), dtype=unsigned)).tobytes()


def undo(protected: _Stored | None, change: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Stored:
    """Return the clean array, of this shape and dtype: ``protected`` plus a difference.

    Raises:
        ValueError: the three do not fit together.
    """
    unsigned = np.dtype(f"<u{dtype.itemsize}")
    bits = np.frombuffer(change, unsigned).reshape(shape)
    if protected is not None:
        if protected.shape != shape or protected.dtype != dtype:
            raise ValueError("the protected frame is of another shape or type")
        bits = np.add(bits, _bits(protected), dtype=unsigned)
    clean: _Stored = bits.view(dtype.newbyteorder("<")).astype(dtype)
    return clean


def frame_change(clean: _Stored, protected: _Stored | None) -> bytes:
    """Return one frame's record in a sidecar: released or left out, dtype, shape, difference."""
    lengths = (*clean.shape, 0)[:3]
    dtype = clean.dtype.newbyteorder("<").str.encode("ascii")
    return _FRAME_HEAD.pack(protected is not None, dtype, *lengths) + difference(clean, protected)


def _bits(array: _Stored) -> _Stored:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.view(np.dtype(f"<u{array.dtype.itemsize}"))


def write_sidecar(
    target: Path, binding: Binding, patch: bytes, changes: Iterable[bytes], recipients: Sequence[str]
) -> None:
    """Seal a file's differences and patch; temporary name, sync, rename.

    Args:
        target: the sidecar's path; its folder is private to the site.
        binding: what it belongs to.
        patch: the format's own bytes.
        changes: `frame_change` of every frame, in order; none where the patch holds the whole original.
        recipients: age public keys, the site's own first.

    Raises:
        StorageError: the disk takes no more.
        ConfigurationError: a recipient is no age public key.
    """
    data_key = AESGCM.generate_key(256)
    wrapped = b64encode(wrap(data_key, recipients)).decode("ascii")
    header = json.dumps({**asdict(binding), "wrapped_key": wrapped}, sort_keys=True).encode()
    part = part_beside(target)
    with disk_errors():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + struct.pack(">I", len(header)) + header)
            sealed = _SealedWriter(file, data_key, header)
            raw = cast("IO[bytes]", sealed)
            with zstandard.ZstdCompressor(_ZSTD_LEVEL).stream_writer(raw, closefd=False) as stream:
                stream.write(struct.pack(">Q", len(patch)))
                stream.write(patch)
                for change in changes:
                    stream.write(change)
            sealed.finish()
            file.flush()
            os.fsync(file.fileno())
        publish(part, target)


def _nonce(number: int, *, last: bool) -> bytes:
    return struct.pack(">7xI?", number, last)


class _SealedWriter(io.RawIOBase):
    """Cuts a stream into blocks and seals each; the last one is marked, so that a cut is noticed."""

    def __init__(self, file: IO[bytes], data_key: bytes, header: bytes) -> None:
        self._file = file
        self._cipher = AESGCM(data_key)
        self._header = header
        self._pending = bytearray()
        self._number = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type] # any bytes-like object, as every raw writer takes
        self._pending += view
        while len(self._pending) > _BLOCK_BYTES:
            self._seal(bytes(self._pending[:_BLOCK_BYTES]), last=False)
            del self._pending[:_BLOCK_BYTES]
        return view.nbytes

    def finish(self) -> None:
        """Seal what is left."""
        self._seal(bytes(self._pending), last=True)

    def _seal(self, block: bytes, *, last: bool) -> None:
        self._file.write(self._cipher.encrypt(_nonce(self._number, last=last), block, self._header))
        self._number += 1


class _SealedReader(io.RawIOBase):
    """The inverse of `_SealedWriter`; refuses the first block that is not what was sealed."""

    def __init__(self, file: IO[bytes], data_key: bytes, header: bytes) -> None:
        self._file = file
        self._cipher = AESGCM(data_key)
        self._header = header
        self._number = 0
        self._next = file.read(_BLOCK_BYTES + _TAG_BYTES)
        self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type] # any writable buffer, as every raw reader takes
        if not self._plain and self._next:
            self._plain = self._open()
        count = min(len(view), len(self._plain))
        view[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _open(self) -> bytes:
        block, self._next = self._next, self._file.read(_BLOCK_BYTES + _TAG_BYTES)
        try:
            plain = self._cipher.decrypt(_nonce(self._number, last=not self._next), block, self._header)
        except (InvalidTag, ValueError) as exc:
            raise _wrong_sidecar() from exc
        self._number += 1
        return plain


@dataclass(frozen=True, slots=True)
class SidecarReader:
    """An open sidecar: its patch, and the changes frame by frame."""

    binding: Binding
    patch: bytes
    stream: IO[bytes]

    def clean_frames(self, protected: Iterator[_Stored]) -> Iterator[_Stored]:
        """Yield the original frames of a file, in order, those that were left out included.

        Args:
            protected: the released frames, in order.

        Raises:
            RefusedError: ``wrong-sidecar``: its frames are not those of the file.
        """
        while head := self.stream.read(_FRAME_HEAD.size):
            try:
                released, dtype_name, *lengths = _FRAME_HEAD.unpack(head)
                dtype = np.dtype(dtype_name.decode("ascii"))
                shape = tuple(length for length in lengths if length)
                change = self.stream.read(math.prod(shape) * dtype.itemsize)
                yield undo(next(protected) if released else None, change, shape, dtype)
            except (struct.error, StopIteration, ValueError, TypeError) as exc:
                raise _wrong_sidecar() from exc


@contextmanager
def open_sidecar(path: Path, key: SiteKey, *, protected_sha256: str) -> Iterator[SidecarReader]:
    """Open a sidecar for the protected file that has this digest.

    Raises:
        RefusedError: ``no-sidecar``; ``wrong-key``; ``wrong-sidecar``: damaged, or sealed for another
            file.
    """
    try:
        file = path.open("rb")
    except OSError as exc:
        raise RefusedError(
            "no-sidecar", "There is no sealed sidecar for this file in the private folder."
        ) from exc
    with file:
        header = _read_header(file)
        try:
            fields = json.loads(header)
            wrapped = b64decode(fields.pop("wrapped_key"))
            binding = Binding(**fields)
        except (ValueError, KeyError, TypeError) as exc:
            raise _wrong_sidecar() from exc
        data_key = unwrap(wrapped, key)
        if binding.protected_sha256 != protected_sha256:
            raise _wrong_sidecar()
        sealed = io.BufferedReader(_SealedReader(file, data_key, header))
        stream = zstandard.ZstdDecompressor().stream_reader(sealed, closefd=False)
        buffered = io.BufferedReader(stream)
        try:
            length = struct.unpack(">Q", buffered.read(8))[0]
            patch = buffered.read(length)
            yield SidecarReader(binding, patch, buffered)
        except (zstandard.ZstdError, struct.error) as exc:
            raise _wrong_sidecar() from exc


def _read_header(file: IO[bytes]) -> bytes:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise _wrong_sidecar()
    length = int.from_bytes(file.read(4), "big")
    if length > _MAX_HEADER_BYTES:
        raise _wrong_sidecar()
    return file.read(length)


def _wrong_sidecar() -> RefusedError:
    return RefusedError("wrong-sidecar", "This sidecar is damaged or was swapped; restore refuses.")
