"""What has happened to every image of one job, so that a killed run can go on where it stopped."""

from __future__ import annotations

from medveil.agent.ledger.chain import LogLine, first_changed_line
from medveil.agent.ledger.states import FINAL_STATES, FileState, ImageState
from medveil.agent.ledger.store import FileEntry, FileRow, ImageRow, Ledger, Receipt, Totals

__all__ = [
    "FINAL_STATES",
    "FileEntry",
    "FileRow",
    "FileState",
    "ImageRow",
    "ImageState",
    "Ledger",
    "LogLine",
    "Receipt",
    "Totals",
    "first_changed_line",
]
