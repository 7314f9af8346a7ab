"""Bundles that arrive in parts: appended, and kept under their own SHA-256 only once they are trusted whole.

<sha256>.part       what has arrived so far, from the beginning
<sha256>.medveil    signed by someone whom the policy trusts, admitted, and self-tested on this machine
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from medveil.agent.preparation import Wishes, prepare
from medveil.models.disk import (
    check_free,
    disk_errors,
    file_sha256,
    locked,
    make_private_folder,
    publish,
    sync,
)
from medveil.models.errors import BusyError, InputError, MedveilError, SignatureError, StorageError

__all__ = ["Bundles"]


class Bundles:
    """The folder of bundles."""

    def __init__(self, folder: Path) -> None:
        """Take the folder; it is made with the first part."""
        self._folder = folder

    def path(self, sha256: bytes) -> Path:
        """Return where a bundle lies once it is trusted."""
        return self._folder / f"{sha256.hex()}.medveil"

    def holds(self, sha256: bytes) -> bool:
        """Return whether a bundle is here, whole and trusted."""
        return self.path(sha256).is_file()

    def held_bytes(self, sha256: bytes) -> int:
        """Return how much of a bundle is here, from its beginning; trusted or not, `holds` says."""
        place = self.path(sha256) if self.holds(sha256) else self._part(sha256)
        return place.stat().st_size if place.is_file() else 0

    def append(self, sha256: bytes, size_bytes: int, offset: int, part: bytes) -> None:
        """Add one part behind what is here.

        Raises:
            InputError: ``bundle-offset``: the part doesn't follow, or is longer than the bundle.
            StorageError: the disk takes no more.
            BusyError: another process writes here.
        """
        make_private_folder(self._folder)
        with self._locked():
            held = self.held_bytes(sha256)
            if offset != held or offset + len(part) > size_bytes:
                raise InputError("bundle-offset", "This part of the bundle doesn't follow the one before.")
            check_free(self._folder, size_bytes - held)
            with disk_errors(), self._part(sha256).open("ab") as file:
                file.write(part)
                file.flush()
                os.fsync(file.fileno())

    def accept(self, sha256: bytes, policy: Path | None) -> None:
        """Trust a bundle that has arrived whole, or throw it away.

        Args:
            sha256: what its bytes must hash to.
            policy: the site's policy file; its signers and methods count.

        Raises:
            SignatureError: ``bundle-digest``: its bytes are not what was offered; or its signer is not trusted.
            RefusedError: it breaks an admission rule or fails the self-test.
            ConfigurationError: the policy doesn't allow it.
            StorageError: the disk fails; what has arrived stays.
            BusyError: another process writes here.
        """
        part = self._part(sha256)
        with self._locked():
            try:
                if file_sha256(part) != sha256.hex():
                    raise SignatureError("bundle-digest", "The bundle is not the one that was offered.")
                prepare(Wishes(bundle=part, policy=policy))
            except (StorageError, BusyError):
                raise
            except MedveilError:
                part.unlink()
                raise
            with disk_errors():
                sync(part)
                publish(part, self.path(sha256))

    def _part(self, sha256: bytes) -> Path:
        return self._folder / f"{sha256.hex()}.part"

    def _locked(self) -> AbstractContextManager[None]:
        """Keep out a second client app, left over from a SuperNode that was killed."""
        return locked(
            self._folder / "lock", BusyError("bundles-busy", "Another medveil process receives a bundle.")
        )
