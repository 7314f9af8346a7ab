"""The bundle file: a plain ZIP whose archive comment is the signature.

    [ zip: manifest.json, MODEL_CARD.md, graphs/*.onnx, golden/*.npy, all stored ][ signature block ]
      `------------------------- every byte up to the block is signed -----------'

Any unzip tool opens it. medveil checks the signature over the raw bytes first and looks into the archive only
then; the bytes are read once, so what was checked is what is used. The signature block has one possible
spelling, so there is no byte in the file that could be changed without being noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from medveil.models.autodiff.selfcheck import GoldenVector
from medveil.models.bundle.card import model_card
from medveil.models.bundle.golden_answers import GoldenAnswers
from medveil.models.bundle.keys import Fingerprint, fingerprint
from medveil.models.bundle.manifest import (
    SCHEMA_VERSION,
    GoldenAnswersEntry,
    GoldenEntry,
    GraphEntry,
    Manifest,
    ManifestDraft,
)
from medveil.models.disk import replace_file
from medveil.models.errors import InputError, SelfTestError, SignatureError, StorageError
from medveil.models.methods.oracle import FloatArray

__all__ = ["MAX_BUNDLE_BYTES", "Bundle", "open_bundle", "write_bundle"]

MAX_BUNDLE_BYTES = 1 << 30
"""Largest bundle that is opened: an ensemble of ViT-B in float32 is about this size (our choice)."""

_MANIFEST = "manifest.json"
_CARD = "MODEL_CARD.md"
_ARRAYS = ("images", "targets", "losses", "gradients")
_ANSWER_ARRAYS = ("images", "answers")

# The block's first words carry the format's version: a later format gets other words and its own reader.
_MARK = b"medveil-bundle-1 ed25519 "
_BLOCK = re.compile(re.escape(_MARK) + rb"([0-9a-f]{64}) ([0-9a-f]{128})\n")
_BLOCK_BYTES = len(_MARK) + 64 + 1 + 128 + 1
_ZIP_START = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22
# ZIP stores no earlier time; every member has it, so that equal content gives equal bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
_MODE = 0o100644 << 16


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: its signature is intact and every part is what the manifest says.

    Attributes:
        manifest: the signed statement.
        signer: fingerprint of the key that signed; show it when no trusted signer was named.
        digest: SHA-256 of the whole file, hexadecimal.
        card: the model card, Markdown.
    """

    manifest: Manifest
    signer: Fingerprint
    digest: str
    card: str
    _members: Mapping[str, bytes]

    def graph(self, name: str) -> bytes:
        """Return the ONNX bytes of one graph. They are still foreign: admit them before anything else.

        Raises:
            KeyError: no graph has this name.
        """
        return self._members[_graph_member(self.manifest.entry(name).name)]

    def golden(self, name: str) -> GoldenVector | None:
        """Return what the graph's trainer computed for a few images; None if the bundle holds none for it.

        Raises:
            KeyError: no graph has this name.
            SignatureError: "golden": the signer packed arrays that prove nothing.
        """
        entry = self.manifest.entry(name)
        if entry.golden is None:
            return None
        arrays = {part: _array(self._members[_golden_member(name, part)], name) for part in _ARRAYS}
        try:
            return GoldenVector(**arrays, rtol=entry.golden.rtol)
        except SelfTestError as exc:
            raise _bad_golden(name) from exc

    def golden_answers(self, name: str) -> GoldenAnswers | None:
        """Return what a generator's trainer computed for a few images; None if the bundle holds none for it.

        Raises:
            KeyError, SignatureError: as `golden`.
        """
        entry = self.manifest.entry(name)
        if entry.answers is None:
            return None
        arrays = {part: _array(self._members[_golden_member(name, part)], name) for part in _ANSWER_ARRAYS}
        try:
            return GoldenAnswers(**arrays, rtol=entry.answers.rtol)
        except SelfTestError as exc:
            raise _bad_golden(name) from exc


def write_bundle(
    path: Path,
    draft: ManifestDraft,
    graphs: Mapping[str, bytes],
    golden: Mapping[str, GoldenVector | GoldenAnswers],
    signing_key: Ed25519PrivateKey,
) -> Manifest:
    """Pack, sign and write a bundle; the file appears under its name only when it is complete.

    Args:
        path: the file to write; an existing one is replaced at the end.
        draft: everything but digests and sizes.
        graphs: ONNX bytes of every graph in the draft.
        golden: at most one per graph: a surrogate's vector, or a generator's answers.
        signing_key: the coordinator's key.

    Returns:
        The manifest as it was signed.

    Raises:
        ValueError: the names in `draft`, `graphs` and `golden` do not fit together, or it all is too large.
        StorageError: "bundle-write": the disk refused.
    """
    names = [graph.name for graph in draft.graphs]
    if set(graphs) != set(names) or not set(golden) <= set(names):
        raise ValueError("graphs and golden vectors must be those of the draft")
    members: dict[str, bytes] = {}
    entries = []
    for statement in draft.graphs:
        data = graphs[statement.name]
        members[_graph_member(statement.name)] = data
        proof = golden.get(statement.name)
        arrays = {} if proof is None else {part: _npy(getattr(proof, part)) for part in _parts(proof)}
        members |= {_golden_member(statement.name, part): npy for part, npy in arrays.items()}
        digests = {f"{part}_sha256": _sha256(npy) for part, npy in arrays.items()}
        entries.append(
            GraphEntry(
                **dict(statement),
                sha256=_sha256(data),
                size_bytes=len(data),
                golden=GoldenEntry(rtol=proof.rtol, **digests) if isinstance(proof, GoldenVector) else None,
                answers=GoldenAnswersEntry(rtol=proof.rtol, **digests)
                if isinstance(proof, GoldenAnswers)
                else None,
            )
        )
    manifest = Manifest(**dict(draft) | {"graphs": tuple(entries)})
    head = {
        _MANIFEST: manifest.model_dump_json(indent=2).encode() + b"\n",
        _CARD: model_card(manifest).encode(),
    }
    body = _zip(head | dict(sorted(members.items())))
    if len(body) + _BLOCK_BYTES > MAX_BUNDLE_BYTES:
        raise ValueError("the bundle is larger than any site would open")
    _write(path, body + _signature_block(body, signing_key))
    return manifest


def open_bundle(path: Path, *, trusted: Collection[Fingerprint] | None) -> Bundle:
    """Read a bundle, check its signature over the raw bytes, then check and unpack every part.

    Args:
        path: the file.
        trusted: fingerprints of the signers to accept. None accepts any signer of an intact bundle; the
            caller must then show the fingerprint to somebody who can compare it.

    Raises:
        InputError: "bundle-missing": there is no such file, or it cannot be read.
        SignatureError: "not-a-bundle", "too-large", "truncated", "trailing-data", "digest" (a named part was
            changed), "signature" (something was changed), "unknown-signer", "schema" (made by a newer
            medveil), "manifest" or "contents" (signed, but not a bundle of this format).
    """
    data = _read_capped(path)
    signer = _check_signature(data)
    if trusted is not None and signer not in trusted:
        raise SignatureError(
            "unknown-signer",
            f"The bundle is intact, but {signer} is not among the signers you trust. "
            "Compare the fingerprint with your coordinator before you add it.",
        )
    members = _unpack(data)
    manifest = _read_manifest(members)
    _check_members(members, manifest)
    return Bundle(
        manifest=manifest,
        signer=signer,
        digest=_sha256(data),
        card=members[_CARD].decode("utf-8", errors="replace"),
        _members=members,
    )


# --- the signature ------------------------------------------------------------------------------------------


def _signed_message(body: bytes) -> bytes:
    """Return what the key signs: bound to this format, so that no signature made for another use fits."""
    return _MARK + hashlib.sha512(body).digest()


def _signature_block(body: bytes, key: Ed25519PrivateKey) -> bytes:
    signature = key.sign(_signed_message(body))
    return (
        _MARK + key.public_key().public_bytes_raw().hex().encode() + b" " + signature.hex().encode() + b"\n"
    )


def _check_signature(data: bytes) -> Fingerprint:
    """Return the signer of an intact file; say what is wrong with any other.

    Raises:
        SignatureError: "not-a-bundle", "truncated", "trailing-data", "digest", "signature".
    """
    block = _BLOCK.fullmatch(data[-_BLOCK_BYTES:])
    if block is None:
        raise _misshapen(data)
    public_key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(block[1].decode()))
    body = data[:-_BLOCK_BYTES]
    try:
        public_key.verify(bytes.fromhex(block[2].decode()), _signed_message(body))
    except InvalidSignature as exc:
        raise _altered(data) from exc
    return fingerprint(public_key)


def _misshapen(data: bytes) -> SignatureError:
    """Name what is wrong with a file that does not end in a signature block."""
    if not data.startswith(_ZIP_START):
        return SignatureError("not-a-bundle", "The file is not a medveil bundle.")
    mark = data.rfind(_MARK)
    if mark >= 0 and len(data) - mark > _BLOCK_BYTES:
        return SignatureError(
            "trailing-data", "Something was appended to the bundle; fetch it again from your coordinator."
        )
    if data[-_BLOCK_BYTES - _ZIP_END_BYTES :].startswith(_ZIP_END):
        return SignatureError(
            "signature", "The bundle's signature was changed; fetch it again from your coordinator."
        )
    return SignatureError(
        "truncated", "The bundle ends too early or was never signed; fetch it again from your coordinator."
    )


def _altered(data: bytes) -> SignatureError:
    """Name the changed part where the archive's own checksums tell; the file is refused in any case."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
            part = archive.testzip() if stored else None
    except Exception:  # zipfile raises many kinds on hostile bytes; no diagnosis is a fine answer here
        part = None
    if part is not None and part.isprintable():
        return SignatureError(
            "digest", f"The part {part!r} of the bundle was changed; fetch it again from your coordinator."
        )
    return SignatureError(
        "signature", "The bundle was changed after it was signed; fetch it again from your coordinator."
    )


# --- the parts ----------------------------------------------------------------------------------------------


def _read_capped(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as exc:
        raise InputError(
            "bundle-missing", "The bundle cannot be read; check its path.", private=str(exc)
        ) from exc
    if len(data) > MAX_BUNDLE_BYTES:
        raise SignatureError("too-large", f"A bundle is at most {MAX_BUNDLE_BYTES >> 20} MiB large.")
    return data


def _unpack(data: bytes) -> dict[str, bytes]:
    """Return the members of a signed archive; stored and named once each, as `write_bundle` makes them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            plain = all(i.compress_type == zipfile.ZIP_STORED and not i.flag_bits & 1 for i in infos)
            if not plain or len({i.filename for i in infos}) < len(infos):
                raise _foreign_contents()
            return {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as exc:
        raise _foreign_contents() from exc


def _foreign_contents() -> SignatureError:
    return SignatureError("contents", "The bundle is signed, but its parts are not those of this format.")


def _read_manifest(members: Mapping[str, bytes]) -> Manifest:
    text = members.get(_MANIFEST)
    if text is None or _CARD not in members:
        raise _foreign_contents()
    try:
        version = json.loads(text)["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise SignatureError(
                "schema", "The bundle was made by a newer medveil; update this installation."
            )
        return Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError) as exc:  # ValidationError and JSONDecodeError are ValueErrors
        detail = str(exc) if isinstance(exc, ValidationError) else ""
        raise SignatureError(
            "manifest", "The bundle is signed, but its manifest is not valid.", private=detail
        ) from exc


def _check_members(members: Mapping[str, bytes], manifest: Manifest) -> None:
    """Hold the parts against the manifest: all of them, nothing else, byte for byte."""
    expected: dict[str, str] = {}
    for graph in manifest.graphs:
        expected[_graph_member(graph.name)] = graph.sha256
        if graph.golden is not None:
            expected |= {
                _golden_member(graph.name, part): getattr(graph.golden, f"{part}_sha256") for part in _ARRAYS
            }
        if graph.answers is not None:
            expected |= {
                _golden_member(graph.name, part): getattr(graph.answers, f"{part}_sha256")
                for part in _ANSWER_ARRAYS
            }
    if set(members) != set(expected) | {_MANIFEST, _CARD}:
        raise _foreign_contents()
    for name, digest in expected.items():
        if _sha256(members[name]) != digest:
            raise SignatureError("digest", f"The part {name!r} is not the one that the manifest describes.")


def _parts(proof: GoldenVector | GoldenAnswers) -> tuple[str, ...]:
    return _ARRAYS if isinstance(proof, GoldenVector) else _ANSWER_ARRAYS


def _graph_member(name: str) -> str:
    return f"graphs/{name}.onnx"


def _golden_member(name: str, part: str) -> str:
    return f"golden/{name}.{part}.npy"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _npy(array: FloatArray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(
        buffer, np.ascontiguousarray(array, dtype="<f4"), version=(1, 0), allow_pickle=False
    )
    return buffer.getvalue()


def _array(data: bytes, name: str) -> FloatArray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as exc:
        raise _bad_golden(name) from exc
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise _bad_golden(name)
    array.flags.writeable = False
    return array


def _bad_golden(name: str) -> SignatureError:
    return SignatureError(
        "golden", f"The golden vector of the graph {name} proves nothing; ask your coordinator."
    )


# --- the file -----------------------------------------------------------------------------------------------


def _zip(members: Mapping[str, bytes]) -> bytes:
    """Return the archive without its comment, but with the room for it declared."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = _UNIX
            info.external_attr = _MODE
            archive.writestr(info, data)
        archive.comment = bytes(_BLOCK_BYTES)
    return buffer.getvalue()[:-_BLOCK_BYTES]


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as exc:
        raise StorageError(
            "bundle-write", "The bundle could not be written; check space and permissions.", private=str(exc)
        ) from exc
