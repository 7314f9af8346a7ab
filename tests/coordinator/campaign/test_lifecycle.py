from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medveil.coordinator.campaign import (
    Campaign,
    CampaignState,
    Plan,
    SiteState,
    may_follow,
    moved,
    outstanding,
    replayed,
    site_may_follow,
    site_moved,
    waived,
)
from medveil.models.errors import ConfigurationError

START = datetime(2026, 11, 21, tzinfo=UTC)
PLAN = Plan(1, "chest", ("a", "b", "c"), due=START + timedelta(days=7))
PATH = (
    SiteState.JOINED,
    SiteState.OFFERED,
    SiteState.ACCEPTED,
    SiteState.PROTECTING,
    SiteState.REPORTED,
    SiteState.VERIFIED,
)


def running() -> Campaign:
    campaign = moved(Campaign.drafted(PLAN), CampaignState.OFFERED, START, "offer")
    return moved(campaign, CampaignState.RUNNING, START, "first site accepted")


def verified(campaign: Campaign, site: str) -> Campaign:
    for state in PATH:
        campaign = site_moved(campaign, site, state, START, "step")
    return campaign


@given(st.lists(st.tuples(st.sampled_from([None, *PLAN.sites]), st.integers(0, 8))))
def test_any_history_replays_to_the_same_campaign_and_never_takes_a_step_outside_the_tables(
    steps: list[tuple[str | None, int]],
) -> None:
    campaign = Campaign.drafted(PLAN)
    for hour, (site, choice) in enumerate(steps):
        time = START + timedelta(hours=hour)
        before = campaign
        try:
            if site is None:
                wanted = list(CampaignState)[choice % len(CampaignState)]
                campaign = moved(campaign, wanted, time, "r")
                assert may_follow(before.state, campaign.state)
            elif choice == 8:
                campaign = waived(campaign, site, "Dr B", time, "closed")
            else:
                campaign = site_moved(campaign, site, list(SiteState)[choice], time, "r")
                assert site_may_follow(before.sites[site].state, campaign.sites[site].state)
        except ConfigurationError:
            assert campaign is before
    assert replayed(PLAN, campaign.events) == campaign
    assert set(campaign.sites) == set(PLAN.sites)
    if campaign.state is CampaignState.SEALED:
        sealing = next(i for i, e in enumerate(campaign.events) if e.outcome == CampaignState.SEALED)
        assert not outstanding(replayed(PLAN, campaign.events[:sealing]))


def test_a_campaign_is_not_sealed_while_a_site_is_missing_and_the_site_is_named() -> None:
    campaign = verified(verified(running(), "a"), "b")
    with pytest.raises(ConfigurationError, match="waits for c") as refused:
        moved(campaign, CampaignState.SEALED, START, "done")
    assert refused.value.code == "campaign-incomplete"
    campaign = waived(campaign, "c", "Dr B", START, "scanner sold")
    assert moved(campaign, CampaignState.SEALED, START, "done").sites["c"].waiver is not None


@pytest.mark.parametrize(("by", "reason"), [("", "closed"), ("Dr B", " ")])
def test_a_waiver_without_a_name_or_a_reason_is_refused(by: str, reason: str) -> None:
    with pytest.raises(ConfigurationError):
        waived(running(), "c", by, START, reason)


def test_a_late_site_is_late_and_its_report_still_counts() -> None:
    campaign = running()
    after = START + timedelta(days=8)
    assert campaign.is_late("a", after)
    assert not campaign.is_late("a", START)
    campaign = verified(campaign, "a")
    assert not campaign.is_late("a", after)


@pytest.mark.parametrize("over", [CampaignState.SEALED, CampaignState.ABORTED])
def test_nothing_follows_the_end(over: CampaignState) -> None:
    assert not any(may_follow(over, state) for state in CampaignState)


def test_an_unknown_site_and_a_double_one_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no part"):
        site_moved(running(), "elsewhere", SiteState.JOINED, START, "r")
    with pytest.raises(ConfigurationError, match="each named once"):
        Campaign.drafted(Plan(1, "n", ("a", "a")))
