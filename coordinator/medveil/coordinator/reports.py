"""A site's report, checked against the closed schema before it counts, and as the numbers that are added up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from google.protobuf.message import DecodeError

from medveil.coordinator.campaign import Noised, SiteFigures
from medveil.models.errors import InputError
from medveil.protos.v1 import figures_pb2, report_pb2
from medveil.protos.v1.conventions import MAX_MESSAGE_BYTES, PSNR_EDGES_DB, SSIM_EDGES

__all__ = ["canonical", "figures", "parse_report"]

_OUTCOMES: Final = ("verified", "not_protectable", "quarantined", "unfinished")
_BINS: Final = {"psnr": len(PSNR_EDGES_DB) + 1, "ssim": len(SSIM_EDGES) + 1}
_SCORES: Final = ("clean_accuracy", "protected_accuracy", "recoverable_accuracy", "half_interval")
_LARGEST_SCALE: Final = 1e12
"""Of noise, in images; more than the largest that a policy can ask for, and far from where the arithmetic ends."""
_MAX_CLASSES: Final = 1000  # ImageNet's number; a taxonomy of a hospital has fewer


def canonical(payload: bytes, kind: Any) -> Any:
    """Parse a message that holds what the schema names and nothing else.

    A field that the schema does not know could carry anything, so it is refused and not stored.

    Raises:
        InputError: ``message-size`` or ``message-schema``.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise InputError("message-size", "The message is larger than 64 KiB.")
    message = kind()
    try:
        message.ParseFromString(payload)
    except DecodeError as exc:
        raise InputError("message-schema", "The message cannot be parsed.", private=str(exc)) from exc
    message.DiscardUnknownFields()
    if message.SerializeToString(deterministic=True) != payload:
        raise InputError("message-schema", "The message holds fields that the schema does not name.")
    return message


def parse_report(payload: bytes, *, minimum_group_size: int) -> report_pb2.Report:
    """Return a report that keeps every rule of the schema.

    Args:
        payload: serialised `Report`.
        minimum_group_size: the offer's; the site's own may be larger.

    Raises:
        InputError: ``message-size``, ``message-schema``, ``group-size`` (a figure below the threshold, or a
            threshold below the offer's), ``figure-missing``, ``rate-range``, ``bins``, ``repeated-entry``, ``noise``
            (it isn't what the report says of it) or ``sums``: the report contradicts itself.
    """
    report: report_pb2.Report = canonical(payload, report_pb2.Report)
    if report.sequence < 1:
        raise InputError("figure-missing", "A report needs a sequence number.")
    if report.minimum_group_size < max(1, minimum_group_size):
        raise InputError("group-size", "The site's minimum group size is below the campaign's.")
    for count in _counts(report):
        _check_count(count, report.minimum_group_size)
    for rate in _rates(report):
        _check_rate(rate)
    _check_entries([entry.reason for entry in report.quarantined_by_reason], forbidden=0)
    _check_entries([entry.class_index for entry in report.verified_by_class], forbidden=None)
    for name, bins in _BINS.items():
        if report.HasField(name) and len(getattr(report, name).bins) != bins:
            raise InputError("bins", "A histogram has other bins than the schema.")
    _check_sums(report)
    _check_noise(report)
    return report


def figures(site: str, report: report_pb2.Report) -> SiteFigures:
    """Return a checked report as the numbers that a campaign adds up."""
    draw = _variance(report.noise.scale)
    counts = {name: _count(getattr(report.outcome, name), draw) for name in ("images", *_OUTCOMES)}
    for entry in report.quarantined_by_reason:
        name = figures_pb2.QuarantineReason.Name(entry.reason).removeprefix("QUARANTINE_REASON_").lower()
        counts[f"quarantined:{name}"] = _count(entry.images, draw)
    for entry in report.verified_by_class:
        counts[f"verified:class-{entry.class_index}"] = _count(entry.verified, draw)
    return SiteFigures(
        site=site,
        sequence=report.sequence,
        counts=counts,
        rates={"changed_share_mean": _exact(report.changed_share_mean)},
        weight=_exact(report.outcome.verified),
        histograms={
            name: tuple(_count(count, draw) for count in getattr(report, name).bins)
            for name in _BINS
            if report.HasField(name)
        },
    )


def _count(count: Any, variance_of_draw: float) -> int | Noised | None:
    if count.WhichOneof("value") == "noised":
        return Noised(count.noised.images, count.noised.draws * variance_of_draw)
    exact: int | None = _exact(count)
    return exact


def _variance(scale: float) -> float:
    """Return the variance of one draw of discrete Laplace noise, in images squared; 0 without noise."""
    if not scale:
        return 0.0
    ratio = math.exp(-1 / scale)
    return 2 * ratio / math.expm1(-1 / scale) ** 2


def _exact(value: Any) -> Any:
    return value.exact if value.WhichOneof("value") == "exact" else None


def _counts(report: Any) -> Iterable[Any]:
    yield from (getattr(report.outcome, name) for name in ("images", *_OUTCOMES))
    yield from (entry.images for entry in report.quarantined_by_reason)
    yield from (entry.verified for entry in report.verified_by_class)
    yield from (*report.psnr.bins, *report.ssim.bins)
    if report.HasField("victim_check"):
        yield report.victim_check.hold_out


def _rates(report: Any) -> Iterable[Any]:
    yield report.changed_share_mean
    if report.HasField("victim_check"):
        yield from (getattr(report.victim_check, name) for name in _SCORES)


def _check_stated(value: Any) -> bool:
    """Return whether the value is stated exactly; refuse a figure that is neither stated nor withheld."""
    kind = value.WhichOneof("value")
    if kind is None or (kind == "suppressed" and value.suppressed not in _suppressions()):
        raise InputError("figure-missing", "A figure is neither stated nor withheld for a reason.")
    return bool(kind == "exact")


def _suppressions() -> set[int]:
    return set(figures_pb2.Suppression.values()) - {figures_pb2.SUPPRESSION_UNSPECIFIED}


def _check_count(count: Any, minimum: int) -> None:
    stated = count.exact if _check_stated(count) else count.noised.images
    if 0 < stated < minimum:
        raise InputError("group-size", "A count is below the site's own minimum group size.")


def _check_rate(rate: Any) -> None:
    if _check_stated(rate) and not (math.isfinite(rate.exact) and 0 <= rate.exact <= 1):
        raise InputError("rate-range", "A rate lies outside 0 to 1.")


def _check_noise(report: Any) -> None:
    """Refuse a report in which exact and noised figures stand side by side, or noise of which too little is said."""
    noise, unfinished = report.noise, report.outcome.unfinished
    kinds = Counter(figure.WhichOneof("value") for figure in (*_counts(report), *_rates(report)))
    if not report.HasField("noise"):
        is_sound = not kinds["noised"]
    else:
        is_used_up = noise.epsilon == noise.scale == 0 and not kinds["noised"]
        is_said = 0 < noise.epsilon < math.inf and 0 < noise.scale <= _LARGEST_SCALE
        is_sound = (
            (is_said or is_used_up)
            and noise.images_per_patient > 0
            and all(count.noised.draws for count in _counts(report) if count.HasField("noised"))
            and kinds["exact"] == unfinished.HasField("exact")  # it alone may be, and then it is 0
            and not unfinished.HasField("noised")
            and not unfinished.exact
        )
    if not is_sound:
        raise InputError("noise", "The report's noise is not what it says of it; update the site's medveil.")


def _check_entries(keys: list[int], *, forbidden: int | None) -> None:
    if len(set(keys)) < len(keys) or len(keys) > _MAX_CLASSES or forbidden in keys:
        raise InputError("repeated-entry", "A list names an entry twice, none, or too many.")


def _check_sums(report: Any) -> None:
    outcome = report.outcome
    by_reason = [entry.images for entry in report.quarantined_by_reason]
    by_class = [entry.verified for entry in report.verified_by_class]
    _check_sum(outcome.images, [getattr(outcome, name) for name in _OUTCOMES], whole=True)
    _check_sum(outcome.quarantined, by_reason, whole=bool(by_reason))
    _check_sum(outcome.verified, by_class, whole=bool(by_class))
    _check_sum(outcome.verified, report.psnr.bins, whole=False)  # a blank frame has no PSNR
    _check_sum(outcome.verified, report.ssim.bins, whole=False)


def _check_sum(total: Any, parts: Any, *, whole: bool) -> None:
    stated = [part.exact for part in parts if part.WhichOneof("value") == "exact"]
    if total.WhichOneof("value") != "exact":
        return
    everything_stated = whole and len(stated) == len(parts)
    if sum(stated) > total.exact or (everything_stated and sum(stated) != total.exact):
        raise InputError("sums", "The parts of a figure do not add up to it.")
