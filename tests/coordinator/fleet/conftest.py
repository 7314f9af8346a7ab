from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from medveil.coordinator import operations
from medveil.coordinator.campaign import Campaign
from medveil.coordinator.fleet.bundles import keep_bundle
from medveil.coordinator.pki import Authority, Caller, Role, caller, create_authority
from medveil.coordinator.store import Store
from medveil.protos.v1 import campaign_pb2


@dataclass
class Clock:
    """Stands still until it is moved on; begins at the real time, because TLS looks at that."""

    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __call__(self) -> datetime:
        return self.time

    def pass_by(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@dataclass
class Coordinator:
    """A coordinator's store and authority, and what its commands do."""

    folder: Path
    store: Store
    authority: Authority
    clock: Clock

    @property
    def bundles(self) -> Path:
        return self.folder / "bundles"

    def join(self, site: str) -> Path:
        """Let a site join; return the PEM of its key and certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        der = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        token = operations.invite(self.store, site, self.clock())
        joined = operations.join(self.store, self.authority, token.text, der, self.clock())
        path = self.folder / f"{site}.pem"
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(pem + joined.issued.chain_pem)
        return path

    def caller(self, site: str) -> Caller:
        return caller(self.join(site).read_bytes())

    def campaign(self, *sites: str, bundle: bytes = b"bundle", name: str = "chest") -> Campaign:
        """Return an offered campaign whose bundle is kept."""
        source = self.folder / "campaign.medveil"
        source.write_bytes(bundle)
        offer = campaign_pb2.Offer(
            name=name,
            task="classification",
            method="salm",
            minimum_group_size=5,
            bundle_sha256=keep_bundle(self.bundles, source),
            bundle_size_bytes=len(bundle),
        )
        drafted = operations.create_campaign(self.store, offer, sites, None, self.clock())
        return operations.offer_campaign(self.store, drafted.plan.number, self.clock(), "ready")

    def answer(self, number: int, site: str, *, accept: bool = True) -> None:
        answer = campaign_pb2.ANSWER_ACCEPTED if accept else campaign_pb2.ANSWER_DECLINED
        request = campaign_pb2.AnswerOfferRequest(campaign=number, revision=1, answer=answer)
        operations.answer_offer(self.store, site, request, self.clock())


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    clock = Clock()
    authority = create_authority(tmp_path / "authority", clock())
    with Store(tmp_path / "coordinator.sqlite") as store:
        yield Coordinator(tmp_path, store, authority, clock)


@pytest.fixture
def node_key() -> Callable[[], bytes]:
    """Make a node's public key, as it shows it."""

    def make() -> bytes:
        public = ec.generate_private_key(ec.SECP384R1()).public_key()
        return public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    return make


@pytest.fixture
def operator() -> Caller:
    return Caller(Role.OPERATOR, "anna", 1)
