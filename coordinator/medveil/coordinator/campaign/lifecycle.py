"""A campaign is its plan and the list of what happened to it; every state follows from that list.

The functions that change something (`moved`, `site_moved`, `waived`) check the change and return the new
value, whose last event the store appends. `replayed` makes the same value from the stored list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from medveil.coordinator.campaign.states import CampaignState, SiteState, may_follow, site_may_follow
from medveil.models.errors import ConfigurationError

__all__ = [
    "Campaign",
    "Event",
    "Plan",
    "SiteStanding",
    "Waiver",
    "extended",
    "moved",
    "outstanding",
    "replayed",
    "reported",
    "site_moved",
    "waived",
]

_WAIVED: Final = "waived"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided before the campaign began; it does not change.

    Attributes:
        number: 1, 2, 3, ...
        name: for people.
        sites: names of all sites that take part.
        due: when a site counts as late (with time zone); None: never.
    """

    number: int
    name: str
    sites: tuple[str, ...]
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        time: when, with time zone.
        site: to which site; None: to the campaign itself.
        outcome: the state entered, or ``"waived"``.
        reason: why, in one sentence of the coordinator's.
        by: who waived; empty for a transition.
    """

    time: datetime
    site: str | None
    outcome: str
    reason: str
    by: str = ""


@dataclass(frozen=True, slots=True)
class Waiver:
    """A person's word that the campaign may complete without a site."""

    by: str
    reason: str
    time: datetime


@dataclass(frozen=True, slots=True)
class SiteStanding:
    """How one site stands, since when and why."""

    state: SiteState
    since: datetime | None
    reason: str
    waiver: Waiver | None = None

    @property
    def counts_as_done(self) -> bool:
        """Whether the campaign need not wait for this site."""
        return self.state is SiteState.VERIFIED or self.waiver is not None


@dataclass(frozen=True, slots=True)
class Campaign:
    """A campaign at one moment.

    Attributes:
        plan: what was decided.
        state: where it stands.
        sites: every site of the plan, by name.
        events: everything that happened, oldest first.
    """

    plan: Plan
    state: CampaignState
    sites: Mapping[str, SiteStanding]
    events: tuple[Event, ...] = ()

    @classmethod
    def drafted(cls, plan: Plan) -> Campaign:
        """Return a campaign to which nothing has happened yet.

        Raises:
            ConfigurationError: ``campaign-sites``: no site, or one named twice.
        """
        if not plan.sites or len(set(plan.sites)) < len(plan.sites):
            raise ConfigurationError("campaign-sites", "A campaign needs at least one site, each named once.")
        sites = {site: SiteStanding(SiteState.INVITED, None, "") for site in sorted(plan.sites)}
        return cls(plan, CampaignState.DRAFT, sites)

    @property
    def is_over(self) -> bool:
        """Whether nothing more can happen to it."""
        return self.state in (CampaignState.SEALED, CampaignState.ABORTED)

    def is_late(self, site: str, now: datetime) -> bool:
        """Return whether a site is past the due time and not done; that is no failure."""
        return self.plan.due is not None and now > self.plan.due and not self.sites[site].counts_as_done


def outstanding(campaign: Campaign) -> tuple[str, ...]:
    """Return the sites that the campaign still waits for; empty: it is complete."""
    return tuple(site for site, standing in campaign.sites.items() if not standing.counts_as_done)


def moved(campaign: Campaign, state: CampaignState, time: datetime, reason: str) -> Campaign:
    """Return the campaign in another state.

    Raises:
        ConfigurationError: ``campaign-state``: the table has no such step; ``campaign-incomplete``: it
            cannot be sealed while a site is neither verified nor waived by name.
    """
    if not may_follow(campaign.state, state):
        raise ConfigurationError(
            "campaign-state", f"A campaign that is {campaign.state} cannot become {state}."
        )
    if state is CampaignState.SEALED and (missing := outstanding(campaign)):
        raise ConfigurationError(
            "campaign-incomplete",
            f"The campaign still waits for {', '.join(missing)}; wait, or waive each of them by name.",
        )
    event = Event(time, None, state, reason)
    return replace(campaign, state=state, events=(*campaign.events, event))


def site_moved(campaign: Campaign, site: str, state: SiteState, time: datetime, reason: str) -> Campaign:
    """Return the campaign with one site in another state. A waiver stays: the site's work counts all the same.

    Raises:
        ConfigurationError: ``unknown-site``, ``site-state`` or ``campaign-over``.
    """
    standing = _standing(campaign, site)
    _refuse_if_over(campaign)
    if not site_may_follow(standing.state, state):
        raise ConfigurationError(
            "site-state", f"The site {site} is {standing.state} and cannot become {state}."
        )
    following = replace(standing, state=state, since=time, reason=reason)
    return _with_site(campaign, site, following, Event(time, site, state, reason))


def reported(campaign: Campaign, site: str, time: datetime, *, finished: bool) -> Campaign:
    """Return the campaign after a checked report of a site that has accepted, early or late.

    Args:
        campaign: before the report.
        site: who sent it.
        time: when it came.
        finished: the report states that no image is unfinished; only then the site is verified.

    Raises:
        ConfigurationError: ``campaign-over``; ``not-accepted``: the site has not accepted the offer.
    """
    _refuse_if_over(campaign)
    state = _standing(campaign, site).state
    if state in (SiteState.INVITED, SiteState.JOINED, SiteState.OFFERED, SiteState.DECLINED):
        raise ConfigurationError("not-accepted", "The site has not accepted this campaign's offer.")
    if state is not SiteState.PROTECTING:
        campaign = site_moved(campaign, site, SiteState.PROTECTING, time, "a report shows work")
    campaign = site_moved(campaign, site, SiteState.REPORTED, time, "report received")
    if finished:
        campaign = site_moved(campaign, site, SiteState.VERIFIED, time, "report checked, nothing unfinished")
    return campaign


def waived(campaign: Campaign, site: str, by: str, time: datetime, reason: str) -> Campaign:
    """Return the campaign with the word of a named person that it may complete without a site.

    Raises:
        ConfigurationError: ``unknown-site``; ``campaign-over``; ``waiver``: it has no name or no reason.
    """
    standing = _standing(campaign, site)
    if not by.strip() or not reason.strip():
        raise ConfigurationError("waiver", "A waiver needs the name of who gives it, and a reason.")
    _refuse_if_over(campaign)
    following = replace(standing, waiver=Waiver(by, reason, time))
    return _with_site(campaign, site, following, Event(time, site, _WAIVED, reason, by))


def replayed(plan: Plan, events: Iterable[Event]) -> Campaign:
    """Return the campaign that a list of events leads to.

    Raises:
        ConfigurationError: the list is not one that the functions of this module could have made.
    """
    return extended(Campaign.drafted(plan), events)


def extended(campaign: Campaign, events: Iterable[Event]) -> Campaign:
    """Return the campaign after further events.

    Raises:
        ConfigurationError: they cannot follow.
    """
    for event in events:
        if event.site is None:
            campaign = moved(campaign, CampaignState(event.outcome), event.time, event.reason)
        elif event.outcome == _WAIVED:
            campaign = waived(campaign, event.site, event.by, event.time, event.reason)
        else:
            state = SiteState(event.outcome)
            campaign = site_moved(campaign, event.site, state, event.time, event.reason)
    return campaign


def _refuse_if_over(campaign: Campaign) -> None:
    if campaign.is_over:
        raise ConfigurationError(
            "campaign-over", f"The campaign is {campaign.state}; nothing more can change."
        )


def _standing(campaign: Campaign, site: str) -> SiteStanding:
    try:
        return campaign.sites[site]
    except KeyError as exc:
        raise ConfigurationError("unknown-site", "This site takes no part in the campaign.") from exc


def _with_site(campaign: Campaign, site: str, standing: SiteStanding, event: Event) -> Campaign:
    sites = {**campaign.sites, site: standing}
    return replace(campaign, sites=sites, events=(*campaign.events, event))
