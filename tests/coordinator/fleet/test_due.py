"""Who needs an order: whoever doesn't know how things stand, and not before it makes sense to ask again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from medveil.coordinator.campaign import Campaign, CampaignState, Plan, SiteState, moved, site_moved
from medveil.coordinator.fleet.due import due_sites
from medveil.coordinator.store import Delivery
from medveil.protos.fleet import Code

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SIZE = 1000
TOLD = Delivery(NOW, 0, 1, "offered", int(Code.DONE), SIZE, NOW)


def offered(*sites: str) -> Campaign:
    campaign = Campaign.drafted(Plan(1, "chest", sites))
    campaign = moved(campaign, CampaignState.OFFERED, NOW, "")
    for site in sites:
        campaign = site_moved(campaign, site, SiteState.JOINED, NOW, "")
        campaign = site_moved(campaign, site, SiteState.OFFERED, NOW, "")
    return campaign


def due(campaign: Campaign, deliveries: dict[str, Delivery], after: timedelta = timedelta()) -> set[str]:
    return set(due_sites(campaign, 1, SIZE, deliveries, NOW + after))


def test_a_site_that_was_never_told_is_due() -> None:
    assert due(offered("a", "b"), {}) == {"a", "b"}


def test_a_site_that_knows_and_holds_everything_is_not_due() -> None:
    assert due(offered("a"), {"a": TOLD}) == set()


def test_a_draft_and_a_site_that_has_not_joined_are_told_nothing() -> None:
    draft = Campaign.drafted(Plan(1, "chest", ("a",)))
    assert due(draft, {}) == set()
    assert due(moved(draft, CampaignState.OFFERED, NOW, ""), {}) == set()


def test_every_change_of_the_campaign_makes_its_sites_due() -> None:
    campaign = site_moved(offered("a"), "a", SiteState.ACCEPTED, NOW, "")
    told = TOLD
    for state in (CampaignState.RUNNING, CampaignState.PAUSED, CampaignState.RUNNING, CampaignState.ABORTED):
        campaign = moved(campaign, state, NOW, "")
        assert due(campaign, {"a": told}) == {"a"}
        told = Delivery(NOW, 0, 1, state, int(Code.DONE), SIZE, NOW)
        assert due(campaign, {"a": told}) == set()


def test_a_new_revision_makes_a_site_due() -> None:
    assert due_sites(offered("a"), 2, SIZE, {"a": TOLD}, NOW) == ("a",)


def test_a_site_that_holds_part_of_the_bundle_is_due_until_the_campaign_is_over() -> None:
    part = Delivery(NOW, 0, 1, "offered", int(Code.DONE), SIZE - 1, NOW)
    campaign = offered("a")
    assert due(campaign, {"a": part}) == {"a"}
    ended = moved(campaign, CampaignState.ABORTED, NOW, "")
    told = Delivery(NOW, 0, 1, "aborted", int(Code.DONE), SIZE - 1, NOW)
    assert due(ended, {"a": told}) == set()


def test_a_site_that_declined_is_sent_no_bundle() -> None:
    campaign = site_moved(offered("a"), "a", SiteState.DECLINED, NOW, "")
    assert due(campaign, {"a": Delivery(NOW, 0, 1, "offered", int(Code.DONE), 0, NOW)}) == set()


@pytest.mark.parametrize(("attempts", "pause_s"), [(1, 5), (2, 10), (4, 40), (7, 300), (100_000, 300)])
def test_a_silent_site_is_asked_ever_more_seldom_but_never_given_up(attempts: int, pause_s: float) -> None:
    silent = Delivery(NOW, attempts)
    assert due(offered("a"), {"a": silent}, timedelta(seconds=pause_s - 0.1)) == set()
    assert due(offered("a"), {"a": silent}, timedelta(seconds=pause_s)) == {"a"}


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.DONE])
def test_a_refusal_is_tried_again_within_the_hour_and_never_at_once(code: Code) -> None:
    refused = Delivery(NOW, 0, 1, "offered", int(code), 0, NOW)
    assert due(offered("a"), {"a": refused}, timedelta(seconds=30)) == set()
    assert due(offered("a"), {"a": refused}, timedelta(hours=1)) == {"a"}
