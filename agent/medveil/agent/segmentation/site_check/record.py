"""The last check of a release with masks, kept in the private folder; it counts while the release is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from medveil.agent.ledger import Ledger
from medveil.agent.segmentation.site_check.verdict import MaskedSiteCheck
from medveil.agent.victim_check.record import keep_check, read_check
from medveil.agent.workspace import Workspace

__all__ = ["keep_masked_check", "recorded_masked_check"]

_NAME: Final = "site-check-masks.json"


def keep_masked_check(workspace: Workspace, check: MaskedSiteCheck) -> Path:
    """Write a check into the private folder and return where.

    Raises:
        StorageError: the disk takes no more.
    """
    return keep_check(workspace, check, _NAME)


def recorded_masked_check(workspace: Workspace, ledger: Ledger) -> MaskedSiteCheck | None:
    """Return the last check, or None if there is none or copies were added, removed or changed since."""
    return read_check(workspace, ledger, MaskedSiteCheck, _NAME)
