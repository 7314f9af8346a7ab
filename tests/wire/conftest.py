from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from medveil.agent.egress import Door
from medveil.agent.joining import Identity, join
from medveil.agent.reporting_channel import open_channel
from medveil.agent.reporting_log import EgressLog
from medveil.coordinator import operations
from medveil.coordinator.campaign import Campaign
from medveil.coordinator.pki import Authority, create_authority
from medveil.coordinator.status_service import StatusServer
from medveil.coordinator.store import Store
from medveil.protos.v1 import campaign_pb2, figures_pb2, report_pb2
from medveil.protos.v1.conventions import CODE_METADATA, Method, methods

CALLS = methods("CampaignService")


@dataclass
class Clock:
    """The coordinator's clock; TLS itself looks at the real one."""

    shift: timedelta = field(default=timedelta())

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.shift


@dataclass
class Site:
    """A joined site with an open door."""

    folder: Path
    identity: Identity
    log: EgressLog
    door: Door

    def call(self, name: str, message: Any = None) -> Any:
        return self.door.send(CALLS[name], CALLS[name].request() if message is None else message)


@dataclass
class Federation:
    """A coordinator on loopback, and the means to let sites join it."""

    folder: Path
    store: Store
    authority: Authority
    clock: Clock
    campaign: str
    enrolment: str
    closing: ExitStack

    def open_log(self, name: str) -> EgressLog:
        return self.closing.enter_context(EgressLog(self.folder / f"{name}.jsonl"))

    def join(self, name: str) -> Site:
        token = operations.invite(self.store, name, self.clock())
        log = self.open_log(name)
        folder = self.folder / name
        identity = join(self.enrolment, token.text, self.authority.fingerprint, folder, log)
        return Site(folder, identity, log, self.door(identity, log))

    def door(self, identity: Identity, log: EgressLog) -> Door:
        return Door(self.channel(identity.authority_pem, (identity.key_pem, identity.chain_pem)), log)

    def channel(self, authority_pem: bytes, identity: tuple[bytes, bytes] | None) -> Any:
        return self.closing.enter_context(open_channel(self.campaign, authority_pem, identity))

    def offered(self, *sites: str, due: datetime | None = None, least: int = 5) -> Campaign:
        offer = campaign_pb2.Offer(
            name="chest", task="classification", method="salm", minimum_group_size=least
        )
        campaign = operations.create_campaign(self.store, offer, sites, due, self.clock())
        return operations.offer_campaign(self.store, campaign.plan.number, self.clock(), "all is ready")


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    clock = Clock()
    authority = create_authority(tmp_path / "authority", clock())
    with ExitStack() as closing:
        store = closing.enter_context(Store(tmp_path / "coordinator.sqlite"))
        server = StatusServer(store, authority, ["localhost", "127.0.0.1"], now=clock)
        campaign, enrolment = server.start("127.0.0.1")
        closing.callback(server.stop, 0.2)
        yield Federation(
            tmp_path, store, authority, clock, f"127.0.0.1:{campaign}", f"127.0.0.1:{enrolment}", closing
        )


@pytest.fixture
def accepted() -> Callable[[int], campaign_pb2.AnswerOfferRequest]:
    def answer(campaign: int) -> campaign_pb2.AnswerOfferRequest:
        return campaign_pb2.AnswerOfferRequest(
            campaign=campaign, revision=1, answer=campaign_pb2.ANSWER_ACCEPTED
        )

    return answer


@pytest.fixture
def a_report() -> Callable[..., report_pb2.Report]:
    def build(
        campaign: int = 1, sequence: int = 1, verified: int = 90, unfinished: int = 0
    ) -> report_pb2.Report:
        counts = {"verified": verified, "not_protectable": 0, "quarantined": 10, "unfinished": unfinished}
        counts["images"] = sum(counts.values())
        return report_pb2.Report(
            campaign=campaign,
            offer_revision=1,
            sequence=sequence,
            minimum_group_size=5,
            outcome=report_pb2.Outcome(**{k: figures_pb2.Count(exact=v) for k, v in counts.items()}),
            changed_share_mean=figures_pb2.Rate(exact=0.3),
        )

    return build


@pytest.fixture
def raw_call() -> Callable[[Any, Method, bytes], str]:
    """Send bytes past the door and return the coordinator's word of refusal, or ``"ok"``."""

    def call(channel: Any, method: Method, payload: bytes) -> str:
        try:
            channel.unary_unary(method.path)(payload, timeout=10)
        except grpc.RpcError as exc:
            return dict(exc.trailing_metadata() or ()).get(CODE_METADATA, exc.code().name)
        return "ok"

    return call
