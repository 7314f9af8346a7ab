"""A campaign as a value: who takes part, how far each site is, and what the reports add up to. Pure."""

from __future__ import annotations

from medveil.coordinator.campaign.aggregation import Aggregate, Noised, SiteFigures, Total, aggregate
from medveil.coordinator.campaign.lifecycle import (
    Campaign,
    Event,
    Plan,
    SiteStanding,
    Waiver,
    extended,
    moved,
    outstanding,
    replayed,
    reported,
    site_moved,
    waived,
)
from medveil.coordinator.campaign.states import CampaignState, SiteState, may_follow, site_may_follow

__all__ = [
    "Aggregate",
    "Campaign",
    "CampaignState",
    "Event",
    "Noised",
    "Plan",
    "SiteFigures",
    "SiteStanding",
    "SiteState",
    "Total",
    "Waiver",
    "aggregate",
    "extended",
    "may_follow",
    "moved",
    "outstanding",
    "replayed",
    "reported",
    "site_may_follow",
    "site_moved",
    "waived",
]
