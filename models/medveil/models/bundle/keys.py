"""The coordinator's ed25519 keys, and fingerprints that two people can compare over the phone."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import NewType

import platformdirs
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medveil.models.disk import write_new
from medveil.models.errors import ConfigurationError, StorageError

__all__ = [
    "Fingerprint",
    "default_key_path",
    "fingerprint",
    "generate_key",
    "load_key",
    "load_or_create_key",
    "load_public_key",
    "parse_fingerprint",
    "save_key",
    "save_public_key",
]

Fingerprint = NewType("Fingerprint", str)
"""``ed25519:`` and eight groups of four letters or digits: 160 bits of the key's SHA-256, in base32.

Base32 has neither 0, 1, 8 nor 9, so nothing is misheard as a letter; 160 bits keep a second key with the same
fingerprint out of reach.
"""

_SCHEME = "ed25519:"
_GROUP = 4
_FINGERPRINT_BYTES = 20
_BASE32 = re.compile(r"[A-Z2-7]{32}")
_OWNER_ONLY = stat.S_IRUSR | stat.S_IWUSR
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
# A key file is a few hundred bytes; anything larger is some other file.
_KEY_FILE_BYTES = 64 * 1024


def fingerprint(public_key: Ed25519PublicKey) -> Fingerprint:
    """Return the short human form of a public key."""
    digest = hashlib.sha256(public_key.public_bytes_raw()).digest()[:_FINGERPRINT_BYTES]
    return _grouped(base64.b32encode(digest).decode("ascii"))


def parse_fingerprint(text: str) -> Fingerprint:
    """Return the fingerprint that a person typed, in canonical form; case, spaces and dashes don't matter.

    Raises:
        ConfigurationError: "fingerprint": it is not one.
    """
    letters = re.sub(r"[\s-]", "", text.strip()).upper().removeprefix(_SCHEME.upper())
    if not _BASE32.fullmatch(letters):
        raise ConfigurationError(
            "fingerprint", "A signer's fingerprint reads ed25519: and eight groups of four letters or digits."
        )
    return _grouped(letters)


def _grouped(letters: str) -> Fingerprint:
    groups = (letters[i : i + _GROUP] for i in range(0, len(letters), _GROUP))
    return Fingerprint(_SCHEME + "-".join(groups))


def default_key_path() -> Path:
    """Return where the coordinator's signing key lies: in ``MEDVEIL_HOME``, else in the user's settings."""
    home = os.environ.get("MEDVEIL_HOME")
    folder = Path(home) if home else Path(platformdirs.user_config_dir("medveil"))
    return folder / "coordinator-signing-key.pem"


def generate_key() -> Ed25519PrivateKey:
    """Return a new signing key from the operating system's randomness."""
    return Ed25519PrivateKey.generate()


def save_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a signing key as PKCS#8 PEM that only its owner can read; never over an existing file.

    Raises:
        ConfigurationError: "key-exists".
        StorageError: "key-write".
    """
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_new(path, pem, _OWNER_ONLY)


def save_public_key(path: Path, key: Ed25519PublicKey) -> None:
    """Write a public key as PEM, for the sites; never over an existing file.

    Raises:
        ConfigurationError: "key-exists".
        StorageError: "key-write".
    """
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write_new(path, pem, _OWNER_ONLY | stat.S_IRGRP | stat.S_IROTH)


def _write_new(path: Path, pem: bytes, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, pem, mode=mode)
    except OSError as exc:
        if isinstance(exc, FileExistsError) and path.exists():
            raise ConfigurationError(
                "key-exists",
                "A key file of this name exists already and is never overwritten.",
                private=str(path),
            ) from exc
        raise StorageError("key-write", "The key file could not be written.", private=str(exc)) from exc


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a signing key.

    Raises:
        ConfigurationError: "key-missing", "key-format", "key-permissions" (not the owner alone may read it).
    """
    pem = _read(path)
    if os.name == "posix" and path.stat().st_mode & _OTHERS:
        raise ConfigurationError(
            "key-permissions", "Other users can read the signing key: run chmod 600 on it.", private=str(path)
        )
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise _not_a_key(path) from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise _not_a_key(path)
    return key


def load_or_create_key(path: Path) -> tuple[Ed25519PrivateKey, bool]:
    """Read the signing key, or make and save one; the flag tells whether it is new.

    Raises:
        ConfigurationError: as `load_key`.
        StorageError: "key-write".
    """
    if path.exists():
        return load_key(path), False
    key = generate_key()
    save_key(path, key)
    return key, True


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key in PEM.

    Raises:
        ConfigurationError: "key-missing", "key-format".
    """
    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _not_a_key(path) from exc
    if not isinstance(key, Ed25519PublicKey):
        raise _not_a_key(path)
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_KEY_FILE_BYTES)
    except OSError as exc:
        raise ConfigurationError(
            "key-missing", "The key file cannot be read; check its path.", private=str(exc)
        ) from exc


def _not_a_key(path: Path) -> ConfigurationError:
    return ConfigurationError(
        "key-format", "The key file does not hold an ed25519 key in PEM.", private=str(path)
    )
