"""The worker protects this site's images for a campaign, and what it reports comes from its ledger."""

from __future__ import annotations

import json

import pytest

from medveil.agent.campaign_work import standing, worker
from medveil.agent.campaign_work.book import Book, Stage, WorkState
from medveil.agent.campaign_work.places import federation_folder
from medveil.agent.campaign_work.standing import alone, leave_news, work_of
from medveil.agent.campaign_work.worker import main, work
from medveil.agent.policy import load_policy
from medveil.models.errors import BusyError, ExitCode, RefusedError, StorageError
from medveil.protos.v1 import report_pb2


def test_the_report_counts_what_the_ledger_verified_and_a_rerun_repeats_it_byte_for_byte(
    book, bundles, accepted, tmp_path
):
    work(1, accepted, book, bundles)
    done = book.campaign(1)
    assert (done.work, done.stage(bundle_held=True)) == (WorkState.DONE, Stage.REPORTING)
    report = report_pb2.Report.FromString(done.report)
    assert (report.sequence, report.outcome.images.exact, report.outcome.unfinished.exact) == (1, 9, 0)
    # One quarantined image is fewer than the minimum group, and the verified ones would give it away.
    assert report.outcome.quarantined.HasField("suppressed")
    assert report.outcome.verified.HasField("suppressed")
    totals = work_of(load_policy(accepted), done).totals
    assert (totals.verified, sum(totals.quarantined.values())) == (8, 1)
    copies = list((tmp_path / "releases/campaign-1-1").rglob("*.png"))
    assert len(copies) == 8

    book.work_is(1, WorkState.RUNNING)  # as after a kill between report and end
    work(1, accepted, book, bundles)
    assert (book.campaign(1).report, book.campaign(1).report_sequence) == (done.report, 1)

    (tmp_path / "images" / "clear" / "broken.png").unlink()
    book.work_is(1, WorkState.RUNNING)
    work(1, accepted, book, bundles)
    newer = report_pb2.Report.FromString(book.campaign(1).report)
    assert (newer.sequence, newer.outcome.verified.exact, newer.outcome.images.exact) == (2, 8, 8)


@pytest.mark.parametrize("state", ["OFFERED", "PAUSED", "ABORTED"])
def test_nothing_begins_unless_the_coordinator_said_so(book, bundles, accepted, offer, tmp_path, state):
    book.offered(offer(state=state))
    with pytest.raises(RefusedError, match="not-now"):
        work(1, accepted, book, bundles)
    assert not (tmp_path / "releases").exists()


def test_nothing_begins_without_the_stewards_word(book, bundles, accepted, offer, tmp_path):
    book.offered(offer(state="RUNNING", revision=2))
    with pytest.raises(RefusedError, match="not-now"):
        work(1, accepted, book, bundles)
    assert not (tmp_path / "releases").exists()


def test_two_agents_do_not_share_a_folder_and_a_killed_ones_lock_is_gone():
    with alone(), pytest.raises(BusyError, match="agent-busy"), alone():
        pass
    with alone():
        pass


def test_a_disk_that_is_full_for_the_sites_own_records_too_ends_the_job_with_its_code(
    write_policy, monkeypatch
):
    def full(*_: object, **__: object) -> None:
        raise StorageError("disk-full", "The disk is full.")

    policy = str(write_policy())
    assert main(["1", policy]) == ExitCode.CONFIGURATION  # no such campaign
    monkeypatch.setattr(worker, "work", full)
    monkeypatch.setattr(Book, "work_is", full)
    assert main(["1", policy]) == ExitCode.STORAGE


def test_news_that_cannot_be_left_end_nothing(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise StorageError("disk-full", "The disk is full.")

    with alone():
        leave_news({"at": 1})
        monkeypatch.setattr(standing, "write_atomically", full)
        leave_news({"at": 2})
    assert json.loads((federation_folder() / "run.json").read_bytes()) == {"at": 1}
