"""Which sites need an order now: a comparison of what is so with what each site has last confirmed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

from medveil.coordinator.campaign import Campaign, CampaignState, SiteState
from medveil.coordinator.store import Delivery
from medveil.protos.fleet import Code

__all__ = ["due_sites", "needs_bundle", "needs_state"]

_FIRST_PAUSE: Final = timedelta(seconds=5)
_LONGEST_PAUSE: Final = timedelta(minutes=5)
"""Between two orders to a site that doesn't answer; our choice: it costs a process here and one there each time."""
_SOON: Final = timedelta(minutes=1)
"""After an answer that time mends: a full disk, a busy folder."""
_SELDOM: Final = timedelta(hours=1)
"""After an answer that only a person mends: a bundle or a policy that doesn't fit."""

_GO_ON: Final = frozenset({None, Code.DONE})
_PASSING: Final = frozenset(
    {Code.CAMPAIGN, Code.OFFSET, Code.BUNDLE_DIGEST, Code.STORAGE, Code.BUSY, Code.UNEXPECTED}
)
_OPEN: Final = frozenset({CampaignState.OFFERED, CampaignState.RUNNING, CampaignState.PAUSED})
_ABSENT: Final = frozenset({SiteState.INVITED, SiteState.JOINED})
_NEVER_SENT: Final = Delivery(datetime.min, 0)


def due_sites(
    campaign: Campaign, revision: int, bundle_bytes: int, deliveries: Mapping[str, Delivery], now: datetime
) -> tuple[str, ...]:
    """Return the sites to which an order should go now, by name.

    Args:
        campaign: as it stands.
        revision: of its offer.
        bundle_bytes: size of its bundle.
        deliveries: what each site has confirmed.
        now: the moment, with time zone.
    """
    return tuple(
        site
        for site in campaign.sites
        if (
            needs_state(campaign, site, revision, deliveries.get(site, _NEVER_SENT))
            or needs_bundle(campaign, site, bundle_bytes, deliveries.get(site, _NEVER_SENT))
        )
        and (site not in deliveries or _has_rested(deliveries[site], now))
    )


def needs_state(campaign: Campaign, site: str, revision: int, delivery: Delivery) -> bool:
    """Return whether a site that was offered the campaign doesn't know how it stands."""
    if campaign.sites[site].state in _ABSENT or campaign.state is CampaignState.DRAFT:
        return False
    told = (delivery.revision, delivery.state) == (revision, campaign.state)
    return not told or (delivery.code not in _GO_ON and not campaign.is_over)


def needs_bundle(campaign: Campaign, site: str, bundle_bytes: int, delivery: Delivery) -> bool:
    """Return whether a site that may still take part doesn't hold the whole bundle."""
    if campaign.state not in _OPEN or campaign.sites[site].state in _ABSENT | {SiteState.DECLINED}:
        return False
    return delivery.held_bytes < bundle_bytes


def _has_rested(delivery: Delivery, now: datetime) -> bool:
    # Either way: a clock that was set back must not silence the coordinator until it has caught up.
    return abs(now - delivery.tried) >= _pause(delivery)


def _pause(delivery: Delivery) -> timedelta:
    if delivery.attempts:
        # The exponent is bounded: a site may be away for years.
        return min(_FIRST_PAUSE * (1 << min(delivery.attempts - 1, 16)), _LONGEST_PAUSE)
    if delivery.code in _GO_ON:
        return timedelta()
    return _SOON if delivery.code in _PASSING else _SELDOM
