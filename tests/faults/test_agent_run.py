"""The agent's real processes, struck without warning: nothing is lost, nothing is done or told twice."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from medveil.agent.reporting_log import sent_messages
from medveil.coordinator import operations
from medveil.coordinator.campaign import SiteState
from medveil.coordinator.fleet.edge import Edge
from medveil.coordinator.pki import Authority, Role, create_authority
from medveil.coordinator.status_service import StatusServer
from medveil.coordinator.store import Store
from medveil.models.errors import ExitCode
from medveil.protos.v1 import campaign_pb2, report_pb2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc"),
]

IMAGES = 96
NOBODY = 9
"""The discard port: nobody answers."""


class StoresAndSaysNothing(StatusServer):
    """Takes a report, stores it, and keeps its answer back until told."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stored, self.may_answer = threading.Event(), threading.Event()

    def _submit_report(self, payload: bytes, context: Any) -> bytes:
        answer = super()._submit_report(payload, context)
        self.stored.set()
        self.may_answer.wait(60)
        return answer


@dataclass
class Services:
    """A coordinator's three ports in this process; they go away and come back as they were."""

    store: Store
    authority: Authority
    folder: Path
    ports: tuple[int, int, int] = (0, 0, 0)
    running: list[Any] = field(default_factory=list)

    def up(self, kind: type[StatusServer] = StatusServer) -> Any:
        campaign, enrolment, fleet = self.ports
        server = kind(self.store, self.authority, ["127.0.0.1"])
        self.running.append(server)
        campaign, enrolment = server.start("127.0.0.1", campaign_port=campaign, enrolment_port=enrolment)
        issued, key = self.authority.issue_server(["127.0.0.1"], datetime.now(UTC))
        certificate = self.folder / "edge.pem"
        certificate.write_bytes(key + issued.chain_pem)
        # Behind the edge there is no SuperLink: every call that gets in is asked to come again.
        edge = Edge(NOBODY, self.authority.certificate_pem, lambda who, key, call: None)
        self.running.append(edge)
        self.ports = campaign, enrolment, edge.start("127.0.0.1", fleet, certificate)
        return server

    def down(self) -> None:
        while self.running:
            self.running.pop().stop()

    def impostor(self, folder: Path) -> Services:
        """Return another coordinator that listens where this one did."""
        folder.mkdir()
        other = create_authority(folder / "authority", datetime.now(UTC))
        return Services(Store(folder / "coordinator.sqlite"), other, folder, self.ports)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    authority = create_authority(tmp_path / "authority", datetime.now(UTC))
    with Store(tmp_path / "coordinator.sqlite") as store:
        services = Services(store, authority, tmp_path)
        services.up()
        yield services
        services.down()


@pytest.fixture
def hospital(
    request: pytest.FixtureRequest, services: Services, new_hospital: Callable[..., Any], phantom: bytes
) -> Any:
    """A site that has joined, holds the bundle of campaign 1, and has accepted it beforehand by policy."""
    hospital, now = new_hospital("st-anna", getattr(request, "param", IMAGES)), datetime.now(UTC)
    hospital.join(services.store, services.authority, services.ports[1])
    hospital.write_policy(services.ports[0], services.ports[2])
    digest = hashlib.sha256(phantom).digest()
    hospital.bundles.append(digest, len(phantom), 0, phantom)
    hospital.bundles.accept(digest, hospital.folder / "site.toml")
    offer = campaign_pb2.Offer(
        name="chest", task="classification", method="salm", epsilon_255=8, mask_ratio=0.25,
        bundle_sha256=digest, bundle_size_bytes=len(phantom), minimum_group_size=2,
    )  # fmt: skip
    operations.create_campaign(services.store, offer, ("st-anna",), None, now)
    operations.offer_campaign(services.store, 1, now, "all is ready")
    return hospital


def state(services: Services) -> SiteState:
    return services.store.campaign(1).sites["st-anna"].state


def test_an_agent_killed_mid_image_takes_its_programs_along_and_a_restart_goes_on_where_it_stood(
    services: Services,
    hospital: Any,
    phantom: bytes,
    until: Callable[..., Any],
    alive: Callable[[int], bool],
    below: Callable[[int], dict[int, str]],
    say: Callable[[str], None],
) -> None:
    hospital.start()
    until(hospital.verified, "the first image")
    os.kill(hospital.child("campaign_work.worker"), signal.SIGSTOP)  # it stays mid-image while we look around
    done = hospital.verified()
    assert done < IMAGES

    refused, error = hospital.call("run", *hospital.policy)
    assert (refused, error["error"]["code"]) == (ExitCode.BUSY, "agent-busy")
    bundle = hospital.bundles.path(hashlib.sha256(phantom).digest())
    job = ("--out", str(hospital.release()), "--bundle", str(bundle), *hospital.policy)
    refused, error = hospital.call("protect", str(hospital.source), *job)
    assert (refused, error["error"]["code"]) == (ExitCode.BUSY, "busy")

    programs = below(hospital.pid)
    for word in ("flower-supernode", "flower-superexec", "campaign_work.worker"):
        assert any(word in line for line in programs.values())
    hospital.kill()
    until(lambda: not any(map(alive, programs)), "its programs to end", 10)
    assert hospital.verified() == done
    assert state(services) is not SiteState.VERIFIED

    since = time.monotonic()
    hospital.start()
    until(lambda: hospital.verified() > done, "the next image")
    say(f"agent killed: next image verified {time.monotonic() - since:.1f} s after its restart")
    until(lambda: state(services) is SiteState.VERIFIED, "the report")
    status = hospital.status()
    (campaign,) = status["campaigns"]
    assert (status["agent"], campaign["stage"], campaign["verified"]) == ("running", "reported", IMAGES)
    hospital.end()
    hospital.check_that_nothing_was_lost_or_repeated(services.store)


def test_a_report_counts_once_though_the_agent_is_killed_before_and_after_its_arrival(
    services: Services, hospital: Any, until: Callable[..., Any], say: Callable[[str], None]
) -> None:
    """With noise, too, which the site pays for once: a new draw for each attempt would average it away."""
    hospital.ask_for_noise(epsilon=0.5)
    hospital.start()
    until(hospital.verified, "the first image")
    services.down()
    until(lambda: hospital.campaign().report is not None, "the report")
    assert hospital.verified() == IMAGES
    until(lambda: hospital.status()["coordinator"]["trouble"] == "unreachable", "the trouble to be named")
    hospital.kill()
    report = hospital.campaign().report

    hospital.start()
    server = services.up(StoresAndSaysNothing)
    assert server.stored.wait(60)
    hospital.kill()  # mid-report: it has arrived, and the site doesn't know
    assert not hospital.campaign().report_sent
    server.may_answer.set()
    since = time.monotonic()
    hospital.start()
    until(lambda: hospital.campaign().report_sent, "the answer")
    say(f"agent killed mid-report: accepted again {time.monotonic() - since:.1f} s after its restart")
    assert state(services) is SiteState.VERIFIED
    hospital.end()
    hospital.check_that_nothing_was_lost_or_repeated(services.store)
    sent = [m.payload for m in sent_messages(hospital.egress_log) if m.method.endswith("/SubmitReport")]
    assert len(sent) >= 2
    assert set(sent) == {report}
    assert report_pb2.Report.FromString(report).noise.epsilon == 0.5
    assert hospital.status()["noise_budget"]["spent"] == 0.5


@pytest.mark.parametrize("hospital", [24], indirect=True)
def test_a_full_disk_stops_the_job_by_name_and_room_lets_it_go_on(
    services: Services, hospital: Any, until: Callable[..., Any], below: Callable[[int], dict[int, str]]
) -> None:
    room = hospital.draw_large_image() // 2

    def stopped() -> bool:
        """Let no worker write a large file until one has said so."""
        campaign = hospital.campaign()
        for worker, line in below(hospital.pid).items():
            if "campaign_work.worker" in line:
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(worker, resource.RLIMIT_FSIZE, (room, room))
        return campaign is not None and campaign.work_trouble == "disk-full"

    hospital.start()
    until(stopped, "a full disk")
    (campaign,) = hospital.status()["campaigns"]
    assert (campaign["stage"], campaign["trouble"]) == ("stopped", "disk-full")
    until(lambda: state(services) is SiteState.VERIFIED, "the report")
    hospital.end()
    hospital.check_that_nothing_was_lost_or_repeated(services.store)


@pytest.mark.parametrize("hospital", [8], indirect=True)
def test_who_is_not_the_coordinator_gets_nothing_and_each_trouble_has_its_name(
    services: Services, hospital: Any, tmp_path: Path, until: Callable[..., Any]
) -> None:
    def trouble() -> str:
        return str(hospital.status()["coordinator"]["trouble"])

    identity = hospital.home / "federation/identity.pem"
    good = identity.read_bytes()
    identity.write_bytes(expired_identity(services.authority, "st-anna"))
    hospital.start()
    until(lambda: trouble() == "certificate-expired", "an expired certificate")
    until(lambda: hospital.status()["gate"]["line"] == "certificate-expired", "the gate's word")
    assert services.store.contact("st-anna") is None

    identity.write_bytes(good)
    until(lambda: services.store.contact("st-anna"), "contact, without a restart")
    until(lambda: not trouble(), "no trouble")

    services.down()
    impostor = services.impostor(tmp_path / "impostor")
    impostor.up()
    try:
        until(lambda: trouble() == "unknown-authority", "an impostor")
        assert impostor.store.contact("st-anna") is None
    finally:
        impostor.down()
        impostor.store.close()
    services.up()
    until(lambda: not trouble(), "contact again")
    hospital.end()


def expired_identity(authority: Authority, site: str) -> bytes:
    """Return key and chain of a site that let its certificate expire a month ago."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    issued = authority.issue_client(request, Role.SITE, site, datetime.now(UTC) - timedelta(days=395))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + issued.chain_pem
