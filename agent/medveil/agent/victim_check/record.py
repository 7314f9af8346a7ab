"""The last check of a release, kept in the private folder; it counts only while it is about what is released now."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final, TypeVar

from pydantic import ValidationError

from medveil.agent.ledger import FileState, Ledger
from medveil.agent.victim_check.verdict import JudgedRelease, SiteCheck
from medveil.agent.workspace import Workspace
from medveil.models.disk import write_atomically
from medveil.models.errors import ConfigurationError, InputError

__all__ = ["check_bundle", "keep_check", "read_check", "recorded_check", "release_digest"]

_NAME: Final = "site-check.json"

Check = TypeVar("Check", bound=JudgedRelease)


def release_digest(ledger: Ledger) -> str:
    """Return the SHA-256 over the names and digests of every protected copy, hex."""
    digest = hashlib.sha256()
    for file in ledger.files(FileState.DONE):
        if file.output_sha256 is not None:
            digest.update(f"{file.target}\0{file.output_sha256}\n".encode())
    return digest.hexdigest()


def check_bundle(ledger: Ledger, digest: str) -> None:
    """Refuse to judge a release by another bundle than it was made with.

    Raises:
        InputError: ``no-call``: nothing was ever begun here.
        ConfigurationError: ``other-bundle``.
    """
    recorded = ledger.meta("settings")
    if recorded is None:
        raise InputError("no-call", "This job was never started; run `medveil-agent protect`.")
    if json.loads(recorded).get("bundle_sha256") != digest:
        raise ConfigurationError(
            "other-bundle", "This release was made with another bundle; name that one with --bundle."
        )


def keep_check(workspace: Workspace, check: JudgedRelease, name: str = _NAME) -> Path:
    """Write a check into the private folder and return where.

    Raises:
        StorageError: the disk takes no more.
    """
    path = workspace.private / name
    write_atomically(path, check.model_dump_json(indent=2).encode(), mode=0o600)
    return path


def recorded_check(workspace: Workspace, ledger: Ledger) -> SiteCheck | None:
    """Return the last check, or None if there is none or copies were added, removed or changed since."""
    return read_check(workspace, ledger, SiteCheck, _NAME)


def read_check(workspace: Workspace, ledger: Ledger, kind: type[Check], name: str) -> Check | None:
    """Do as `recorded_check`, for a check of any kind."""
    try:
        check = kind.model_validate_json((workspace.private / name).read_bytes())
    except (OSError, ValidationError):
        return None
    return check if check.release_sha256 == release_digest(ledger) else None
