from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from medveil.coordinator.pki import (
    Authority,
    Role,
    caller,
    create_authority,
    load_authority,
    new_token,
    parse_request,
    parse_request_file,
    token_hash,
)
from medveil.models.errors import ConfigurationError, RefusedError, StorageError
from medveil.protos.v1.conventions import expiry

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "authority", NOW)


def request(key: object = None, subject: str = "") -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
    key = key or ec.generate_private_key(ec.SECP256R1())
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]


def test_the_name_is_the_coordinators_choice_and_not_the_requests(authority: Authority) -> None:
    issued = authority.issue_client(parse_request(request(subject="someone-else")), Role.SITE, "st-anna", NOW)
    who = caller(issued.chain_pem)
    assert (who.role, who.name, who.serial) == (Role.SITE, "st-anna", issued.serial)
    assert b"someone-else" not in issued.certificate.public_bytes(serialization.Encoding.DER)


def test_an_independent_verifier_accepts_the_certificates_for_their_purpose_only(
    authority: Authority,
) -> None:
    issued, _ = authority.issue_server(["coordinator.example", "127.0.0.1"], NOW)
    client = authority.issue_client(parse_request(request()), Role.SITE, "a", NOW)
    policy = PolicyBuilder().store(Store([authority.certificate])).time(NOW.replace(tzinfo=None))
    server = policy.build_server_verifier(x509.DNSName("coordinator.example"))
    assert server.verify(issued.certificate, [])
    with pytest.raises(VerificationError):
        server.verify(client.certificate, [])
    assert policy.build_client_verifier().verify(client.certificate, [])
    with pytest.raises(VerificationError):
        policy.build_client_verifier().verify(issued.certificate, [])


def test_the_authority_survives_a_restart_and_is_never_replaced(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    assert load_authority(folder).fingerprint == authority.fingerprint
    with pytest.raises(StorageError) as refused:
        create_authority(folder, NOW)
    assert refused.value.code == "authority-exists"
    assert load_authority(folder).fingerprint == authority.fingerprint
    assert (folder / "authority-key.pem").stat().st_mode & 0o077 == 0


def test_a_key_and_a_certificate_that_do_not_belong_together_are_refused(
    authority: Authority, tmp_path: Path
) -> None:
    other = create_authority(tmp_path / "other", NOW)
    (tmp_path / "authority" / "authority.pem").write_bytes(other.certificate_pem)
    with pytest.raises(ConfigurationError):
        load_authority(tmp_path / "authority")
    with pytest.raises(ConfigurationError):
        load_authority(tmp_path / "nowhere")


def tampered() -> bytes:
    der = bytearray(request())
    der[-1] ^= 1
    return bytes(der)


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"not a request",
        b"\0" * 5000,
        request(ec.generate_private_key(ec.SECP384R1())),
        request(ed25519.Ed25519PrivateKey.generate()),
        request(rsa.generate_private_key(65537, 2048)),
        tampered(),
    ],
    ids=["empty", "text", "long", "p384", "ed25519", "rsa", "tampered"],
)
def test_anything_but_a_proven_p256_key_is_refused(der: bytes) -> None:
    with pytest.raises(RefusedError) as refused:
        parse_request(der)
    assert refused.value.code == "signing-request"


@pytest.mark.parametrize(
    "text", ["", "{}", '{"kind": "medveil-join-request", "version": 1, "signing_request": "?"}']
)
def test_a_file_that_is_no_request_is_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        parse_request_file(text)


@pytest.mark.parametrize("name", ["", "St Anna", "a:b", "-a", "a" * 64, "a\n", "ä"])
def test_a_name_that_could_be_misread_is_refused(authority: Authority, name: str) -> None:
    with pytest.raises(ConfigurationError):
        authority.issue_client(parse_request(request()), Role.SITE, name, NOW)


def test_a_certificate_without_our_name_in_it_is_nobody(authority: Authority) -> None:
    issued, _ = authority.issue_server(["coordinator.example"], NOW)
    for pem in (issued.chain_pem, authority.certificate_pem, b""):
        with pytest.raises(RefusedError):
            caller(pem)


@pytest.mark.parametrize(
    ("days", "notice"),
    [(61, None), (60, None), (59, 60), (30, 60), (29, 30), (7, 30), (6, 7), (0, 7), (-1, 0)],
)
def test_expiry_is_announced_at_60_30_and_7_days(days: int, notice: int | None) -> None:
    status = expiry(NOW + timedelta(days=days), NOW)
    assert (status.days, status.notice) == (days, notice if days else 0)


def test_a_token_survives_dictation_and_its_text_is_not_shown_by_accident() -> None:
    token = new_token()
    assert token_hash(f" {token.text.lower().replace('-', ' ')} ") == token.hash
    assert token.text not in repr(token)
    assert new_token().text != token.text
