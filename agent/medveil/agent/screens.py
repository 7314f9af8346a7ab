"""What the steward sees: tables of the same data that ``--format json`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from medveil.models.cli_support import printable

__all__ = ["ProgressWatch", "budget_line", "listing_table", "plain", "summary_table", "trust_line"]


class ProgressWatch:
    """Shows a run on a progress bar: images, images per second, time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, total: int, done: int) -> None:
        """Start the bar; images that were finished earlier don't count into the speed."""
        text = f"protecting ({done} done before)" if done else "protecting"
        self._task = self._progress.add_task(text, total=total - done)

    def advance(self, images: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.advance(self._task, images)


def plain(value: object) -> Text:
    """Return text without markup and without control characters: a file name must not steer the terminal."""
    return Text(printable(str(value)))


def summary_table(report: Mapping[str, Any]) -> Table:
    """Return the final table of `protect`."""
    table = Table(title="medveil protect", show_header=False, title_justify="left")
    for name, value in _summary_rows(report):
        table.add_row(name, plain(value))
    return table


def _summary_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "images", str(report["images"])
    yield "verified", str(report["verified"])
    yield "quarantined", str(report["quarantined"])
    for reason, count in report["quarantined_by_reason"].items():
        yield f"  {reason}", str(count)
    yield "not protectable", str(report["not_protectable"])
    if report["ignored_files"]:
        yield "ignored (hidden and system files)", str(report["ignored_files"])
    if report["verified"]:
        yield "PSNR", f"median {report['psnr_db']:.1f} dB, lowest {report['psnr_db_min']:.1f} dB"
        yield "largest change", f"{report['epsilon_max']:g}/255 (budget {report['epsilon']:g}/255)"
        yield "changed pixels", f"{report['changed_share']:.1%} (mask {report['mask']:g})"
    if report["guessed_windows"]:
        yield "display window guessed", f"{report['guessed_windows']} images; set presets in the policy"
    yield "status", str(report["protection"])
    yield "", str(report["proxy_check"])
    yield "bundle", str(report["bundle_sha256"])
    yield "signed by", trust_line(report["signer"], trusted=report["signer_is_trusted"])
    yield "surrogates", str(report["surrogates"])
    speed = report["images_per_s"]
    now = f"{report['finished_now']} images opened in {report['seconds']:.1f} s"
    yield "this run", now if speed is None else f"{now}, {speed:.1f} images/s"
    yield "may be shared", str(report["release"]) if report["verified"] else "nothing"
    yield "stays here", str(report["private"])
    if report["quarantined"] or report["not_protectable"]:
        yield "what was left out, and why", f"medveil-agent quarantine list {report['release']}"
    if report["contact_sheet"]:
        yield "contact sheet (shows originals)", str(report["contact_sheet"])
    yield "exit code", f"{report['exit_code']}: {report['exit_meaning']}"


def trust_line(signer: str, *, trusted: bool) -> str:
    """Return how far a signer is trusted, in words that tell the steward what to do."""
    return f"{signer} (trusted by the policy)" if trusted else f"{signer}: compare it with your coordinator"


def budget_line(budget: Mapping[str, float | None]) -> str:
    """Return how much of the noise budget is used, and what that means for the next report."""
    spent, left, per_report = budget["spent"], budget["left"], budget["per_report"]
    if left is None or per_report is None:
        return f"epsilon {spent:g} spent; the policy asks for no noise any more, so reports are exact"
    if left < per_report:
        after = (
            f"{left:g} left is less than a report takes ({per_report:g}): the next will have no figures. "
            "epsilon_total in the policy's [egress.noise] allows more"
        )
    else:
        after = f"{left:g} left, {per_report:g} for each report"
    return f"epsilon {spent:g} of {budget['total']:g} spent; {after}"


def listing_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a plain table of text."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(plain(value) for value in row))
    return table
