from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medveil.models.bundle import keys
from medveil.models.errors import ConfigurationError, StorageError

posix_only = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")


def test_a_saved_key_is_the_same_key_again(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "key.pem"
    key, new = keys.load_or_create_key(path)
    again, newer = keys.load_or_create_key(path)
    assert (new, newer) == (True, False)
    assert key.private_bytes_raw() == again.private_bytes_raw()
    keys.save_public_key(tmp_path / "key.pub", key.public_key())
    public = keys.load_public_key(tmp_path / "key.pub")
    assert keys.fingerprint(public) == keys.fingerprint(key.public_key())


@posix_only
def test_only_the_owner_may_read_a_signing_key(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    keys.save_key(path, keys.generate_key())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigurationError) as caught:
        keys.load_key(path)
    assert caught.value.code == "key-permissions"


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    keys.save_key(path, keys.generate_key())
    before = path.read_bytes()
    with pytest.raises(ConfigurationError) as caught:
        keys.save_key(path, keys.generate_key())
    assert caught.value.code == "key-exists"
    assert path.read_bytes() == before


def test_other_files_are_not_keys(tmp_path: Path) -> None:
    foreign = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "key.pem"
    for content in (b"", b"-----BEGIN PRIVATE KEY-----\n", foreign):
        path.write_bytes(content)
        path.chmod(0o600)
        for load in (keys.load_key, keys.load_public_key):
            with pytest.raises(ConfigurationError) as caught:
                load(path)
            assert caught.value.code == "key-format"
    with pytest.raises(ConfigurationError) as caught:
        keys.load_key(tmp_path / "nowhere")
    assert caught.value.code == "key-missing"


def test_an_unwritable_folder_is_a_storage_error(tmp_path: Path) -> None:
    blocker = tmp_path / "a file"
    blocker.write_text("")
    with pytest.raises(StorageError) as caught:
        keys.save_key(blocker / "key.pem", keys.generate_key())
    assert caught.value.code == "key-write"


def test_a_fingerprint_can_be_read_over_the_phone() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    text = keys.fingerprint(key)
    scheme, groups = text.split(":")
    assert scheme == "ed25519"
    assert [len(group) for group in groups.split("-")] == [4] * 8
    assert not set(groups) & set("0189")
    assert keys.fingerprint(Ed25519PrivateKey.from_private_bytes(bytes([1] * 32)).public_key()) != text


def test_a_typed_fingerprint_is_understood() -> None:
    text = keys.fingerprint(Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key())
    for typed in (text.lower(), text.replace("-", " "), text.removeprefix("ed25519:"), f" {text} "):
        assert keys.parse_fingerprint(typed) == text


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:ABCD", "rsa:" + "A" * 32, "ed25519:" + "1" * 32])
def test_anything_else_is_not_a_fingerprint(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        keys.parse_fingerprint(text)
    assert caught.value.code == "fingerprint"


def test_the_default_key_lies_in_medveil_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVEIL_HOME", str(tmp_path))
    assert keys.default_key_path().parent == tmp_path
    monkeypatch.delenv("MEDVEIL_HOME")
    assert keys.default_key_path().is_absolute()
