"""The key by which Flower knows this site: made here, kept through renewals of the certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from medveil.models.disk import make_private_folder, write_atomically
from medveil.models.errors import ConfigurationError

__all__ = ["node_key", "node_public_key"]

_NAME: Final = "node-key"


def node_key(folder: Path) -> Path:
    """Return the private key's file, made on the first call: P-384, OpenSSH format, which is all that Flower reads.

    Raises:
        StorageError: the key cannot be stored.
    """
    path = folder / _NAME
    if not path.exists():
        make_private_folder(folder)
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        write_atomically(path, private, mode=0o600)
    return path


def node_public_key(folder: Path) -> bytes:
    """Return the public half as Flower sends it: PEM, SubjectPublicKeyInfo.

    Raises:
        ConfigurationError: ``node-key``: the file is no key that medveil made.
    """
    try:
        key = serialization.load_ssh_private_key(node_key(folder).read_bytes(), None)
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigurationError(
            "node-key", "The site's Flower key cannot be read; remove it and ask for a new invitation."
        ) from exc
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
