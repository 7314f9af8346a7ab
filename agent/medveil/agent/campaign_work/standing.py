"""How this site stands, as one value that the screen and ``--format json`` both show.

Nothing here is remembered: images are counted in the job's ledger, bundles on the disk, and whether ``run`` is
alive is asked of the lock that it holds. What ``run`` alone knows (programs, lines, speed) it leaves in a file; the
file counts only while the lock is held.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from medveil.agent.campaign_work.book import Book, Campaign, book_path
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.campaign_work.places import bundles_folder, egress_log_file, federation_folder
from medveil.agent.campaign_work.worker import release_folder
from medveil.agent.joining import load_identity
from medveil.agent.ledger import Totals
from medveil.agent.policy import SitePolicy
from medveil.agent.release_job import ledger_of
from medveil.agent.reporting_log import log_bytes
from medveil.agent.reporting_policy import ReportingPolicy
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.disk import locked, make_private_folder, write_atomically
from medveil.models.errors import BusyError, ConfigurationError, InputError, StorageError
from medveil.protos.v1 import campaign_pb2
from medveil.protos.v1.conventions import expiry

__all__ = ["Work", "alone", "leave_news", "noise_budget", "site_value", "work_of"]

_LOCK: Final = "run.lock"
_NEWS: Final = "run.json"


@dataclass(frozen=True, slots=True)
class Work:
    """How far a campaign's job is, as its ledger has it.

    Attributes:
        totals: of the images; None: the job has not begun.
    """

    totals: Totals | None = None

    @property
    def images(self) -> int:
        """Images of the source."""
        return 0 if self.totals is None else self.totals.images

    @property
    def done(self) -> int:
        """Images in their final state."""
        return 0 if self.totals is None else self.totals.images - self.totals.unfinished


def work_of(policy: SitePolicy, campaign: Campaign) -> Work:
    """Read how far a campaign's job is; a job that is only just being created has not begun."""
    try:
        release = release_folder(policy, campaign)
        if not _is_begun(release):
            return Work()
        with ledger_of(release, None) as ledger:
            return Work(ledger.totals())
    except (InputError, ConfigurationError, StorageError):
        return Work()


def _is_begun(release: Path) -> bool:
    """Return whether a job's ledger is complete: opening it sooner, an onlooker would begin it itself."""
    path = Workspace(release, private_beside(release)).ledger_path
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as ledger:
            return ledger.execute("SELECT 1 FROM meta WHERE key = 'log_head'").fetchone() is not None
    except sqlite3.Error:
        return False


def alone() -> AbstractContextManager[None]:
    """Hold the lock of ``run``: one agent per folder. A killed one's lock is gone with it.

    Raises:
        BusyError: ``agent-busy``: another agent runs on this folder.
    """
    make_private_folder(federation_folder())
    return locked(
        federation_folder() / _LOCK,
        BusyError("agent-busy", "Another medveil-agent runs on this folder; stop it first."),
    )


def leave_news(news: Mapping[str, Any]) -> None:
    """Leave what only ``run`` knows where `site_value` finds it; on a full disk the older news stay."""
    with suppress(StorageError):  # nothing but the screen depends on it
        write_atomically(federation_folder() / _NEWS, json.dumps(news).encode("ascii"), mode=0o600)


def site_value(policy: SitePolicy, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> dict[str, Any]:
    """Return everything there is to say about this site, as JSON values.

    Raises:
        ConfigurationError: ``not-joined``.
        StorageError: the record of campaigns cannot be read.
    """
    identity = load_identity(federation_folder())
    left = expiry(identity.not_after, now())
    running = _is_running()
    news = _news() if running else {}
    bundles = Bundles(bundles_folder())
    with Book(book_path(federation_folder())) as book:
        campaigns = [_campaign_value(policy, book, bundles, campaign, news) for campaign in book.campaigns()]
        budget = noise_budget(policy.egress, book)
    return {
        "site": identity.site,
        "certificate_days": left.days,
        "certificate_notice": left.notice,
        "agent": "running" if running else "stopped",
        "coordinator": news.get("coordinator", {"last_accepted": None, "trouble": ""}),
        "gate": news.get("gate"),
        "programs": news.get("programs", []),
        "egress_log_bytes": log_bytes(egress_log_file()),
        "noise_budget": budget,
        "campaigns": campaigns,
        "at": now().isoformat(timespec="seconds"),
    }


def noise_budget(egress: ReportingPolicy | None, book: Book) -> dict[str, float | None] | None:
    """Return what all reports together may tell of one patient, and have told; None: reports are and were exact."""
    spent, noise = book.noise_spent(), None if egress is None else egress.noise
    if noise is None:
        return {"spent": float(spent), "left": None, "total": None, "per_report": None} if spent else None
    return {
        "spent": float(spent),
        "left": float(max(Decimal(0), noise.epsilon_total - spent)),
        "total": float(noise.epsilon_total),
        "per_report": float(noise.epsilon_per_report),
    }


def _campaign_value(
    policy: SitePolicy, book: Book, bundles: Bundles, campaign: Campaign, news: Mapping[str, Any]
) -> dict[str, Any]:
    offer = campaign.offer
    held = bundles.holds(offer.bundle_sha256)
    work = work_of(policy, campaign)
    totals = work.totals
    speed = news.get("images_per_s", {}).get(str(campaign.number))
    history = book.history(campaign.number)
    return {
        "campaign": campaign.number,
        "revision": offer.revision,
        "name": offer.name,
        "coordinator_state": campaign_pb2.CampaignState.Name(offer.state)
        .removeprefix("CAMPAIGN_STATE_")
        .lower(),
        "stage": str(campaign.stage(bundle_held=held)),
        "method": offer.method,
        "epsilon": offer.epsilon_255,
        "mask": offer.mask_ratio,
        "minimum_group_size": offer.minimum_group_size,
        "due": None if not offer.due_unix_s else datetime.fromtimestamp(offer.due_unix_s, UTC).isoformat(),
        "answer": None if campaign.answer is None else str(campaign.answer),
        "answered_by": campaign.answered_by,
        "answer_sent": campaign.answer_sent,
        "bundle": {
            "sha256": offer.bundle_sha256.hex(),
            "size_bytes": offer.bundle_size_bytes,
            "held_bytes": bundles.held_bytes(offer.bundle_sha256),
            "trusted": held,
            "trouble": campaign.bundle_trouble,
        },
        "images": work.images,
        "done": work.done,
        "verified": 0 if totals is None else totals.verified,
        "quarantined": 0 if totals is None else sum(totals.quarantined.values()),
        "not_protectable": 0 if totals is None else totals.not_protectable,
        "psnr_db": None if totals is None else totals.psnr_db_median,
        "psnr_db_min": None if totals is None else totals.psnr_db_min,
        "images_per_s": speed,
        "left_s": round((work.images - work.done) / speed) if speed else None,
        "trouble": campaign.work_trouble or campaign.report_trouble,
        "report": "accepted" if campaign.report_sent else "waiting" if campaign.report else None,
        "last_event": None if not history else {"time": history[-1][0], "event": history[-1][1]},
        "release": None if policy.campaigns is None else str(release_folder(policy, campaign)),
    }


def _is_running() -> bool:
    path = federation_folder() / _LOCK
    if not path.is_file():
        return False
    try:
        with alone():
            return False
    except BusyError:
        return True


def _news() -> dict[str, Any]:
    try:
        news: dict[str, Any] = json.loads((federation_folder() / _NEWS).read_bytes())
    except (OSError, ValueError):  # it has only just begun
        return {}
    return news
