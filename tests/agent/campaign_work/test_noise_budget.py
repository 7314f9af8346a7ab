"""A report with noise is paid for once, before it can leave, and repeated byte for byte; then there are none."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from decimal import Decimal
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medveil.agent.campaign_work import reporting
from medveil.agent.campaign_work.book import Answer, Book, Stage, WorkState, book_path
from medveil.agent.campaign_work.places import egress_log_file, federation_folder
from medveil.agent.campaign_work.reporting import Reporter
from medveil.agent.campaign_work.worker import work
from medveil.agent.policy import load_policy
from medveil.agent.reporting import beat
from medveil.agent.reporting_log import EgressLog
from medveil.agent.reporting_policy import NoisePolicy
from medveil.models.errors import RefusedError
from medveil.protos.v1 import campaign_pb2, figures_pb2, report_pb2, status_pb2

NOISE = "[egress.noise]\nepsilon_per_report = 0.5\nepsilon_total = 1.2\n"


@pytest.fixture
def noisy(accepted):
    """A policy that asks for noise, and pays for two reports."""
    accepted.write_text(accepted.read_text() + NOISE)
    return accepted


def report_of(book: Book) -> report_pb2.Report:
    return report_pb2.Report.FromString(book.campaign(1).report)


def test_a_rerun_repeats_the_noise_and_pays_nothing_even_when_the_images_have_changed(
    book, bundles, noisy, tmp_path
):
    work(1, noisy, book, bundles)
    first = book.campaign(1).report
    assert (report_of(book).noise.epsilon, book.noise_spent()) == (0.5, Decimal("0.5"))
    assert report_of(book).outcome.unfinished.exact == 0
    (tmp_path / "images" / "clear" / "broken.png").unlink()
    book.work_is(1, WorkState.RUNNING)
    work(1, noisy, book, bundles)
    assert (book.campaign(1).report, book.noise_spent()) == (first, Decimal("0.5"))


def test_offers_without_end_bring_no_more_figures_than_the_budget_pays_for(
    book, bundles, noisy, offer, tmp_path
):
    """A coordinator that wants the mean of many draws offers the same again and again."""
    told = []
    for revision in (1, 2, 3, 4):
        book.offered(offer(state="RUNNING", revision=revision))
        book.answer(1, Answer.ACCEPTED, "steward")
        work(1, noisy, book, bundles)
        told.append(report_of(book))
    assert [report.noise.epsilon for report in told] == [0.5, 0.5, 0, 0]
    assert [report.sequence for report in told] == [1, 2, 3, 4]
    for report in told[2:]:
        assert report.outcome.images.suppressed == figures_pb2.SUPPRESSION_BUDGET
        assert not report.verified_by_class
    assert book.noise_spent() == Decimal("1.0")


@settings(max_examples=25)  # each writes to a disk and waits for it
@given(
    st.lists(st.decimals("0.001", "3", places=3), min_size=1, max_size=12),
    st.decimals("0.001", "6", places=3),
)
def test_what_is_spent_never_exceeds_the_total(tmp_path_factory, costs, total):
    with Book(tmp_path_factory.mktemp("book") / "campaigns.sqlite") as book:
        book.offered(campaign_pb2.Offer(campaign=1, revision=1))
        for sequence, cost in enumerate(costs, 1):
            noise = NoisePolicy(epsilon_per_report=min(cost, total), epsilon_total=total)
            before, spent, report = book.campaign(1).report, book.noise_spent(), b"%d" % sequence
            with suppress(RefusedError):
                book.report_ready(1, sequence, report, noise=noise)
            is_kept = spent + noise.epsilon_per_report <= total
            assert book.campaign(1).report == (report if is_kept else before)
            assert book.noise_spent() <= total


def test_two_who_both_could_afford_the_last_report_do_not_both_get_it(book, offer):
    noise = NoisePolicy(epsilon_per_report=1, epsilon_total=1)
    book.offered(offer())
    with Book(book_path(federation_folder())) as other:
        assert noise.affords(book.noise_spent())
        assert noise.affords(other.noise_spent())
        book.report_ready(1, 1, b"first", noise=noise)
        with pytest.raises(RefusedError, match="noise-budget"):
            other.report_ready(1, 2, b"second", noise=noise)
    assert (book.campaign(1).report, book.noise_spent()) == (b"first", 1)


KILLED = """
import os, signal, sys
from medveil.agent.campaign_work import worker
from medveil.agent.campaign_work.book import Book, WorkState

die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "after":
    whole = Book.work_is
    Book.work_is = lambda self, n, state, *_: die() if state is WorkState.DONE else whole(self, n, state)
else:
    Book._note = lambda self, n, event: die() if event.startswith("report") else None
worker.main(["1", sys.argv[1]])
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_beside_the_payment_costs_nothing_twice_and_sends_nothing_bare(book, bundles, noisy, moment):
    """Before: within the transaction that pays and keeps. After: paid and kept, and the job not yet marked done."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(noisy), moment], check=False)
    assert done.returncode == -9
    kept = book.campaign(1).report
    assert (kept is None, book.noise_spent()) == (
        (True, 0) if moment == "before" else (False, Decimal("0.5"))
    )
    work(1, noisy, book, bundles)
    assert book.noise_spent() == Decimal("0.5")
    assert report_of(book).HasField("noise")
    assert kept in (None, book.campaign(1).report)


def test_an_exact_report_from_before_the_policy_asked_for_noise_is_not_sent_but_made_anew(
    book, bundles, accepted, monkeypatch
):
    work(1, accepted, book, bundles)
    assert not report_of(book).HasField("noise")
    book.answer_sent(1)
    accepted.write_text(accepted.read_text() + NOISE)
    policy = load_policy(accepted)
    sent = []

    class Door:
        def __init__(self, *_):
            pass

        def send(self, method, message):
            sent.append(message)
            return method.reply()

    monkeypatch.setattr(reporting, "open_channel", lambda *_: nullcontext())
    monkeypatch.setattr(reporting, "Door", Door)
    identity = SimpleNamespace(authority_pem=b"", key_pem=b"", chain_pem=b"")
    monkeypatch.setattr(reporting, "load_identity", lambda folder: identity)
    with EgressLog(egress_log_file()) as log:
        idle = beat(policy.egress, activity=status_pb2.ACTIVITY_IDLE)
        reporter = Reporter(federation_folder(), policy, log, lambda identity: idle)
        reporter.start()
        limit = time.monotonic() + 60
        while not sent:
            assert time.monotonic() < limit
            time.sleep(0.02)
        reporter.stop()
    assert {type(message) for message in sent} <= {status_pb2.Beat, campaign_pb2.ListOffersRequest}
    stopped = book.campaign(1)
    assert (stopped.stage(bundle_held=True), stopped.work_trouble) == (Stage.STOPPED, "report-without-noise")
    work(1, accepted, book, bundles)
    assert (report_of(book).HasField("noise"), report_of(book).sequence) == (True, 2)
    assert book.campaign(1).work is WorkState.DONE
