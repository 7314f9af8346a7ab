"""Which state may follow which, for a campaign and for each site in it: two tables and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

__all__ = ["CampaignState", "SiteState", "may_follow", "site_may_follow"]


class CampaignState(StrEnum):
    """How far a campaign has come."""

    DRAFT = "draft"
    OFFERED = "offered"
    RUNNING = "running"
    PAUSED = "paused"
    SEALED = "sealed"
    """Complete; its result stands."""
    ABORTED = "aborted"


class SiteState(StrEnum):
    """How far a site has come within one campaign."""

    INVITED = "invited"
    JOINED = "joined"
    """Its certificate is signed."""
    OFFERED = "offered"
    ACCEPTED = "accepted"
    DECLINED = "declined"
    PROTECTING = "protecting"
    REPORTED = "reported"
    VERIFIED = "verified"
    """The coordinator has checked the report: nothing is unfinished."""


_CAMPAIGN: Final[Mapping[CampaignState, frozenset[CampaignState]]] = {
    CampaignState.DRAFT: frozenset({CampaignState.OFFERED, CampaignState.ABORTED}),
    CampaignState.OFFERED: frozenset({CampaignState.RUNNING, CampaignState.ABORTED}),
    CampaignState.RUNNING: frozenset({CampaignState.PAUSED, CampaignState.SEALED, CampaignState.ABORTED}),
    CampaignState.PAUSED: frozenset({CampaignState.RUNNING, CampaignState.ABORTED}),
    CampaignState.SEALED: frozenset(),
    CampaignState.ABORTED: frozenset(),
}

# There is no state "failed" and none for lateness: what a site sends late is still good.
_SITE: Final[Mapping[SiteState, frozenset[SiteState]]] = {
    SiteState.INVITED: frozenset({SiteState.JOINED}),
    SiteState.JOINED: frozenset({SiteState.OFFERED}),
    SiteState.OFFERED: frozenset({SiteState.ACCEPTED, SiteState.DECLINED}),
    SiteState.ACCEPTED: frozenset({SiteState.PROTECTING, SiteState.DECLINED}),
    SiteState.DECLINED: frozenset({SiteState.OFFERED, SiteState.ACCEPTED}),
    SiteState.PROTECTING: frozenset({SiteState.REPORTED, SiteState.DECLINED}),
    # Back to work: new images came in, or the coordinator found something unfinished.
    SiteState.REPORTED: frozenset({SiteState.VERIFIED, SiteState.PROTECTING}),
    SiteState.VERIFIED: frozenset({SiteState.PROTECTING}),
}


def may_follow(current: CampaignState, following: CampaignState) -> bool:
    """Return whether a campaign may go from one state to another."""
    return following in _CAMPAIGN[current]


def site_may_follow(current: SiteState, following: SiteState) -> bool:
    """Return whether a site may go from one state to another."""
    return following in _SITE[current]
