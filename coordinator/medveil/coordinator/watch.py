"""How a campaign stands, as one value that the table, the live screen and the JSON all show.

Is it working, how far, and if not: why? Nothing here is guessed; a figure that the store does not hold is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medveil.coordinator import operations
from medveil.coordinator.campaign import Aggregate, Total, aggregate
from medveil.coordinator.reports import figures
from medveil.coordinator.store import Delivery, Store
from medveil.protos.fleet import Code
from medveil.protos.v1 import campaign_pb2, figures_pb2, report_pb2, status_pb2
from medveil.protos.v1.conventions import expiry

__all__ = ["as_screen", "status_value"]

_SILENT_AFTER: Final = timedelta(seconds=60)
"""Six missed beats; from then on the screen says that the site is silent, and since when."""


def status_value(store: Store, number: int, now: datetime) -> dict[str, Any]:
    """Return everything that is known about a campaign, as JSON values.

    Raises:
        ConfigurationError: ``no-campaign``.
    """
    status = operations.campaign_status(store, number, now)
    deliveries = store.deliveries(number)
    bundle_bytes = operations.current_offer(store, number).bundle_size_bytes
    epsilons = _epsilons(store, number)
    return {
        "campaign": number,
        "name": status.name,
        "state": _word(campaign_pb2.CampaignState, "CAMPAIGN_STATE_", status.state),
        "complete": status.complete,
        "at": now.astimezone(UTC).isoformat(timespec="seconds"),
        "sites": [
            _site_value(store, site, now)
            | _delivery_value(deliveries.get(site.site), bundle_bytes)
            | {"report_epsilon": epsilons.get(site.site)}
            for site in status.sites
        ],
        "totals": _totals_value(_aggregate(store, number)),
    }


def _site_value(store: Store, site: status_pb2.SiteStatus, now: datetime) -> dict[str, Any]:
    beat = site.last_beat if site.HasField("last_beat") else None
    contact = site.last_contact_unix_s or None
    silent = contact is not None and now.timestamp() - contact > _SILENT_AFTER.total_seconds()
    issued = [row for row in store.certificates(site.site) if not row.revoked]
    left = expiry(issued[0].not_after, now) if issued else None
    pace = beat if beat is not None and beat.images.suppressed != figures_pb2.SUPPRESSION_NOISE else None
    return {
        "site": site.site,
        "state": _word(campaign_pb2.SiteState, "SITE_STATE_", site.state),
        "late": site.late,
        "waived": site.waived,
        "reports": site.reports,
        "last_contact": None if contact is None else datetime.fromtimestamp(contact, UTC).isoformat(),
        "silent": silent,
        "activity": beat and _word(status_pb2.Activity, "ACTIVITY_", beat.activity),
        "trouble": beat and (_word(status_pb2.Trouble, "TROUBLE_", beat.trouble) if beat.trouble else None),
        "images": beat and _count_value(beat.images),
        "done": beat and _count_value(beat.done),
        "images_per_s": pace and round(pace.images_per_s, 1),
        "since_last_work_s": pace and pace.since_last_work_s,
        "left_s": beat and _time_left(beat),
        "egress_bytes": beat and beat.egress_bytes,
        "certificate_days": left and left.days,
        "certificate_notice": left and left.notice,
    }


def _delivery_value(delivery: Delivery | None, bundle_bytes: int) -> dict[str, Any]:
    """Return what the site itself has confirmed over Flower; what was only sent counts for nothing."""
    if delivery is None or delivery.code is None:
        return {"confirmed_state": None, "bundle_held": None, "refusal": None}
    code = Code(delivery.code)
    return {
        "confirmed_state": delivery.state,
        "bundle_held": delivery.held_bytes / bundle_bytes if bundle_bytes else None,
        "refusal": None if code is Code.DONE else code.name.lower().replace("_", "-"),
    }


def _time_left(beat: Any) -> int | None:
    both = beat.images.WhichOneof("value") == beat.done.WhichOneof("value") == "exact"
    if not both or beat.images_per_s <= 0:
        return None
    return int(max(0, beat.images.exact - beat.done.exact) / beat.images_per_s)


def _count_value(count: Any) -> dict[str, Any] | None:
    """Return a count so that a withheld one cannot be read as zero."""
    kind = count.WhichOneof("value")
    if kind is None:
        return None
    if kind == "exact":
        return {"exact": count.exact}
    return {"suppressed": _word(figures_pb2.Suppression, "SUPPRESSION_", count.suppressed)}


def _aggregate(store: Store, number: int) -> Aggregate:
    # What is stored was checked when it came; a threshold that rose since must not make it unreadable.
    return aggregate(figures(r.site, report_pb2.Report.FromString(r.payload)) for r in store.reports(number))


def _epsilons(store: Store, number: int) -> dict[str, float]:
    """Return by site the privacy loss of its newest report, if that has noise; 0: its noise budget is used up."""
    newest = {row.site: row for row in sorted(store.reports(number), key=lambda row: row.sequence)}
    reports = {site: report_pb2.Report.FromString(row.payload) for site, row in newest.items()}
    return {site: report.noise.epsilon for site, report in reports.items() if report.HasField("noise")}


def _totals_value(total: Aggregate) -> dict[str, Any]:
    return {
        "sites": list(total.sites),
        "counts": {name: _total_value(count) for name, count in total.counts.items()},
        "rates": dict(total.rates),
        "histograms": {
            name: [_total_value(bin_) for bin_ in bins] for name, bins in total.histograms.items()
        },
    }


def _total_value(total: Total) -> dict[str, int]:
    return {"known": total.known, "withheld_by": total.withheld_by, "half_interval": total.half_interval}


def _word(enum: Any, prefix: str, value: int) -> str:
    return str(enum.Name(value)).removeprefix(prefix).lower().replace("_", "-")


# On a screen
# ------------------------------------------------------------------------------------------------

_COLUMNS: Final[tuple[tuple[str, Callable[[dict[str, Any]], str]], ...]] = (
    ("site", lambda s: s["site"]),
    ("state", lambda s: s["state"] + (" (waived)" if s["waived"] else " (late)" if s["late"] else "")),
    ("doing", lambda s: "silent" if s["silent"] else _words(s["activity"])),
    ("why not", lambda s: s["trouble"] or s["refusal"] or "-"),
    ("bundle", lambda s: "-" if s["bundle_held"] is None else f"{s['bundle_held']:.0%}"),
    ("done", lambda s: _done(s["done"], s["images"])),
    ("images/s", lambda s: _plain(s["images_per_s"])),
    ("left", lambda s: "-" if s["left_s"] is None else str(timedelta(seconds=s["left_s"]))),
    ("last contact", lambda s: _ago(s["contact_age_s"])),
    ("cert.", lambda s: _certificate(s["certificate_days"], s["certificate_notice"])),
    ("bytes sent", lambda s: _plain(s["egress_bytes"])),
    ("reports", lambda s: str(s["reports"])),
)


def as_screen(value: dict[str, Any]) -> RenderableType:
    """Return what `status_value` says, for a terminal or a plain file."""
    complete = "complete" if value["complete"] else "not complete"
    head = Text(
        f"{value['name']} (campaign {value['campaign']}): {value['state']}, {complete}; {value['at']}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, _ in _COLUMNS:
        # On a narrow screen longer, never cut.
        table.add_column(name, overflow="fold", min_width=_WORD if name in {"state", "doing"} else None)
    for site in value["sites"]:
        aged = {**site, "contact_age_s": _age_s(site["last_contact"], value["at"])}
        table.add_row(*(Text(show(aged)) for _, show in _COLUMNS))
    counts = value["totals"]["counts"]
    sites = len(value["totals"]["sites"])
    told = ", ".join(
        f"{name} {_total_shown(counts[name], sites)}" for name in _SHOWN_TOTALS if name in counts
    )
    return Group(head, table, Text(f"reported: {told or 'nothing yet'}"), *map(Text, _noise_lines(value)))


def _noise_lines(value: dict[str, Any]) -> Iterator[str]:
    epsilons = {site["site"]: site["report_epsilon"] for site in value["sites"]}
    blurred = [f"{site} (epsilon {epsilon:g})" for site, epsilon in epsilons.items() if epsilon]
    if blurred:
        yield f"± is half the 95 % interval of the noise that these sites add: {', '.join(blurred)}"
    silent = [site for site, epsilon in epsilons.items() if epsilon == 0]
    if silent:
        yield f"noise budget used up, so no figures: {', '.join(silent)}"


_WORD: Final = len("protecting")
_UNITS: Final = ((86_400, "days"), (3_600, "h"), (60, "min"))
"""From two of a unit on it is used."""
_SHOWN_TOTALS: Final = ("images", "verified", "not_protectable", "quarantined", "unfinished")


def _total_shown(total: dict[str, int], sites: int) -> str:
    if total["withheld_by"] == sites:
        return "withheld"
    withheld = f" + withheld by {total['withheld_by']}" if total["withheld_by"] else ""
    noise = f" ± {total['half_interval']:,}" if total["half_interval"] else ""
    return f"{max(0, total['known']):,}{noise}{withheld}"  # noise can turn a count negative


def _certificate(days: int | None, notice: int | None) -> str:
    if days is None:
        return "-"
    if notice == 0:
        return "expired: invite it again"
    return f"{days} days" + ("" if notice is None else f" (fewer than {notice})")


def _shown(count: dict[str, Any] | None) -> str:
    if count is None:
        return "-"
    return f"{count['exact']:,}" if "exact" in count else "withheld"


def _done(done: dict[str, Any] | None, images: dict[str, Any] | None) -> str:
    shown = _shown(done), _shown(images)
    return shown[0] if shown[0] == shown[1] and "exact" not in (images or {}) else " / ".join(shown)


def _words(code: str | None) -> str:
    """Return a code as words, which a narrow column can break."""
    return "-" if code is None else code.replace("-", " ")


def _age_s(time: str | None, now: str) -> int | None:
    if time is None:
        return None
    return max(0, int((datetime.fromisoformat(now) - datetime.fromisoformat(time)).total_seconds()))


def _ago(seconds: int | None) -> str:
    if seconds is None:
        return "never"
    for length_s, unit in _UNITS:
        if seconds >= 2 * length_s:
            return f"{seconds // length_s} {unit} ago"
    return f"{seconds} s ago"


def _plain(value: object) -> str:
    return "-" if value is None else f"{value:,}"
