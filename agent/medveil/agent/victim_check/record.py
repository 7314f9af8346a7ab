"""The last check of a release, kept in the private folder; it counts only while it is about what is released now."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from medveil.agent.ledger import FileState, Ledger
from medveil.agent.victim_check.verdict import SiteCheck
from medveil.agent.workspace import Workspace
from medveil.models.disk import write_atomically

__all__ = ["keep_check", "recorded_check", "release_digest"]

_NAME: Final = "site-check.json"


def release_digest(ledger: Ledger) -> str:
    """Return the SHA-256 over the names and digests of every protected copy, hex."""
    digest = hashlib.sha256()
    for file in ledger.files(FileState.DONE):
        if file.output_sha256 is not None:
            digest.update(f"{file.target}\0{file.output_sha256}\n".encode())
    return digest.hexdigest()


def keep_check(workspace: Workspace, check: SiteCheck) -> Path:
    """Write a check into the private folder and return where.

    Raises:
        StorageError: the disk takes no more.
    """
    path = workspace.private / _NAME
    write_atomically(path, check.model_dump_json(indent=2).encode(), mode=0o600)
    return path


def recorded_check(workspace: Workspace, ledger: Ledger) -> SiteCheck | None:
    """Return the last check, or None if there is none or copies were added, removed or changed since."""
    try:
        check = SiteCheck.model_validate_json((workspace.private / _NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    return check if check.release_sha256 == release_digest(ledger) else None
