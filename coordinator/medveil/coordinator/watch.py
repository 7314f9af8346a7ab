"""How a campaign stands, as one value that the table, the live screen and the JSON all show.

Is it working, how far, and if not: why? Nothing here is guessed; a figure that the store does not hold is None.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medveil.coordinator import operations
from medveil.coordinator.campaign import Aggregate, aggregate
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
    return {
        "campaign": number,
        "name": status.name,
        "state": _word(campaign_pb2.CampaignState, "CAMPAIGN_STATE_", status.state),
        "complete": status.complete,
        "at": now.astimezone(UTC).isoformat(timespec="seconds"),
        "sites": [
            _site_value(store, site, now) | _delivery_value(deliveries.get(site.site), bundle_bytes)
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
        "images_per_s": beat and round(beat.images_per_s, 1),
        "since_last_work_s": beat and beat.since_last_work_s,
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


def _totals_value(total: Aggregate) -> dict[str, Any]:
    return {
        "sites": list(total.sites),
        "counts": {k: {"known": t.known, "withheld_by": t.withheld_by} for k, t in total.counts.items()},
        "rates": dict(total.rates),
        "histograms": {
            name: [{"known": t.known, "withheld_by": t.withheld_by} for t in bins]
            for name, bins in total.histograms.items()
        },
    }


def _word(enum: Any, prefix: str, value: int) -> str:
    return str(enum.Name(value)).removeprefix(prefix).lower().replace("_", "-")


# On a screen
# ------------------------------------------------------------------------------------------------

_COLUMNS: Final[tuple[tuple[str, Callable[[dict[str, Any]], str]], ...]] = (
    ("site", lambda s: s["site"]),
    ("state", lambda s: s["state"] + (" (waived)" if s["waived"] else " (late)" if s["late"] else "")),
    ("doing", lambda s: "silent" if s["silent"] else s["activity"] or "-"),
    ("why not", lambda s: s["trouble"] or s["refusal"] or "-"),
    ("bundle", lambda s: "-" if s["bundle_held"] is None else f"{s['bundle_held']:.0%}"),
    ("done", lambda s: f"{_shown(s['done'])} / {_shown(s['images'])}"),
    ("images/s", lambda s: _plain(s["images_per_s"])),
    ("left", lambda s: "-" if s["left_s"] is None else str(timedelta(seconds=s["left_s"]))),
    ("last contact", lambda s: s["last_contact"] or "never"),
    ("certificate", lambda s: _certificate(s["certificate_days"], s["certificate_notice"])),
    ("bytes sent", lambda s: _plain(s["egress_bytes"])),
    ("reports", lambda s: str(s["reports"])),
)


def as_screen(value: dict[str, Any]) -> RenderableType:
    """Return what `status_value` says, for a terminal or a plain file."""
    complete = "complete" if value["complete"] else "not complete"
    head = Text(
        f"{value['name']} (campaign {value['campaign']}): {value['state']}, {complete}; {value['at']}"
    )
    table = Table(*(name for name, _ in _COLUMNS))
    for site in value["sites"]:
        table.add_row(*(Text(show(site)) for _, show in _COLUMNS))
    counts = value["totals"]["counts"]
    told = ", ".join(f"{name} {_total_shown(counts[name])}" for name in _SHOWN_TOTALS if name in counts)
    return Group(head, table, Text(f"reported: {told or 'nothing yet'}"))


_SHOWN_TOTALS: Final = ("images", "verified", "not_protectable", "quarantined", "unfinished")


def _total_shown(total: dict[str, int]) -> str:
    withheld = f" + withheld by {total['withheld_by']}" if total["withheld_by"] else ""
    return f"{total['known']:,}{withheld}"


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


def _plain(value: object) -> str:
    return "-" if value is None else f"{value:,}"
