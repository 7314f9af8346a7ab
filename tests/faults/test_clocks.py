"""Outages of minutes and days, and clocks that are wrong: with the clock in our hands, nobody waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from medveil.agent.egress import Door
from medveil.agent.joining import Identity, join
from medveil.agent.reporting_channel import open_channel
from medveil.agent.reporting_log import EgressLog
from medveil.coordinator import operations
from medveil.coordinator.campaign import SiteState
from medveil.coordinator.fleet.dispatcher import Dispatcher
from medveil.coordinator.pki import Authority, create_authority
from medveil.coordinator.pki import caller as caller_of
from medveil.coordinator.status_service import StatusServer
from medveil.coordinator.store import Delivery, Store
from medveil.coordinator.watch import status_value
from medveil.models.errors import RefusedError
from medveil.protos.fleet import Code
from medveil.protos.v1 import campaign_pb2, figures_pb2, report_pb2, status_pb2
from medveil.protos.v1.conventions import methods

PULL = "pull-messages"
CALLS = methods("CampaignService")
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@dataclass
class Clock:
    """The coordinator's clock, beside the true one, which TLS looks at."""

    shift: timedelta = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.shift


@dataclass
class SuperLink:
    """Begins every round that it is asked for."""

    begun: list[int] = field(default_factory=list)

    def register(self, site: str, key: bytes) -> None:
        pass

    def begin(self, round_number: int) -> None:
        self.begun.append(round_number)


@dataclass
class Federation:
    """A coordinator's services with a clock that can be moved, and a site that has joined and accepted."""

    folder: Path
    store: Store
    authority: Authority
    clock: Clock
    superlink: SuperLink
    ports: tuple[int, int]
    node_key: bytes = b""

    def join(self, folder: str = "st-anna") -> Identity:
        token = operations.invite(self.store, "st-anna", self.clock()).text
        with EgressLog(self.folder / f"{folder}-join.jsonl") as log:
            address = f"127.0.0.1:{self.ports[1]}"
            return join(address, token, self.authority.fingerprint, self.folder / folder, log)

    def send(self, identity: Identity, call: str, message: Any) -> Any:
        pems = identity.key_pem, identity.chain_pem
        address = f"127.0.0.1:{self.ports[0]}"
        with (
            EgressLog(self.folder / "egress.jsonl") as log,
            open_channel(address, identity.authority_pem, pems) as channel,
        ):
            return Door(channel, log).send(CALLS[call], message)

    def dispatcher(self) -> Dispatcher:
        """Return that of a process which has just begun."""
        return Dispatcher(self.store, self.superlink, self.clock)

    def calls(self, dispatcher: Dispatcher, identity: Identity) -> None:
        """Let the site's SuperNode ask for messages, as every 3 s, and the coordinator look what is due."""
        who = caller_of(identity.chain_pem)
        for _ in range(5):
            dispatcher.admit(who, self.node_key, PULL)
            dispatcher.tick()
            self.clock.shift += timedelta(seconds=1)

    def site(self) -> dict[str, Any]:
        return dict(status_value(self.store, 1, self.clock())["sites"][0])


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    clock, authority = Clock(), create_authority(tmp_path / "authority", datetime.now(UTC))
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    public = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with ExitStack() as closing:
        store = closing.enter_context(Store(tmp_path / "coordinator.sqlite"))
        server = StatusServer(store, authority, ["127.0.0.1"], now=clock)
        ports = server.start("127.0.0.1")
        closing.callback(server.stop, 0.2)
        yield Federation(tmp_path, store, authority, clock, SuperLink(), ports, public)


@pytest.fixture
def identity(request: pytest.FixtureRequest, federation: Federation) -> Identity:
    """A site that joined and accepted campaign 1, due in a day: now, or as long ago as the parameter says."""
    federation.clock.shift = -getattr(request, "param", timedelta())
    identity, now = federation.join(), federation.clock()
    offer = campaign_pb2.Offer(
        name="chest", task="classification", method="salm", minimum_group_size=5,
        bundle_sha256=bytes(32), bundle_size_bytes=6,
    )  # fmt: skip
    operations.create_campaign(federation.store, offer, ("st-anna",), now + DAY, now)
    operations.offer_campaign(federation.store, 1, now, "ready")
    answer = campaign_pb2.AnswerOfferRequest(campaign=1, revision=1, answer=campaign_pb2.ANSWER_ACCEPTED)
    operations.answer_offer(federation.store, "st-anna", answer, now)
    return identity


@pytest.fixture
def report() -> report_pb2.Report:
    counts = {"images": 90, "verified": 90, "not_protectable": 0, "quarantined": 0, "unfinished": 0}
    return report_pb2.Report(
        campaign=1, offer_revision=1, sequence=1, minimum_group_size=5,
        outcome=report_pb2.Outcome(**{name: figures_pb2.Count(exact=n) for name, n in counts.items()}),
        changed_share_mean=figures_pb2.Rate(exact=0.25),
    )  # fmt: skip


@pytest.mark.parametrize("outage_s", [90, 600, 259_200], ids=["90 s", "10 min", "3 days"])
def test_a_coordinator_that_was_away_begins_anew_what_it_left_within_seconds(
    federation: Federation, identity: Identity, outage_s: int
) -> None:
    federation.calls(federation.dispatcher(), identity)
    assert federation.superlink.begun == [1]  # and the process dies in the middle of it
    federation.clock.shift += timedelta(seconds=outage_s)
    federation.calls(federation.dispatcher(), identity)
    assert federation.superlink.begun == [1, 2]
    assert [entry.number for entry in federation.store.open_rounds()] == [2]
    assert federation.store.campaign(1).sites["st-anna"].state is SiteState.ACCEPTED


@pytest.mark.parametrize("back", [HOUR, DAY], ids=["an hour", "a day"])
def test_a_coordinator_whose_clock_is_set_back_goes_on_at_once(
    federation: Federation, identity: Identity, back: timedelta
) -> None:
    dispatcher = federation.dispatcher()
    federation.calls(dispatcher, identity)
    now = federation.clock()
    held = Delivery(
        now, 0, 1, "running", int(Code.STORAGE), 0, now
    )  # a full disk at the site: again in a minute
    federation.store.record_answer(1, "st-anna", held)
    federation.clock.shift -= back
    assert dispatcher.present() == frozenset()  # who called in the future is not known to be there
    federation.calls(dispatcher, identity)
    assert federation.superlink.begun == [1, 2]  # the first round is given up, and the site is asked again


def test_a_site_that_was_offline_for_days_is_late_and_silent_and_its_report_counts(
    federation: Federation, identity: Identity, report: report_pb2.Report
) -> None:
    beat = status_pb2.Beat(activity=status_pb2.ACTIVITY_PROTECTING, campaign=1)
    federation.send(identity, "SendBeat", beat)
    assert (federation.site()["silent"], federation.site()["late"]) == (False, False)
    federation.clock.shift += timedelta(days=5)
    away = federation.site()
    assert (away["state"], away["silent"], away["late"]) == ("protecting", True, True)
    federation.send(identity, "SubmitReport", report)
    back = federation.site()
    assert (back["state"], back["silent"], back["late"]) == ("verified", False, False)


@pytest.mark.parametrize("identity", [timedelta(days=370)], indirect=True, ids=["370 days"])
def test_a_site_that_was_offline_for_longer_than_its_certificate_lives_comes_back_by_invitation(
    federation: Federation, identity: Identity, report: report_pb2.Report
) -> None:
    federation.calls(federation.dispatcher(), identity)
    federation.clock.shift = timedelta()
    with pytest.raises(RefusedError, match="certificate-expired"):
        federation.send(identity, "SubmitReport", report)
    with pytest.raises(RefusedError, match="certificate-expired"):
        federation.calls(federation.dispatcher(), identity)
    anew = federation.join("st-anna-anew")
    federation.send(anew, "SubmitReport", report)
    federation.calls(federation.dispatcher(), anew)  # under the node key that it had
    assert federation.site()["state"] == "verified"
    assert federation.store.node_keys() == {federation.node_key: "st-anna"}


@pytest.mark.parametrize("message", [status_pb2.Beat, report_pb2.Report, campaign_pb2.AnswerOfferRequest])
def test_no_message_of_a_site_says_what_time_it_is_there(message: Any) -> None:
    """So that no site's clock can put a contact into the future."""
    assert not [field.name for field in message.DESCRIPTOR.fields if "unix" in field.name]
