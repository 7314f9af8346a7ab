"""The last check of a release with masks, kept in the private folder; it counts while the release is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import ValidationError

from medveil.agent.ledger import Ledger
from medveil.agent.segmentation.site_check.verdict import MaskedSiteCheck
from medveil.agent.victim_check.record import release_digest
from medveil.agent.workspace import Workspace
from medveil.models.disk import write_atomically

__all__ = ["keep_masked_check", "recorded_masked_check"]

_NAME: Final = "site-check-masks.json"


def keep_masked_check(workspace: Workspace, check: MaskedSiteCheck) -> Path:
    """Write a check into the private folder and return where.

    Raises:
        StorageError: the disk takes no more.
    """
    path = workspace.private / _NAME
    write_atomically(path, check.model_dump_json(indent=2).encode(), mode=0o600)
    return path


def recorded_masked_check(workspace: Workspace, ledger: Ledger) -> MaskedSiteCheck | None:
    """Return the last check, or None if there is none or copies were added, removed or changed since."""
    try:
        check = MaskedSiteCheck.model_validate_json((workspace.private / _NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    return check if check.release_sha256 == release_digest(ledger) else None
