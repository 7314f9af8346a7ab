"""DICOM over TLS: with a real Orthanc both ways, and refused where a certificate is wrong."""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

from medveil.agent.imageio.pacs import (
    Delivery,
    DeliveryQueue,
    DicomPeer,
    DimseReader,
    DimseSender,
    Inbox,
    ReceivePort,
    ReceiveSettings,
    echo,
    pull_by_move,
)
from medveil.agent.pacs_policy import PeerTls, PortTls
from medveil.models.errors import ConfigurationError, InputError

MakeInbox = Callable[..., Inbox]

# pynetdicom 3.0.4 leaves the sockets of failed calls to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Collect them here, where they may be forgotten, and not in another test."""
    yield
    gc.collect()


@dataclass(frozen=True)
class Identity:
    """Certificate and key of one party, as files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for 127.0.0.1 (and, being its own root, for itself)."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._signed(self._name, self._key, ca=True))

    def identity(self, name: str) -> Identity:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        found = Identity(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        found.certificate.write_bytes(self._signed(subject, key, ca=False))
        found.key.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        )
        return found

    def _signed(self, subject: x509.Name, key: rsa.RSAPrivateKey, *, ca: bool) -> bytes:
        now = datetime.now(UTC)
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=ca,
            crl_sign=ca,
            content_commitment=False,
            key_encipherment=not ca,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
            )
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "hospital")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "stranger")


@pytest.fixture(scope="module")
def ours(authority: Authority) -> Identity:
    return authority.identity("agent")


@pytest.fixture
def secure(receive_settings: ReceiveSettings, ours: Identity, authority: Authority) -> ReceiveSettings:
    """A receive port that takes TLS callers of the hospital's authority."""
    tls = PortTls(certificate_file=ours.certificate, key_file=ours.key, ca_file=authority.file)
    return receive_settings.model_copy(update={"tls": tls})


def caller(port: ReceivePort, authority: Authority, shown: Identity | None) -> DicomPeer:
    """Return our own port as Orthanc would call it."""
    files = {} if shown is None else {"certificate_file": shown.certificate, "key_file": shown.key}
    return DicomPeer(
        ae_title="MEDVEIL",
        host="127.0.0.1",
        port=port.port,
        calling_ae_title="ORTHANC",
        tls=PeerTls(ca_file=authority.file, **files),
    )


@pytest.fixture
def secure_orthanc(mortal_orthanc: Any, authority: Authority) -> Iterator[Any]:
    """An Orthanc whose DICOM port wants TLS and a certificate, and which calls us over TLS."""
    mortal_orthanc.stop(signal.SIGKILL)
    theirs = authority.identity("orthanc")
    agent = {
        "AET": "MEDVEIL",
        "Host": "127.0.0.1",
        "Port": mortal_orthanc.agent_port,
        "UseDicomTls": True,
    }
    mortal_orthanc.more_settings = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(theirs.certificate),
        "DicomTlsPrivateKey": str(theirs.key),
        "DicomTlsTrustedCertificates": str(authority.file),
        "DicomModalities": {"agent": agent},
    }
    mortal_orthanc.start()
    return mortal_orthanc


def test_a_series_comes_and_a_copy_goes_over_tls(
    secure_orthanc: Any,
    secure: ReceiveSettings,
    authority: Authority,
    ours: Identity,
    make_object: Callable[..., Path],
    make_inbox: MakeInbox,
    tmp_path: Path,
) -> None:
    tls = PeerTls(ca_file=authority.file, certificate_file=ours.certificate, key_file=ours.key)
    peer = secure_orthanc.dicom.model_copy(update={"tls": tls})
    secure_orthanc.put(make_object(1))
    inbox = make_inbox()
    with ReceivePort(secure.model_copy(update={"port": secure_orthanc.agent_port}), inbox):
        pulled = pull_by_move(peer, inbox, "1.2.3.4", "1.2.3.4.1", destination="MEDVEIL")
    assert (len(pulled.expected), pulled.missing) == (1, frozenset())
    with DeliveryQueue(tmp_path / "queue.db") as queue:
        queue.add(make_object(2))
        assert Delivery(queue, DimseSender(peer), DimseReader(peer)).run_once().verified == 1
    with pytest.raises(InputError) as refused:
        echo(secure_orthanc.dicom)  # in clear
    assert refused.value.code == "pacs-unreachable"


def test_who_shows_a_certificate_of_the_authority_is_served(
    secure: ReceiveSettings, make_inbox: MakeInbox, authority: Authority
) -> None:
    with ReceivePort(secure, make_inbox()) as port:
        echo(caller(port, authority, authority.identity("modality")))


@pytest.mark.parametrize("who", ["nobody", "a stranger", "a caller in clear", "a caller who trusts others"])
def test_others_are_not_served(
    secure: ReceiveSettings, make_inbox: MakeInbox, authority: Authority, stranger: Authority, who: str
) -> None:
    with ReceivePort(secure, make_inbox()) as port:
        peer = {
            "nobody": caller(port, authority, None),
            "a stranger": caller(port, authority, stranger.identity("modality")),
            "a caller in clear": caller(port, authority, None).model_copy(update={"tls": None}),
            "a caller who trusts others": caller(port, stranger, authority.identity("modality")),
        }[who]
        with pytest.raises(InputError) as refused:
            echo(peer)
        assert refused.value.code == "pacs-unreachable"
        echo(caller(port, authority, authority.identity("modality")))


def test_the_certificate_has_to_be_for_the_name_that_is_called(
    secure: ReceiveSettings, make_inbox: MakeInbox, authority: Authority, ours: Identity
) -> None:
    with ReceivePort(secure, make_inbox()) as port:
        peer = caller(port, authority, ours)
        assert peer.tls is not None
        tls = peer.tls.model_copy(update={"server_name": "pacs.hospital.example"})
        with pytest.raises(InputError):
            echo(peer.model_copy(update={"tls": tls}))


# pynetdicom 3.0.4 ends a call that said nothing, when the port closes, with an event that it does not expect itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_silent_caller_keeps_nobody_else_waiting(
    secure: ReceiveSettings, make_inbox: MakeInbox, authority: Authority
) -> None:
    identity = authority.identity("modality")
    with ReceivePort(secure, make_inbox()) as port, socket.create_connection(("127.0.0.1", port.port)):
        start = time.monotonic()
        echo(caller(port, authority, identity))
        assert time.monotonic() - start < 10


def test_files_that_do_not_belong_together_are_named(
    secure: ReceiveSettings, make_inbox: MakeInbox, authority: Authority, stranger: Authority, ours: Identity
) -> None:
    wrong = PortTls(certificate_file=ours.certificate, key_file=stranger.identity("other").key)
    with (
        pytest.raises(ConfigurationError) as refused,
        ReceivePort(secure.model_copy(update={"tls": wrong}), make_inbox()),
    ):
        pass
    assert refused.value.code == "pacs-tls"
    with pytest.raises(ConfigurationError) as refused:
        echo(DicomPeer(ae_title="A", host="127.0.0.1", port=1, tls=PeerTls(ca_file=ours.key)))
    assert refused.value.code == "pacs-tls"


def test_a_certificate_without_its_key_is_refused(ours: Identity) -> None:
    with pytest.raises(ValidationError, match="key_file"):
        PeerTls(certificate_file=ours.certificate)
