"""What the coordinator's orders do at a site, and that every outcome is a number."""

from __future__ import annotations

import dataclasses

import pytest

from medveil.agent.campaign_work import bundles as bundles_module
from medveil.agent.campaign_work.book import Answer, Stage, WorkState
from medveil.agent.campaign_work.orders import carry_out
from medveil.models.errors import ConfigurationError, StorageError
from medveil.protos.fleet import Code

HALF = 140_000


def test_an_offer_waits_for_the_steward_and_the_same_one_again_changes_nothing(
    book, bundles, offer, state_order, write_policy
):
    for _ in range(2):
        ack = carry_out(state_order(offer()), b"", book, bundles, write_policy())
        assert (ack.code, ack.held_bytes) == (Code.DONE, 0)
    campaign = book.campaign(1)
    assert campaign.stage(bundle_held=False) is Stage.WAITING_FOR_STEWARD
    assert [event for _, event in book.history(1)] == ["offered, revision 1"]


def test_a_bundle_goes_on_where_it_broke_off_and_counts_only_once_it_is_trusted(
    book, bundles, bundle, offer, state_order, part_order, write_policy
):
    policy = write_policy()
    carry_out(state_order(offer()), b"", book, bundles, policy)
    first = carry_out(part_order(offer(), 0), bundle[:HALF], book, bundles, policy)
    assert (first.code, first.held_bytes) == (Code.DONE, HALF)
    again = carry_out(part_order(offer(), 0), bundle[:HALF], book, bundles, policy)
    assert (again.code, again.held_bytes) == (Code.OFFSET, HALF)
    assert carry_out(state_order(offer()), b"", book, bundles, policy).held_bytes == HALF
    assert not bundles.holds(offer().bundle_sha256)
    last = carry_out(part_order(offer(), HALF), bundle[HALF:], book, bundles, policy)
    assert (last.code, last.held_bytes) == (Code.DONE, len(bundle))
    assert bundles.path(offer().bundle_sha256).read_bytes() == bundle
    more = carry_out(part_order(offer(), 0), bundle, book, bundles, policy)
    assert (more.code, more.held_bytes) == (Code.DONE, len(bundle))


def test_a_bundle_that_was_whole_when_the_app_was_killed_is_checked_by_the_next_order(
    book, bundles, bundle, offer, state_order, write_policy
):
    policy = write_policy()
    carry_out(state_order(offer()), b"", book, bundles, policy)
    bundles.append(offer().bundle_sha256, len(bundle), 0, bundle)
    ack = carry_out(state_order(offer()), b"", book, bundles, policy)
    assert (ack.code, ack.held_bytes) == (Code.DONE, len(bundle))


def tampered(bundle: bytes) -> bytes:
    return bundle[:-1] + bytes([bundle[-1] ^ 1])


def with_another_part(bundle):
    middle = len(bundle) // 2
    return bundle[:middle] + bytes([bundle[middle] ^ 1]) + bundle[middle + 1 :]


def test_a_changed_bundle_is_thrown_away_and_refused_by_name_until_the_steward_asks_again(
    book, bundles, bundle, offer, state_order, part_order, write_policy
):
    policy, asked = write_policy(), offer()
    carry_out(state_order(asked), b"", book, bundles, policy)
    ack = carry_out(part_order(asked, 0), tampered(bundle), book, bundles, policy)
    assert (ack.code, ack.held_bytes) == (Code.BUNDLE_DIGEST, 0)
    assert book.campaign(1).stage(bundle_held=False) is Stage.BUNDLE_REFUSED
    assert carry_out(state_order(asked), b"", book, bundles, policy).code is Code.BUNDLE_DIGEST
    assert carry_out(part_order(asked, 0), bundle, book, bundles, policy).code is Code.BUNDLE_DIGEST
    book.answer(1, Answer.ACCEPTED, "steward")
    assert carry_out(part_order(asked, 0), bundle, book, bundles, policy).code is Code.DONE


@pytest.mark.parametrize(
    ("make", "signer", "codes"),
    [
        (tampered, None, {Code.BUNDLE_SIGNATURE}),
        (with_another_part, None, {Code.BUNDLE_SIGNATURE}),
        (lambda bundle: b"no bundle at all" * 9, None, {Code.BUNDLE_SIGNATURE, Code.BUNDLE_REFUSED}),
        (lambda bundle: bundle, f"ed25519:{'-'.join(['AAAA'] * 8)}", {Code.BUNDLE_SIGNATURE}),
    ],
    ids=[
        "offered with its true digest, but changed",
        "and changed inside",
        "something else",
        "signed by somebody else",
    ],
)
def test_a_bundle_that_cannot_be_trusted_never_becomes_one(
    book, bundles, bundle, offer, state_order, part_order, write_policy, make, signer, codes
):
    policy = write_policy() if signer is None else write_policy(signer)
    data = make(bundle)
    asked = offer(data)
    carry_out(state_order(asked), b"", book, bundles, policy)
    ack = carry_out(part_order(asked, 0), data, book, bundles, policy)
    assert ack.code in codes
    assert ack.held_bytes == 0
    assert not bundles.holds(asked.bundle_sha256)
    assert book.campaign(1).bundle_trouble


def test_a_full_disk_is_no_verdict_on_the_bundle(
    book, bundles, bundle, offer, state_order, part_order, write_policy, monkeypatch
):
    policy = write_policy()
    carry_out(state_order(offer()), b"", book, bundles, policy)

    def full(*_: object) -> None:
        raise StorageError("disk-full", "The disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(bundles_module, "check_free", full)
        ack = carry_out(part_order(offer(), 0), bundle, book, bundles, policy)
    assert (ack.code, ack.held_bytes) == (Code.STORAGE, 0)
    assert carry_out(part_order(offer(), 0), bundle, book, bundles, policy).code is Code.DONE


def test_a_part_of_an_unknown_campaign_or_revision_is_not_stored(
    book, bundles, bundle, offer, state_order, part_order, write_policy
):
    policy = write_policy()
    assert carry_out(part_order(offer(), 0), bundle, book, bundles, policy).code is Code.CAMPAIGN
    carry_out(state_order(offer()), b"", book, bundles, policy)
    assert carry_out(part_order(offer(revision=2), 0), bundle, book, bundles, policy).code is Code.CAMPAIGN
    assert bundles.held_bytes(offer().bundle_sha256) == 0


def test_a_declined_campaign_gets_no_bundle(
    book, bundles, bundle, offer, state_order, part_order, write_policy
):
    policy = write_policy()
    carry_out(state_order(offer()), b"", book, bundles, policy)
    book.answer(1, Answer.DECLINED, "steward")
    assert carry_out(part_order(offer(), 0), bundle, book, bundles, policy).code is Code.POLICY
    assert bundles.held_bytes(offer().bundle_sha256) == 0


def test_a_method_that_the_policy_forbids_is_recorded_and_never_accepted_by_the_policy(
    book, bundles, offer, state_order, write_policy
):
    policy = write_policy(methods='["em"]', approve="always")
    assert carry_out(state_order(offer()), b"", book, bundles, policy).code is Code.POLICY
    assert book.campaign(1).answer is None


def test_a_policy_may_approve_beforehand_and_a_newer_revision_is_answered_anew(
    book, bundles, offer, state_order, write_policy
):
    carry_out(state_order(offer()), b"", book, bundles, write_policy(approve="always"))
    campaign = book.campaign(1)
    assert (campaign.answer, campaign.answered_by) == (Answer.ACCEPTED, "policy")
    carry_out(state_order(offer(revision=2)), b"", book, bundles, write_policy(approve="ask"))
    assert (book.campaign(1).answer, book.campaign(1).offer.revision) == (None, 2)
    late_mail = state_order(offer(revision=1, name="old"))
    assert carry_out(late_mail, b"", book, bundles, write_policy(approve="ask")).code is Code.DONE
    assert (book.campaign(1).answer, book.campaign(1).offer.revision) == (None, 2)


def test_an_order_that_contradicts_its_offer_is_no_message(book, bundles, offer, state_order, write_policy):
    order = state_order(offer())
    for change in ({"campaign": 2}, {"revision": 9}, {"bundle_sha256": bytes(32)}, {"offer": b"\xff"}):
        ack = carry_out(dataclasses.replace(order, **change), b"", book, bundles, write_policy())
        assert ack.code is Code.MESSAGE
    assert book.campaigns() == []


def test_stages_follow_from_answer_state_bundle_and_work(book, offer):
    book.offered(offer())
    book.answer(1, Answer.ACCEPTED, "steward")
    assert book.campaign(1).stage(bundle_held=True) is Stage.WAITING_FOR_COORDINATOR
    book.offered(offer(state="RUNNING"))
    assert book.campaign(1).stage(bundle_held=False) is Stage.WAITING_FOR_COORDINATOR
    assert book.campaign(1).stage(bundle_held=True) is Stage.READY
    book.work_is(1, WorkState.RUNNING)
    assert book.campaign(1).stage(bundle_held=True) is Stage.PROTECTING
    book.offered(offer(state="PAUSED"))
    assert not book.campaign(1).may_begin(bundle_held=True)
    book.work_is(1, WorkState.STOPPED, "disk-full")
    assert book.campaign(1).stage(bundle_held=True) is Stage.STOPPED
    book.report_ready(1, 1, b"report")
    book.work_is(1, WorkState.DONE)
    assert book.campaign(1).stage(bundle_held=True) is Stage.REPORTING
    book.offered(offer(state="SEALED"))
    assert book.campaign(1).stage(bundle_held=True) is Stage.REPORTING
    book.report_taken(1)
    assert book.campaign(1).stage(bundle_held=True) is Stage.REPORTED


def test_an_answer_that_the_coordinator_knows_is_not_taken_back(book, offer):
    with pytest.raises(ConfigurationError, match="no-campaign"):
        book.answer(1, Answer.ACCEPTED, "steward")
    book.offered(offer())
    book.answer(1, Answer.DECLINED, "steward")
    book.answer(1, Answer.ACCEPTED, "steward")
    book.answer_sent(1)
    with pytest.raises(ConfigurationError, match="answered"):
        book.answer(1, Answer.DECLINED, "steward")
    assert book.campaign(1).answer is Answer.ACCEPTED
