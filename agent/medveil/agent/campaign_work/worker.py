"""One campaign's job over this site's images, as a process of its own: it may be killed at any moment and run again.

    python -m medveil.agent.campaign_work.worker NUMBER POLICY

The job is the one of ``medveil-agent protect``. At its end the report is made from the job's ledger and put into the
book; sending it is `run`'s.

A report with noise is made once for each revision of an offer and repeated ever after: the mean of many draws over
the same images would be exact.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from medveil.agent.campaign_work.book import Book, Campaign, WorkState, book_path
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.campaign_work.places import bundles_folder, federation_folder
from medveil.agent.egress import report
from medveil.agent.policy import SitePolicy, load_policy
from medveil.agent.preparation import Wishes
from medveil.agent.release_job import Call, ledger_of, make_release
from medveil.agent.reporting import figures_of
from medveil.agent.reporting_figures import Figures
from medveil.agent.reporting_noise import Draw, secret_draw
from medveil.agent.reporting_policy import ReportingPolicy
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.bundle import open_bundle
from medveil.models.errors import ConfigurationError, ExitCode, MedveilError, RefusedError, StorageError
from medveil.protos.v1 import report_pb2

__all__ = ["is_told_as_allowed", "release_folder", "work"]


def release_folder(policy: SitePolicy, campaign: Campaign) -> Path:
    """Return where a campaign's release lies; a new revision of the offer is another release.

    Raises:
        ConfigurationError: ``no-campaigns-policy``.
    """
    if policy.campaigns is None:
        raise ConfigurationError(
            "no-campaigns-policy", "The policy names no images for campaigns: add a table [campaigns]."
        )
    return policy.campaigns.out / f"campaign-{campaign.number}-{campaign.offer.revision}"


def work(number: int, policy_file: Path, book: Book, bundles: Bundles) -> None:
    """Protect this site's images for one campaign, or go on with it, and make the report.

    Raises:
        ConfigurationError: ``no-campaign``, or as `make_release`.
        MedveilError: as `make_release`.
    """
    campaign = book.campaign(number)
    if campaign is None:
        raise ConfigurationError("no-campaign", "No such campaign was offered here.")
    policy = load_policy(policy_file)
    release = release_folder(policy, campaign)
    if not campaign.may_begin(bundle_held=bundles.holds(campaign.offer.bundle_sha256)):
        raise RefusedError("not-now", "This campaign may not begin here: not accepted, not started, or over.")
    assert policy.campaigns is not None  # noqa: S101
    policy.campaigns.out.mkdir(parents=True, exist_ok=True)
    book.work_is(number, WorkState.RUNNING)
    bundle = bundles.path(campaign.offer.bundle_sha256)
    make_release(Call(policy.campaigns.source, release, None, None, Wishes(bundle, policy_file)))
    figures = _figures(release, bundle)
    if policy.egress is not None and policy.egress.noise is not None:
        _report_with_noise(campaign, figures, policy.egress, book)
    else:
        _report_exactly(campaign, figures, policy.egress, book)
    book.work_is(number, WorkState.DONE)


def is_told_as_allowed(campaign: Campaign, egress: ReportingPolicy | None) -> bool:
    """Return whether the report that was made has noise, if the policy asks for noise."""
    may_be_exact = egress is None or egress.noise is None
    return (
        may_be_exact
        or campaign.report is None
        or report_pb2.Report.FromString(campaign.report).HasField("noise")
    )


def _figures(release: Path, bundle: Path) -> Figures:
    from medveil.agent.victim_check import recorded_check  # SciPy: only a job that has run waits for it

    classes = len(open_bundle(bundle, trusted=None).manifest.taxonomy.classes)
    with ledger_of(release, None) as ledger:
        check = recorded_check(Workspace(release, private_beside(release)), ledger)
        return figures_of(ledger, check, classes=classes)


def _report_exactly(campaign: Campaign, figures: Figures, egress: ReportingPolicy | None, book: Book) -> None:
    """Make the report, unless the one that was made says the same."""
    if _payload(campaign, figures, egress, campaign.report_sequence) != campaign.report:
        sequence = campaign.report_sequence + 1
        book.report_ready(campaign.number, sequence, _payload(campaign, figures, egress, sequence))


def _report_with_noise(campaign: Campaign, figures: Figures, egress: ReportingPolicy, book: Book) -> None:
    """Make the report, unless one was made; when the budget is used up, one without figures."""
    if campaign.report is not None and is_told_as_allowed(campaign, egress):
        return
    assert egress.noise is not None  # noqa: S101
    is_paid = egress.noise.affords(book.noise_spent())
    sequence = campaign.report_sequence + 1
    payload = _payload(campaign, figures, egress, sequence, secret_draw if is_paid else None)
    book.report_ready(campaign.number, sequence, payload, noise=egress.noise if is_paid else None)


def _payload(
    campaign: Campaign,
    figures: Figures,
    egress: ReportingPolicy | None,
    sequence: int,
    draw: Draw | None = None,
) -> bytes:
    """Return the serialised report, as the policy lets it out.

    Raises:
        ConfigurationError: ``no-egress-policy``.
    """
    message = report(
        figures,
        None if egress is None else egress.raised_to(campaign.offer.minimum_group_size),
        campaign=campaign.number,
        offer_revision=campaign.offer.revision,
        sequence=sequence,
        draw=draw,
    )
    return bytes(message.SerializeToString(deterministic=True))


def main(arguments: list[str]) -> int:
    """Work on one campaign; the exit code is that of `protect`, and the book says why it stopped."""
    number = int(arguments[0])
    with Book(book_path(federation_folder())) as book:
        try:
            work(number, Path(arguments[1]), book, Bundles(bundles_folder()))
        except MedveilError as error:
            print(f"{error.public} [{error.code}] {error.private}", file=sys.stderr)  # noqa: T201
            with suppress(StorageError):  # the disk may be the same; `run` sees that the job ended, and how
                book.work_is(number, WorkState.STOPPED, error.code)
            return error.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
