from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medveil.models.autodiff.selfcheck import GoldenVector
from medveil.models.bundle import (
    Fingerprint,
    ManifestDraft,
    container,
    fingerprint,
    open_bundle,
    write_bundle,
)
from medveil.models.errors import InputError, SignatureError, StorageError

NAMED_REASONS = {"not-a-bundle", "signature", "digest", "truncated", "trailing-data"}


def resigned(body: bytes, key: Ed25519PrivateKey) -> bytes:
    """What a signer who packs something else would send: a valid signature over these bytes."""
    return body + container._signature_block(body, key)


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_what_was_packed_comes_back(
    bundle_file: Path, key: Ed25519PrivateKey, draft: ManifestDraft, golden: GoldenVector
) -> None:
    bundle = open_bundle(bundle_file, trusted={fingerprint(key.public_key())})
    assert bundle.graph("first") == b"one graph"
    assert bundle.graph("second") == b"other"
    assert dict(bundle.manifest)["recipe"] == draft.recipe
    assert bundle.manifest.training_data == draft.training_data
    assert bundle.digest == hashlib.sha256(bundle_file.read_bytes()).hexdigest()
    assert bundle.golden("second") is None
    vector = bundle.golden("first")
    assert vector is not None
    for part in ("images", "targets", "losses", "gradients"):
        assert np.array_equal(getattr(vector, part), getattr(golden, part))
    assert vector.rtol == golden.rtol
    with pytest.raises(KeyError):
        bundle.graph("third")


def test_the_same_content_gives_the_same_file(packed: Callable[[], Path]) -> None:
    first = packed().read_bytes()
    assert packed().read_bytes() == first


def test_every_flipped_byte_is_refused_with_a_named_reason(bundle_file: Path, tmp_path: Path) -> None:
    data = bytearray(bundle_file.read_bytes())
    flipped = tmp_path / "flipped"
    reasons = set()
    for position in range(len(data)):
        data[position] ^= 1 << (position % 8)
        flipped.write_bytes(data)
        with pytest.raises(SignatureError) as caught:
            open_bundle(flipped, trusted=None)
        reasons.add(caught.value.code)
        data[position] ^= 1 << (position % 8)
    assert reasons <= NAMED_REASONS
    assert {"digest", "signature"} <= reasons


def test_a_changed_graph_is_named(bundle_file: Path) -> None:
    data = bundle_file.read_bytes()
    bundle_file.write_bytes(data.replace(b"one graph", b"one graqh"))
    with pytest.raises(SignatureError, match=r"graphs/first\.onnx") as caught:
        open_bundle(bundle_file, trusted=None)
    assert caught.value.code == "digest"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data + b"\n", "trailing-data"),
        (lambda data: data + bytes(1000), "trailing-data"),
        (lambda data: data + data, "signature"),
        (lambda data: b"x" + data, "signature"),
        (lambda data: b"", "not-a-bundle"),
        (lambda data: b"\x89PNG and so on", "not-a-bundle"),
        (lambda data: data[: -container._BLOCK_BYTES], "truncated"),
        (lambda data: data.replace(b"ed25519 ", b"ed25518 "), "signature"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    bundle_file: Path, change: Callable[[bytes], bytes], code: str
) -> None:
    bundle_file.write_bytes(change(bundle_file.read_bytes()))
    with pytest.raises(SignatureError) as caught:
        open_bundle(bundle_file, trusted=None)
    assert caught.value.code == code


def test_the_signature_cannot_be_spelled_another_way(bundle_file: Path) -> None:
    data = bundle_file.read_bytes()
    block = data[-container._BLOCK_BYTES :]
    head, rest = block[: len(container._MARK)], block[len(container._MARK) :]
    bundle_file.write_bytes(data[: -len(block)] + head + rest.upper())
    with pytest.raises(SignatureError):
        open_bundle(bundle_file, trusted=None)


def test_only_named_signers_are_trusted(bundle_file: Path, key: Ed25519PrivateKey) -> None:
    stranger = fingerprint(Ed25519PrivateKey.generate().public_key())
    assert open_bundle(bundle_file, trusted=None).signer == fingerprint(key.public_key())
    for trusted in (set[Fingerprint](), {stranger}):
        with pytest.raises(SignatureError, match="ed25519:") as caught:
            open_bundle(bundle_file, trusted=trusted)
        assert caught.value.code == "unknown-signer"


def test_another_key_cannot_sign_in_the_signers_name(bundle_file: Path, key: Ed25519PrivateKey) -> None:
    body = bundle_file.read_bytes()[: -container._BLOCK_BYTES]
    forged = resigned(body, Ed25519PrivateKey.generate())
    owner = key.public_key().public_bytes_raw().hex().encode()
    start = len(body) + len(container._MARK)
    bundle_file.write_bytes(forged[:start] + owner + forged[start + 64 :])
    with pytest.raises(SignatureError) as caught:
        open_bundle(bundle_file, trusted=None)
    assert caught.value.code == "signature"


def test_any_unzip_tool_opens_it(bundle_file: Path) -> None:
    members = members_of(bundle_file)
    with zipfile.ZipFile(bundle_file) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert archive.comment.startswith(b"medveil-bundle-1 ed25519 ")
    assert json.loads(members["manifest.json"])["task"] == "classification"
    assert b"Drawn by a program." in members["MODEL_CARD.md"]


def _without(name: str) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.pop(name) and None


def _manifest_with(**changes: object) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members["manifest.json"] = json.dumps(json.loads(members["manifest.json"]) | changes).encode()

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_without("manifest.json"), "contents"),
        (_without("graphs/first.onnx"), "contents"),
        (lambda members: members.update({"graphs/third.onnx": b"x"}), "contents"),
        (lambda members: members.update({"../escape": b"x"}), "contents"),
        (lambda members: members.update({"graphs/first.onnx": b"swapped"}), "digest"),
        (lambda members: members.update({"manifest.json": b"{"}), "manifest"),
        (lambda members: members.update({"manifest.json": b"[]"}), "manifest"),
        (lambda members: members.update({"manifest.json": b"\xff\xfe"}), "manifest"),
        (_manifest_with(surprise=1), "manifest"),
        (_manifest_with(seed="7"), "manifest"),
        (_manifest_with(schema_version=2), "schema"),
        (_manifest_with(schema_version=0), "manifest"),
    ],
)
def test_a_signed_file_of_another_form_is_refused(
    bundle_file: Path,
    key: Ed25519PrivateKey,
    change: Callable[[dict[str, bytes]], None],
    code: str,
) -> None:
    members = members_of(bundle_file)
    change(members)
    bundle_file.write_bytes(resigned(container._zip(members), key))
    with pytest.raises(SignatureError) as caught:
        open_bundle(bundle_file, trusted=None)
    assert caught.value.code == code


def test_a_signed_archive_of_another_kind_is_refused(bundle_file: Path, key: Ed25519PrivateKey) -> None:
    members = members_of(bundle_file)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = bytes(container._BLOCK_BYTES)
    for body in (buffer.getvalue()[: -container._BLOCK_BYTES], b"PK\x03\x04 no archive at all"):
        bundle_file.write_bytes(resigned(body, key))
        with pytest.raises(SignatureError) as caught:
            open_bundle(bundle_file, trusted=None)
        assert caught.value.code == "contents"


@pytest.mark.parametrize(
    "foreign",
    [
        lambda array: array.astype(np.float64),
        lambda array: array * np.float32("nan"),
        lambda array: array[:0],
        lambda array: np.array([{"an": "object"}], dtype=object),
    ],
)
def test_a_golden_vector_that_proves_nothing_is_refused(
    bundle_file: Path,
    key: Ed25519PrivateKey,
    draft: ManifestDraft,
    golden: GoldenVector,
    foreign: Callable[[np.ndarray], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, foreign(array))
        return buffer.getvalue()

    monkeypatch.setattr(container, "_npy", npy)
    write_bundle(bundle_file, draft, {"first": b"1", "second": b"2"}, {"first": golden}, key)
    bundle = open_bundle(bundle_file, trusted=None)
    with pytest.raises(SignatureError) as caught:
        bundle.golden("first")
    assert caught.value.code == "golden"


def test_a_file_beyond_the_cap_is_not_read(bundle_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_BUNDLE_BYTES", 100)
    with pytest.raises(SignatureError) as caught:
        open_bundle(bundle_file, trusted=None)
    assert caught.value.code == "too-large"


def test_a_missing_file_is_an_input_error_without_its_path(tmp_path: Path) -> None:
    for path in (tmp_path / "secret-name.bundle", tmp_path):
        with pytest.raises(InputError) as caught:
            open_bundle(path, trusted=None)
        assert caught.value.code == "bundle-missing"
        assert str(path) not in caught.value.public


def test_graphs_must_be_those_of_the_draft(
    tmp_path: Path, key: Ed25519PrivateKey, draft: ManifestDraft, golden: GoldenVector
) -> None:
    path = tmp_path / "b"
    for graphs, vectors in (({"first": b"1"}, {}), ({"first": b"1", "second": b"2"}, {"third": golden})):
        with pytest.raises(ValueError, match="draft"):
            write_bundle(path, draft, graphs, vectors, key)
    assert not path.exists()


def test_a_failed_write_leaves_nothing_behind(
    bundle_file: Path, draft: ManifestDraft, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bundle_file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError) as caught:
        write_bundle(bundle_file, draft, {"first": b"1", "second": b"2"}, {}, key)
    assert caught.value.code == "bundle-write"
    assert list(bundle_file.parent.iterdir()) == [bundle_file]
    assert bundle_file.read_bytes() == before
