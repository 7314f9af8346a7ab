"""One campaign's job over this site's images, as a process of its own: it may be killed at any moment and run again.

    python -m medveil.agent.campaign_work.worker NUMBER POLICY

The job is the one of ``medveil-agent protect``. At its end the report is made from the job's ledger and put into the
book; sending it is `run`'s.
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
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.errors import ConfigurationError, ExitCode, MedveilError, RefusedError, StorageError

__all__ = ["release_folder", "report_bytes", "work"]


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
    payload = report_bytes(campaign, policy, release, campaign.report_sequence)
    if payload != campaign.report:  # a rerun that found nothing new repeats the report that was made
        sequence = campaign.report_sequence + 1
        payload = report_bytes(campaign, policy, release, sequence)
        book.report_ready(number, sequence, payload)
    book.work_is(number, WorkState.DONE)


def report_bytes(campaign: Campaign, policy: SitePolicy, release: Path, sequence: int) -> bytes:
    """Return the serialised report on a release, as the policy lets it out.

    Raises:
        ConfigurationError: ``no-egress-policy``.
    """
    from medveil.agent.victim_check import recorded_check  # SciPy: only a job that has run waits for it

    egress = policy.egress
    raised = None if egress is None else egress.raised_to(campaign.offer.minimum_group_size)
    with ledger_of(release, None) as ledger:
        message = report(
            figures_of(ledger, recorded_check(Workspace(release, private_beside(release)), ledger)),
            raised,
            campaign=campaign.number,
            offer_revision=campaign.offer.revision,
            sequence=sequence,
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
