"""The site's age identity: made on first use, never sent anywhere, needed to restore originals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import platformdirs
import pyrage
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medveil.models.disk import make_private_folder, write_atomically
from medveil.models.errors import ConfigurationError, RefusedError

__all__ = ["SiteKey", "home_folder", "load_site_key", "site_key_path", "unwrap", "wrap"]

_FILE_NAME: Final = "site-key.age"
_PREFIX: Final = "AGE-SECRET-KEY-"
_OTHERS: Final = 0o077
_SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class SiteKey:
    """An age x25519 identity.

    Attributes:
        path: where it lies.
        recipient: the public half (``age1...``), which may be shown to anyone.
        created: whether this call made it; the screen then says to back it up.
    """

    path: Path
    recipient: str
    identity: pyrage.x25519.Identity = field(repr=False, compare=False)
    created: bool = False

    def secret_for(self, purpose: str) -> bytes:
        """Return 32 secret bytes that only this key and ``purpose`` give, by HKDF-SHA256 (RFC 5869)."""
        derivation = HKDF(hashes.SHA256(), length=_SECRET_BYTES, salt=None, info=purpose.encode())
        return derivation.derive(str(self.identity).encode("ascii"))


def home_folder() -> Path:
    """Return the folder of this site's own files: ``MEDVEIL_HOME``, else the user's data folder."""
    chosen = os.environ.get("MEDVEIL_HOME")
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("medveil"))


def site_key_path() -> Path:
    """Return where the site's key lies or will lie."""
    return home_folder() / _FILE_NAME


def load_site_key(path: Path | None = None, *, create: bool = False) -> SiteKey:
    """Read an identity file.

    Args:
        path: the file; None takes the site's own.
        create: make one if there is none.

    Raises:
        ConfigurationError: ``no-key``, ``key-unreadable`` or ``key-permissions``.
        StorageError: a new key cannot be stored.
    """
    where = path or site_key_path()
    if not where.exists():
        if not create:
            raise ConfigurationError("no-key", "There is no key file at this path; name it with --key.")
        return _create(where)
    try:
        if where.stat().st_mode & _OTHERS:
            raise ConfigurationError(
                "key-permissions", "Others on this machine may read the key file; run chmod 600 on it first."
            )
        text = where.read_text(encoding="ascii")
        secret = next(line.strip() for line in text.splitlines() if line.startswith(_PREFIX))
        identity = pyrage.x25519.Identity.from_str(secret)
    except (OSError, UnicodeDecodeError, StopIteration, pyrage.IdentityError) as exc:
        raise ConfigurationError("key-unreadable", "The key file holds no age identity.") from exc
    return SiteKey(where, str(identity.to_public()), identity)


def _create(path: Path) -> SiteKey:
    make_private_folder(path.parent)
    identity = pyrage.x25519.Identity.generate()
    note = (
        f"# medveil site key; whoever has it can restore the originals\n# public key: {identity.to_public()}"
    )
    write_atomically(path, f"{note}\n{identity}\n".encode("ascii"), mode=0o600)
    return SiteKey(path, str(identity.to_public()), identity, created=True)


def wrap(secret: bytes, recipients: Sequence[str]) -> bytes:
    """Encrypt a data key for several recipients.

    Raises:
        ConfigurationError: ``recipient``: one of them is no age public key.
    """
    try:
        public = [pyrage.x25519.Recipient.from_str(text) for text in recipients]
    except pyrage.RecipientError as exc:
        raise ConfigurationError(
            "recipient", "The policy names a recipient that is no age public key."
        ) from exc
    return bytes(pyrage.encrypt(secret, public))


def unwrap(wrapped: bytes, key: SiteKey) -> bytes:
    """Decrypt a data key.

    Raises:
        RefusedError: ``wrong-key``: it was wrapped for someone else.
    """
    try:
        return bytes(pyrage.decrypt(wrapped, [key.identity]))
    except pyrage.DecryptError as exc:
        raise RefusedError(
            "wrong-key", "This key does not open the sealed originals; use the right one."
        ) from exc
