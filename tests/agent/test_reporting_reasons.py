"""What leaves the site about quarantined images: one of a few closed reasons, never a code or a sentence."""

from __future__ import annotations

import pytest

from medveil.agent.reporting import reason_of
from medveil.protos.v1 import figures_pb2


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("truncated", "UNREADABLE"),
        ("mask-damaged", "UNREADABLE"),
        ("4d", "UNSUPPORTED"),
        ("missing-label", "NO_LABEL"),
        ("missing-mask", "NO_LABEL"),
        ("empty-mask", "NO_LABEL"),
        ("format-not-allowed", "POLICY"),
        ("read-back", "READ_BACK_DIFFERED"),
        ("a code of tomorrow", "OTHER"),
    ],
)
def test_every_code_is_told_as_a_closed_reason(code, reason):
    assert reason_of(code) == figures_pb2.QuarantineReason.Value(f"QUARANTINE_REASON_{reason}")
