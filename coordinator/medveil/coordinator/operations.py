"""What the coordinator does, one function per step: the command line and the gRPC service both call these.

Every function takes the moment as an argument, reads the store, lets the pure lifecycle decide, and writes once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from medveil.coordinator.campaign import (
    Campaign,
    CampaignState,
    SiteState,
    moved,
    outstanding,
    reported,
    site_moved,
    waived,
)
from medveil.coordinator.pki import (
    Authority,
    Caller,
    Issued,
    Role,
    Token,
    accept_file,
    new_token,
    parse_request,
    parse_request_file,
    token_hash,
)
from medveil.coordinator.reports import canonical, parse_report
from medveil.coordinator.store import Store
from medveil.models.errors import ConfigurationError, RefusedError
from medveil.protos.v1 import campaign_pb2, report_pb2, status_pb2
from medveil.protos.v1.conventions import SITE_NAME, expiry

__all__ = [
    "Joined",
    "answer_offer",
    "approve_file",
    "campaign_status",
    "create_campaign",
    "current_offer",
    "identify",
    "invite",
    "join",
    "list_offers",
    "move_campaign",
    "offer_campaign",
    "renew",
    "take_beat",
    "take_report",
    "waive_site",
]

_INVITATION_LIFE: Final = timedelta(days=7)
_BEAT_S: Final = 10
"""Seconds between two beats of a site; our choice: a watcher sees trouble within a breath."""
_RENEW_NOTICE_DAYS: Final = 30


@dataclass(frozen=True, slots=True)
class Joined:
    """A site with its certificate."""

    site: str
    issued: Issued


# Enrolment
# ------------------------------------------------------------------------------------------------


def invite(store: Store, site: str, now: datetime) -> Token:
    """Make the one-time token of a site.

    Raises:
        ConfigurationError: ``site-name``.
    """
    if not SITE_NAME.fullmatch(site):
        raise ConfigurationError(
            "site-name",
            "A site's name has up to 63 lower-case letters, digits and dashes; choose such a one.",
        )
    token = new_token()
    store.invite(site, token.hash, now + _INVITATION_LIFE)
    return token


def join(store: Store, authority: Authority, token: str, request_der: bytes, now: datetime) -> Joined:
    """Sign the key of a site that holds an invitation.

    Raises:
        RefusedError: ``signing-request`` (the token stays valid), ``token-unknown``, ``token-replayed``,
            ``token-expired``.
    """
    request = parse_request(request_der)
    key = request.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    site = store.redeem(token_hash(token), hashlib.sha256(key).hexdigest(), now)
    return _enrolled(store, authority, site, request, now)


def approve_file(store: Store, authority: Authority, site: str, request_text: str, now: datetime) -> str:
    """Sign the request file of a site without a connection, whose key the operator has compared by phone.

    Returns:
        The text of the file that goes back.

    Raises:
        RefusedError: ``signing-request``.
        ConfigurationError: ``site-name``.
    """
    request = parse_request_file(request_text)
    if not SITE_NAME.fullmatch(site):
        raise ConfigurationError("site-name", "This is no site name.")
    store.enrol(site, now)
    return accept_file(site, _enrolled(store, authority, site, request, now).issued)


def renew(store: Store, authority: Authority, caller: Caller, request_der: bytes, now: datetime) -> Issued:
    """Sign a new key for whoever proved with the old one who it is; both are valid for a while.

    Raises:
        RefusedError: ``signing-request``.
    """
    return _signed(store, authority, caller.role, caller.name, parse_request(request_der), now)


def identify(store: Store, caller: Caller, wanted: Role, now: datetime) -> str:
    """Return the caller's name if its certificate is one of ours, in force, and for the right role.

    Raises:
        RefusedError: ``certificate-unknown``, ``certificate-revoked``, ``certificate-expired`` or ``role``.
    """
    row = store.certificate(caller.serial)
    if row is None or (row.role, row.name) != (caller.role, caller.name):
        raise RefusedError("certificate-unknown", "This coordinator has not signed the client certificate.")
    if row.revoked:
        raise RefusedError(
            "certificate-revoked", "The client certificate was revoked; ask for an invitation."
        )
    if row.not_after <= now:
        raise RefusedError(
            "certificate-expired", "The client certificate has expired; ask for an invitation."
        )
    if caller.role is not wanted:
        raise RefusedError("role", f"This call is for the role {wanted} only.")
    return caller.name


def _enrolled(
    store: Store, authority: Authority, site: str, request: x509.CertificateSigningRequest, now: datetime
) -> Joined:
    issued = _signed(store, authority, Role.SITE, site, request, now)
    for number in store.campaign_numbers():
        if store.campaign(number).sites.keys() >= {site}:
            _change(store, number, lambda campaign: _arrived(campaign, site, now))
    return Joined(site, issued)


def _signed(
    store: Store,
    authority: Authority,
    role: Role,
    name: str,
    request: x509.CertificateSigningRequest,
    now: datetime,
) -> Issued:
    issued = authority.issue_client(request, role, name, now)
    store.add_certificate(issued.serial, role, name, issued.not_after)
    return issued


# Campaigns
# ------------------------------------------------------------------------------------------------


def create_campaign(
    store: Store, offer: campaign_pb2.Offer, sites: tuple[str, ...], due: datetime | None, now: datetime
) -> Campaign:
    """Store a draft; sites that have joined already stand as joined.

    Raises:
        ConfigurationError: ``minimum-group-size``: unset means refused, not "one"; ``campaign-exists``;
            ``campaign-sites``; ``site-name``.
    """
    if offer.minimum_group_size < 1:
        raise ConfigurationError("minimum-group-size", "A campaign needs a minimum group size of at least 1.")
    if unfit := [site for site in sites if not SITE_NAME.fullmatch(site)]:
        raise ConfigurationError("site-name", f"No site name: {', '.join(unfit)}.")
    campaign = store.create_campaign(offer.name, sites, due, offer.SerializeToString(deterministic=True))
    here = [site for site in sites if store.enrolled(site)]

    def with_joined(campaign: Campaign) -> Campaign:
        for site in here:
            campaign = _arrived(campaign, site, now)
        return campaign

    return _change(store, campaign.plan.number, with_joined)


def offer_campaign(store: Store, number: int, now: datetime, reason: str) -> Campaign:
    """Offer a draft to every site that has joined; one that joins later is offered it then.

    Raises:
        ConfigurationError: ``no-campaign`` or ``campaign-state``.
    """

    def offered(campaign: Campaign) -> Campaign:
        campaign = moved(campaign, CampaignState.OFFERED, now, reason)
        for site, standing in campaign.sites.items():
            if standing.state is SiteState.JOINED:
                campaign = site_moved(campaign, site, SiteState.OFFERED, now, reason)
        return campaign

    return _change(store, number, offered)


def move_campaign(store: Store, number: int, state: CampaignState, now: datetime, reason: str) -> Campaign:
    """Pause, resume, seal or abort a campaign.

    Raises:
        ConfigurationError: ``no-campaign``, ``campaign-state`` or ``campaign-incomplete``.
    """
    return _change(store, number, lambda campaign: moved(campaign, state, now, reason))


def waive_site(store: Store, number: int, site: str, by: str, now: datetime, reason: str) -> Campaign:
    """Record a person's word that the campaign may complete without a site.

    Raises:
        ConfigurationError: ``no-campaign``, ``unknown-site`` or ``waiver``.
    """
    return _change(store, number, lambda campaign: waived(campaign, site, by, now, reason))


def list_offers(store: Store, site: str) -> campaign_pb2.ListOffersReply:
    """Return the offers made to a site, of campaigns that are not over."""
    reply = campaign_pb2.ListOffersReply()
    for number in store.campaign_numbers():
        campaign = store.campaign(number)
        standing = campaign.sites.get(site)
        closed = campaign.is_over or campaign.state is CampaignState.DRAFT
        if (
            standing is not None
            and not closed
            and standing.state not in (SiteState.INVITED, SiteState.JOINED)
        ):
            reply.offers.append(current_offer(store, number))
    return reply


def current_offer(store: Store, number: int) -> campaign_pb2.Offer:
    """Return a campaign's offer with everything that isn't stored in it: number, revision, state, due time.

    Raises:
        ConfigurationError: ``no-campaign``.
    """
    campaign = store.campaign(number)
    stored, revision = store.offer(number)
    offer: campaign_pb2.Offer = campaign_pb2.Offer.FromString(stored)
    offer.campaign, offer.revision = number, revision
    offer.state = campaign_pb2.CampaignState.Value(f"CAMPAIGN_STATE_{campaign.state.name}")
    if campaign.plan.due is not None:
        offer.due_unix_s = int(campaign.plan.due.timestamp())
    return offer


def answer_offer(
    store: Store, site: str, request: campaign_pb2.AnswerOfferRequest, now: datetime
) -> Campaign:
    """Record a steward's answer; the first accepting site sets the campaign running. Repeating it changes nothing.

    Raises:
        ConfigurationError: ``offer-revision``, ``answer``, ``site-state``, ``unknown-site``, ``no-campaign``.
    """
    answers = {
        campaign_pb2.ANSWER_ACCEPTED: SiteState.ACCEPTED,
        campaign_pb2.ANSWER_DECLINED: SiteState.DECLINED,
    }
    if request.answer not in answers:
        raise ConfigurationError("answer", "An answer accepts or declines.")
    _, revision = store.offer(request.campaign)
    if request.revision != revision:
        raise ConfigurationError("offer-revision", "The offer has changed since; look at it again.")
    answer = answers[request.answer]

    def answered(campaign: Campaign) -> Campaign:
        if site in campaign.sites and campaign.sites[site].state is answer:
            return campaign
        campaign = site_moved(campaign, site, answer, now, "the steward's answer")
        if answer is SiteState.ACCEPTED and campaign.state is CampaignState.OFFERED:
            campaign = moved(campaign, CampaignState.RUNNING, now, f"{site} accepted")
        return campaign

    return _change(store, request.campaign, answered)


# What sites send
# ------------------------------------------------------------------------------------------------


def take_beat(store: Store, caller: Caller, payload: bytes, now: datetime) -> status_pb2.BeatReply:
    """Store a site's sign of life.

    Raises:
        InputError: ``message-size`` or ``message-schema``.
    """
    beat = canonical(payload, status_pb2.Beat)
    store.record_contact(caller.name, now, payload)
    waiting = False
    for number in store.campaign_numbers():
        campaign = store.campaign(number)
        if campaign.is_over or caller.name not in campaign.sites:
            continue
        state = campaign.sites[caller.name].state
        waiting |= state is SiteState.OFFERED
        working = beat.activity == status_pb2.ACTIVITY_PROTECTING and beat.campaign == number
        if working and state is SiteState.ACCEPTED:
            _change(store, number, lambda current: _begun(current, caller.name, now))
    row = store.certificate(caller.serial)
    days = 0 if row is None else expiry(row.not_after, now).days
    return status_pb2.BeatReply(
        next_beat_s=_BEAT_S, offers_waiting=waiting, renew_certificate=days < _RENEW_NOTICE_DAYS
    )


def take_report(store: Store, site: str, payload: bytes, now: datetime) -> report_pb2.SubmitReportReply:
    """Check and store a report; the same one twice counts once, however late.

    Raises:
        InputError: the report breaks a rule of the schema.
        ConfigurationError: ``no-campaign``, ``unknown-site``, ``not-accepted``, ``offer-revision`` or
            ``campaign-over``.
        RefusedError: ``report-conflict``.
    """
    claimed = canonical(payload, report_pb2.Report)
    if store.knows_report(claimed.campaign, site, claimed.sequence, payload):
        store.record_contact(site, now)
        return report_pb2.SubmitReportReply(repeated=True)
    stored_offer, revision = store.offer(claimed.campaign)
    offer = campaign_pb2.Offer.FromString(stored_offer)
    if claimed.offer_revision != revision:
        raise ConfigurationError("offer-revision", "The report answers another revision of the offer.")
    report = parse_report(payload, minimum_group_size=offer.minimum_group_size)
    unfinished = report.outcome.unfinished
    finished = unfinished.WhichOneof("value") == "exact" and unfinished.exact == 0

    with store.transaction():
        campaign = reported(store.campaign(report.campaign), site, now, finished=finished)
        fresh = store.add_report(campaign, site, report.sequence, payload, now)
        store.record_contact(site, now)
    return report_pb2.SubmitReportReply(repeated=not fresh)


def campaign_status(store: Store, number: int, now: datetime) -> status_pb2.CampaignStatus:
    """Return how a campaign stands: every enrolled site, and nothing that the store does not hold.

    Raises:
        ConfigurationError: ``no-campaign``.
    """
    campaign = store.campaign(number)
    counts: dict[str, int] = {}
    for report in store.reports(number):
        counts[report.site] = counts.get(report.site, 0) + 1
    status = status_pb2.CampaignStatus(
        campaign=number,
        name=campaign.plan.name,
        state=campaign_pb2.CampaignState.Value(f"CAMPAIGN_STATE_{campaign.state.name}"),
        complete=not outstanding(campaign),
        at_unix_s=int(now.timestamp()),
    )
    for site, standing in campaign.sites.items():
        entry = status.sites.add(
            site=site,
            state=campaign_pb2.SiteState.Value(f"SITE_STATE_{standing.state.name}"),
            late=campaign.is_late(site, now),
            waived=standing.waiver is not None,
            reports=counts.get(site, 0),
        )
        if contact := store.contact(site):
            entry.last_contact_unix_s = int(min(contact.time, now).timestamp())
            if contact.beat is not None:
                entry.last_beat.ParseFromString(contact.beat)
    return status


# ------------------------------------------------------------------------------------------------


def _arrived(campaign: Campaign, site: str, now: datetime) -> Campaign:
    if campaign.is_over:
        return campaign
    if campaign.sites[site].state is SiteState.INVITED:
        campaign = site_moved(campaign, site, SiteState.JOINED, now, "certificate signed")
    open_offer = campaign.state in (CampaignState.OFFERED, CampaignState.RUNNING)
    if open_offer and campaign.sites[site].state is SiteState.JOINED:
        campaign = site_moved(campaign, site, SiteState.OFFERED, now, "joined an open campaign")
    return campaign


def _begun(campaign: Campaign, site: str, now: datetime) -> Campaign:
    if campaign.is_over or campaign.sites[site].state is not SiteState.ACCEPTED:
        return campaign
    return site_moved(campaign, site, SiteState.PROTECTING, now, "the site is at work")


def _change(store: Store, number: int, step: Callable[[Campaign], Campaign]) -> Campaign:
    with store.transaction():
        campaign = step(store.campaign(number))
        store.append(campaign)
    return campaign
