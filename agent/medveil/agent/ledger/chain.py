"""The audit log's chain: every line's hash covers the line before it, so no line can be changed unnoticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["GENESIS", "LogLine", "chained", "first_changed_line"]

GENESIS: Final = hashlib.sha256(b"medveil audit log 1").hexdigest()
"""What stands before the first line."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of the audit log.

    Attributes:
        sequence: 1, 2, 3, ... without a gap.
        time: ISO 8601, UTC.
        event: what happened (``"verified"``, ``"quarantined"``, ``"run-started"``, ...).
        subject: the file and frame it happened to, or empty.
        detail: reason code or figures.
        hash: SHA-256 over the previous line's hash and this line's own fields, as hex.
    """

    sequence: int
    time: str
    event: str
    subject: str
    detail: str
    hash: str


def chained(previous: str, sequence: int, time: str, event: str, subject: str, detail: str) -> LogLine:
    """Return the line that follows the line whose hash is ``previous``."""
    fields = json.dumps([previous, sequence, time, event, subject, detail]).encode()
    return LogLine(sequence, time, event, subject, detail, hashlib.sha256(fields).hexdigest())


def first_changed_line(lines: Iterable[LogLine], head: str) -> int | None:
    """Return the sequence number of the first line that is not as it was written; None if the log is whole.

    Args:
        lines: all lines in order.
        head: the hash of the last line, kept beside the log; shows when lines were cut off at the end.
    """
    previous, expected = GENESIS, 1
    for line in lines:
        if line != chained(previous, expected, line.time, line.event, line.subject, line.detail):
            return expected
        previous, expected = line.hash, expected + 1
    return None if previous == head else expected
