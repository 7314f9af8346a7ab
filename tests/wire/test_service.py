from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from medveil.agent.egress import Door
from medveil.agent.joining import (
    accept,
    begin_joining,
    join,
    key_fingerprint,
    load_identity,
    renew,
    request_file,
)
from medveil.agent.reporting_channel import open_channel
from medveil.agent.reporting_log import sent_messages
from medveil.coordinator import operations
from medveil.coordinator.campaign import CampaignState, SiteState, aggregate
from medveil.coordinator.pki import Role, create_authority, parse_request
from medveil.coordinator.reports import figures, parse_report
from medveil.models.errors import ConfigurationError, RefusedError
from medveil.protos.v1 import figures_pb2, report_pb2, status_pb2
from medveil.protos.v1.conventions import methods

CALLS = methods("CampaignService")


def standing(federation: Any, site: str) -> SiteState:
    return federation.store.campaign(1).sites[site].state


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises((RefusedError, ConfigurationError)) as refused:
        call()
    return refused.value.code


def at_work(federation: Any, accepted: Any, *names: str) -> list[Any]:
    sites = [federation.join(name) for name in names]
    federation.offered(*names)
    for site in sites:
        site.call("AnswerOffer", accepted(1))
    return sites


# A campaign, from the invitation to the seal
# ------------------------------------------------------------------------------------------------


def test_a_campaign_of_two_sites_goes_from_invitation_to_seal(
    federation: Any, accepted: Any, a_report: Any
) -> None:
    a, b = at_work(federation, accepted, "a", "b")
    assert federation.store.campaign(1).state is CampaignState.RUNNING
    beat = status_pb2.Beat(activity=status_pb2.ACTIVITY_PROTECTING, campaign=1)
    assert a.call("SendBeat", beat).next_beat_s > 0
    assert standing(federation, "a") is SiteState.PROTECTING
    for site, verified in ((a, 90), (b, 50)):
        assert not site.call("SubmitReport", a_report(verified=verified)).repeated
    assert standing(federation, "a") is SiteState.VERIFIED
    stored = federation.store.reports(1)
    total = aggregate(figures(r.site, parse_report(r.payload, minimum_group_size=5)) for r in stored)
    assert total.counts["verified"].known == 140
    assert operations.campaign_status(federation.store, 1, federation.clock()).complete


def test_a_site_that_joins_late_finds_the_open_offer(federation: Any) -> None:
    federation.offered("a", "b")
    late = federation.join("b")
    (offer,) = late.call("ListOffers").offers
    assert (offer.campaign, offer.name, offer.minimum_group_size) == (1, "chest", 5)
    assert standing(federation, "a") is SiteState.INVITED


def test_a_report_sent_twice_counts_once(federation: Any, accepted: Any, a_report: Any) -> None:
    (site,) = at_work(federation, accepted, "a")
    assert not site.call("SubmitReport", a_report()).repeated
    assert site.call("SubmitReport", a_report()).repeated
    assert len(federation.store.reports(1)) == 1
    assert refusal(lambda: site.call("SubmitReport", a_report(verified=91))) == "report-conflict"


def test_a_late_report_is_taken_and_shown_as_what_it_is(
    federation: Any, accepted: Any, a_report: Any
) -> None:
    site = federation.join("a")
    federation.offered("a", due=federation.clock() + timedelta(days=1))
    site.call("AnswerOffer", accepted(1))
    federation.clock.shift = timedelta(days=3)
    (before,) = operations.campaign_status(federation.store, 1, federation.clock()).sites
    site.call("SubmitReport", a_report())
    (after,) = operations.campaign_status(federation.store, 1, federation.clock()).sites
    assert (before.late, after.late, standing(federation, "a")) == (True, False, SiteState.VERIFIED)


def test_a_report_with_unfinished_images_is_reported_and_not_verified(
    federation: Any, accepted: Any, a_report: Any
) -> None:
    (site,) = at_work(federation, accepted, "a")
    site.call("SubmitReport", a_report(unfinished=20))
    assert standing(federation, "a") is SiteState.REPORTED
    site.call("SubmitReport", a_report(sequence=2))
    assert standing(federation, "a") is SiteState.VERIFIED


def test_a_site_that_has_not_accepted_cannot_report(federation: Any, a_report: Any) -> None:
    site = federation.join("a")
    federation.offered("a")
    assert refusal(lambda: site.call("SubmitReport", a_report())) == "not-accepted"


def test_an_aborted_campaign_takes_nothing_more(federation: Any, accepted: Any, a_report: Any) -> None:
    (site,) = at_work(federation, accepted, "a")
    now = federation.clock()
    operations.move_campaign(federation.store, 1, CampaignState.ABORTED, now, "wrong bundle")
    assert refusal(lambda: site.call("SubmitReport", a_report())) == "campaign-over"
    assert refusal(lambda: site.call("AnswerOffer", accepted(2))) == "no-campaign"
    assert not site.call("ListOffers").offers
    beat = status_pb2.Beat(activity=status_pb2.ACTIVITY_PROTECTING, campaign=1)
    assert not site.call("SendBeat", beat).offers_waiting
    assert standing(federation, "a") is SiteState.ACCEPTED


def test_a_site_cannot_speak_for_another(federation: Any, accepted: Any, a_report: Any) -> None:
    a, outsider = federation.join("a"), federation.join("outsider")
    federation.offered("a")
    a.call("AnswerOffer", accepted(1))
    assert refusal(lambda: outsider.call("SubmitReport", a_report())) == "unknown-site"
    assert not outsider.call("ListOffers").offers
    assert federation.store.contact("outsider") is None  # what was refused is no accepted contact
    assert not federation.store.reports(1)


# What is refused, and under which name
# ------------------------------------------------------------------------------------------------


def test_a_report_with_a_field_of_its_own_is_refused_and_not_stored(
    federation: Any, accepted: Any, a_report: Any, raw_call: Any
) -> None:
    (site,) = at_work(federation, accepted, "a")
    channel = federation.channel(
        site.identity.authority_pem, (site.identity.key_pem, site.identity.chain_pem)
    )
    smuggled = b"\xfa\x3f\x0bDoe^Jane^^^"  # field 1023, 11 bytes of text
    payload = a_report().SerializeToString() + smuggled
    assert raw_call(channel, CALLS["SubmitReport"], payload) == "message-schema"
    assert raw_call(channel, CALLS["SendBeat"], smuggled) == "message-schema"
    assert raw_call(channel, CALLS["SubmitReport"], b"\xff" * 20) == "message-schema"
    assert raw_call(channel, CALLS["SubmitReport"], b"\0" * 70_000) == "RESOURCE_EXHAUSTED"
    assert not federation.store.reports(1)


def test_a_replayed_token_is_refused_but_a_lost_answer_is_repeated(federation: Any) -> None:
    token = operations.invite(federation.store, "a", federation.clock()).text
    folder, log = federation.folder / "a", federation.open_log("a")
    fingerprint = federation.authority.fingerprint
    request = begin_joining(folder)
    operations.join(federation.store, federation.authority, token, request, federation.clock())  # answer lost
    assert join(federation.enrolment, token.lower(), fingerprint, folder, log).site == "a"
    thief = federation.folder / "thief"
    assert refusal(lambda: join(federation.enrolment, token, fingerprint, thief, log)) == "token-replayed"


def test_unknown_and_expired_tokens_are_refused(federation: Any) -> None:
    log, fingerprint = federation.open_log("a"), federation.authority.fingerprint

    def attempt(token: str) -> str:
        return refusal(lambda: join(federation.enrolment, token, fingerprint, federation.folder / "a", log))

    assert attempt("AAAA-BBBB") == "token-unknown"
    token = operations.invite(federation.store, "a", federation.clock())
    federation.clock.shift = timedelta(days=8)
    assert attempt(token.text) == "token-expired"


def test_a_wrong_fingerprint_stops_before_the_token_is_sent(federation: Any) -> None:
    log = federation.open_log("a")
    wrong = "-".join(["AAAA"] * 8)
    assert (
        refusal(lambda: join(federation.enrolment, "T", wrong, federation.folder / "a", log)) == "fingerprint"
    )
    assert not (federation.folder / "a.jsonl").read_bytes()


def client_pem(authority: Any, role: Role, folder: Any, now: Any) -> tuple[bytes, bytes]:
    issued = authority.issue_client(parse_request(begin_joining(folder)), role, "a", now)
    return (folder / "pending-key.pem").read_bytes(), issued.chain_pem


def test_no_certificate_another_authority_and_an_expired_one_do_not_get_through(
    federation: Any, raw_call: Any
) -> None:
    ours, now = federation.authority, federation.clock()
    other = create_authority(federation.folder / "other", now)
    expired = client_pem(ours, Role.SITE, federation.folder / "x", now - timedelta(days=400))
    foreign = client_pem(other, Role.SITE, federation.folder / "y", now)
    for key, chain in ((None, None), expired, foreign):
        # past the site's own check, to see what the server does
        credentials = grpc.ssl_channel_credentials(ours.certificate_pem, key, chain)
        with grpc.secure_channel(federation.campaign, credentials) as channel:
            assert raw_call(channel, CALLS["ListOffers"], b"") == "UNAVAILABLE"
    assert refusal(lambda: federation.channel(ours.certificate_pem, expired)) == "certificate-expired"
    assert refusal(lambda: federation.channel(ours.certificate_pem, foreign)) == "certificate-foreign"


def test_a_site_does_not_talk_to_an_impostor(federation: Any) -> None:
    site = federation.join("a")
    other = create_authority(federation.folder / "other", federation.clock())
    stranger = client_pem(other, Role.SITE, federation.folder / "x", federation.clock())
    door = Door(federation.channel(other.certificate_pem, stranger), site.log)
    assert (
        refusal(lambda: door.send(CALLS["ListOffers"], CALLS["ListOffers"].request())) == "unknown-authority"
    )


@pytest.mark.parametrize(("days", "code"), [(-4000, "coordinator-certificate-expired"), (400, "clock-off")])
def test_a_coordinators_certificate_of_another_time_is_told_from_an_impostors(
    federation: Any, days: int, code: str
) -> None:
    site, ours = federation.join("a"), federation.authority
    issued, key = ours.issue_server(["127.0.0.1", "localhost"], federation.clock() + timedelta(days=days))
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(key, issued.chain_pem)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        own = (site.identity.key_pem, site.identity.chain_pem)
        with open_channel(f"127.0.0.1:{port}", ours.certificate_pem, own) as channel:
            door = Door(channel, site.log)
            assert refusal(lambda: door.send(CALLS["ListOffers"], CALLS["ListOffers"].request())) == code
    finally:
        server.stop(None)


def test_a_certificate_that_was_never_recorded_or_was_revoked_is_refused_by_name(
    federation: Any, raw_call: Any
) -> None:
    unknown = client_pem(federation.authority, Role.SITE, federation.folder / "x", federation.clock())
    channel = federation.channel(federation.authority.certificate_pem, unknown)
    assert raw_call(channel, CALLS["ListOffers"], b"") == "certificate-unknown"
    site = federation.join("a")
    site.call("ListOffers")
    federation.store.revoke("a", federation.clock())
    assert refusal(lambda: site.call("ListOffers")) == "certificate-revoked"


def test_a_certificate_that_expires_while_connected_is_refused_by_name(federation: Any) -> None:
    site = federation.join("a")
    site.call("ListOffers")
    federation.clock.shift = timedelta(days=366)
    assert refusal(lambda: site.call("ListOffers")) == "certificate-expired"


def test_a_site_may_not_watch_the_others(federation: Any, raw_call: Any) -> None:
    site = federation.join("a")
    channel = federation.channel(
        site.identity.authority_pem, (site.identity.key_pem, site.identity.chain_pem)
    )
    assert raw_call(channel, CALLS["WatchStatus"], b"\x08\x01") == "role"


def test_a_silent_port_is_unreachable_and_nothing_is_lost(federation: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    log = federation.open_log("a")
    call = lambda: join(address, "T", federation.authority.fingerprint, federation.folder / "a", log)  # noqa: E731
    assert refusal(call) == "unreachable"


# Watching and renewing
# ------------------------------------------------------------------------------------------------


def test_an_operator_sees_every_site_and_each_change(federation: Any, accepted: Any) -> None:
    folder = federation.folder / "operator"
    request = parse_request(begin_joining(folder))
    issued = federation.authority.issue_client(request, Role.OPERATOR, "desk", federation.clock())
    federation.store.add_certificate(issued.serial, Role.OPERATOR, "desk", issued.not_after)
    identity = ((folder / "pending-key.pem").read_bytes(), issued.chain_pem)
    channel = federation.channel(federation.authority.certificate_pem, identity)
    site = federation.join("a")
    federation.offered("a", "absent")
    call = channel.unary_stream(CALLS["WatchStatus"].path)(
        status_pb2.WatchStatusRequest(campaign=1, interval_ms=200).SerializeToString(), timeout=30
    )
    first = status_pb2.CampaignStatus.FromString(next(call))
    site.call("AnswerOffer", accepted(1))
    second = status_pb2.CampaignStatus.FromString(next(call))
    call.cancel()
    states = [{s.site: s.state for s in status.sites} for status in (first, second)]
    assert [seen["absent"] for seen in states] == [1, 1]
    assert [seen["a"] for seen in states] == [3, 4]
    assert not second.complete


def test_renewal_needs_no_downtime_on_either_side(federation: Any) -> None:
    site = federation.join("a")
    old_key = site.identity.key_pem
    renewed = renew(site.folder, site.door)
    assert renewed.site == "a"
    assert renewed.key_pem != old_key
    assert (
        federation.door(renewed, site.log).send(CALLS["ListOffers"], CALLS["ListOffers"].request())
        is not None
    )
    site.call("ListOffers")  # the old certificate still works
    assert load_identity(site.folder).not_after == renewed.not_after


def presented_serial(address: str) -> int:
    host, port = address.split(":")
    return x509.load_pem_x509_certificate(
        ssl.get_server_certificate((host, int(port))).encode()
    ).serial_number


def test_the_server_renews_its_own_certificate_without_a_restart(federation: Any) -> None:
    before = presented_serial(federation.enrolment)
    assert presented_serial(federation.enrolment) == before
    federation.clock.shift = timedelta(days=340)
    assert presented_serial(federation.enrolment) != before


def test_a_site_without_a_connection_joins_by_two_files(federation: Any) -> None:
    folder = federation.folder / "island"
    text = request_file(folder)
    spoken = key_fingerprint(folder)
    answer = operations.approve_file(
        federation.store, federation.authority, "island", text, federation.clock()
    )
    with pytest.raises(RefusedError, match="not the one you were told"):
        accept(folder, answer, spoken)
    assert accept(folder, answer, federation.authority.fingerprint).site == "island"
    assert (folder / "identity.pem").stat().st_mode & 0o077 == 0
    assert not (folder / "pending-key.pem").exists()


def test_the_private_key_is_in_no_byte_that_was_sent(federation: Any) -> None:
    site = federation.join("a")
    renewed = renew(site.folder, site.door)
    sent = (federation.folder / "a.jsonl").read_bytes()
    assert sent
    for pem in (site.identity.key_pem, renewed.key_pem):
        key: Any = serialization.load_pem_private_key(pem, None)
        secret = key.private_numbers().private_value.to_bytes(32, "big")
        assert all(secret not in m.payload for m in sent_messages(federation.folder / "a.jsonl"))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("group-size", lambda r: setattr(r.outcome.quarantined, "exact", 3)),
        ("group-size", lambda r: setattr(r, "minimum_group_size", 4)),
        ("figure-missing", lambda r: r.outcome.ClearField("verified")),
        ("figure-missing", lambda r: setattr(r.outcome.verified, "suppressed", 0)),
        ("figure-missing", lambda r: setattr(r.outcome.verified, "suppressed", 77)),
        ("rate-range", lambda r: setattr(r.changed_share_mean, "exact", float("nan"))),
        ("rate-range", lambda r: setattr(r.changed_share_mean, "exact", 1.1)),
        ("sums", lambda r: setattr(r.outcome.images, "exact", 99)),
        ("sums", lambda r: r.verified_by_class.add(class_index=0, verified=figures_pb2.Count(exact=95))),
        ("bins", lambda r: r.psnr.bins.add(exact=5)),
        (
            "repeated-entry",
            lambda r: r.quarantined_by_reason.add(reason=0, images=figures_pb2.Count(exact=10)),
        ),
        ("offer-revision", lambda r: setattr(r, "offer_revision", 2)),
        ("no-campaign", lambda r: setattr(r, "campaign", 9)),
    ],
)
def test_a_report_that_breaks_a_rule_is_refused_by_name(
    federation: Any, accepted: Any, a_report: Any, code: str, change: Callable[[report_pb2.Report], None]
) -> None:
    (site,) = at_work(federation, accepted, "a")
    report = a_report()
    change(report)
    assert refusal(lambda: site.call("SubmitReport", report)) == code
    assert not federation.store.reports(1)
