"""From one job's ledger to the figures that a report is made of: counts and one mean, nothing per image."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from medveil.agent.ledger import Ledger
from medveil.agent.reporting_figures import CheckFigures, Figures, count
from medveil.agent.reporting_gate import Figure, Withheld, coarsened
from medveil.agent.reporting_policy import ReportingPolicy
from medveil.models.errors import ConfigurationError
from medveil.protos.v1 import figures_pb2, status_pb2
from medveil.protos.v1.conventions import PSNR_EDGES_DB

if TYPE_CHECKING:
    from medveil.agent.victim_check import SiteCheck

__all__ = ["beat", "figures_of", "reason_of"]

_REASONS: Final[Mapping[int, frozenset[str]]] = {
    figures_pb2.QUARANTINE_REASON_UNREADABLE: frozenset(
        {
            "truncated", "damaged", "unreadable", "corrupt-header", "corrupt-pixels", "empty-file", "no-pixels",
            "raw-data-length", "not-an-image", "not-dicom", "not-nifti", "not-a-file", "not-finite", "mask-damaged",
            "decoder-crash",
        }
    ),
    figures_pb2.QUARANTINE_REASON_UNSUPPORTED: frozenset(
        {
            "1-bit", "one-bit", "32-bit", "4d", "bad-lut", "bad-rescale", "bad-window", "cmyk", "compression",
            "float-pixels", "layout", "mixed-pages", "nifti-pair", "no-window", "non-monotone-lut", "object-array",
            "rgb", "sample-type", "too-large", "transparent", "unsupported-layout", "unsupported-transfer-syntax",
            "video",
        }
    ),
    figures_pb2.QUARANTINE_REASON_NO_LABEL: frozenset(
        {"missing-label", "unknown-class", "multi-label", "missing-mask", "empty-mask", "mask-conflict"}
    ),
    figures_pb2.QUARANTINE_REASON_POLICY: frozenset({"format-not-allowed"}),
    figures_pb2.QUARANTINE_REASON_READ_BACK_DIFFERED: frozenset({"read-back"}),
}  # fmt: skip


def reason_of(code: str) -> int:
    """Return the closed reason for one of the ledger's codes; a code that is not listed is OTHER."""
    return next(
        (reason for reason, codes in _REASONS.items() if code in codes), figures_pb2.QUARANTINE_REASON_OTHER
    )


def figures_of(ledger: Ledger, check: SiteCheck | None = None, *, classes: int = 0) -> Figures:
    """Return a job's figures, from what the ledger holds as verified and not from what was attempted.

    Args:
        ledger: the job's.
        check: the site's own, if it is about the release as it is now (`victim_check.recorded_check`).
        classes: how many the bundle knows; only a report with noise asks.
    """
    totals = ledger.totals()
    by_reason: Counter[int] = Counter()
    for code, images in totals.quarantined.items():
        by_reason[reason_of(code)] += images
    by_class: Counter[int] = Counter()
    bins = [0] * (len(PSNR_EDGES_DB) + 1)
    changed = []
    for row in ledger.verified_by_digest():
        if row.receipt is None:
            continue
        by_class[row.receipt.class_index] += 1
        changed.append(row.receipt.changed)
        if row.receipt.psnr_db is not None:
            bins[bisect_right(PSNR_EDGES_DB, row.receipt.psnr_db)] += 1
    return Figures(
        verified=totals.verified,
        not_protectable=totals.not_protectable,
        unfinished=totals.unfinished,
        by_reason=dict(sorted(by_reason.items())),
        by_class=dict(sorted(by_class.items())),
        classes=classes,
        psnr_bins=tuple(bins),
        changed_share_mean=math.fsum(changed) / len(changed) if changed else 0.0,
        victim_check=None if check is None else _check_figures(check),
    )


def _check_figures(check: SiteCheck) -> CheckFigures:
    """Return the means of the victim that recovered most: what counts, because an attacker chooses."""
    strongest = check.strongest
    return CheckFigures(
        hold_out=check.hold_out,
        clean=strongest.clean.balanced_accuracy,
        protected=strongest.protected.balanced_accuracy,
        recoverable=strongest.protected.recoverable_accuracy,
        half_interval=check.half_interval,
    )


def beat(
    policy: ReportingPolicy | None,
    *,
    activity: status_pb2.Activity,
    trouble: status_pb2.Trouble = status_pb2.TROUBLE_UNSPECIFIED,
    campaign: int = 0,
    images: int = 0,
    done: int = 0,
    images_per_s: float = 0.0,
    since_last_work_s: int = 0,
    certificate_days: int = 0,
    egress_bytes: int = 0,
    version: tuple[int, int, int] = (0, 0, 0),
) -> status_pb2.Beat:
    """Return a site's sign of life; its counts are rounded down to whole groups.

    Under a policy that asks for noise it tells what the site does and no number about its images: beats repeat every
    few seconds, and speed times time is a count.

    Raises:
        ConfigurationError: ``no-egress-policy``.
    """
    if policy is None:
        raise ConfigurationError(
            "no-egress-policy", "Nothing leaves this site until its policy says what may."
        )
    may_count = policy.noise is None
    return status_pb2.Beat(
        activity=activity,
        trouble=trouble,
        campaign=campaign,
        images=count(_running(images, policy)),
        done=count(_running(done, policy)),
        images_per_s=round(images_per_s, 1) if may_count else 0.0,
        since_last_work_s=since_last_work_s if may_count else 0,
        certificate_days=max(0, certificate_days),
        egress_bytes=egress_bytes,
        version_major=version[0],
        version_minor=version[1],
        version_patch=version[2],
    )


def _running(images: int, policy: ReportingPolicy) -> Figure:
    return Withheld.NOISE if policy.noise is not None else coarsened(images, policy.minimum_group_size)
