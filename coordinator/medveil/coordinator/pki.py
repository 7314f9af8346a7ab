"""The coordinator's small certificate authority, and who a certificate says its holder is.

    authority (10 years, on the coordinator's disk)
    +-- server certificate      EKU serverAuth, the coordinator's host names
    +-- site certificate        EKU clientAuth, SAN urn:medveil:site:NAME
    +-- operator certificate    EKU clientAuth, SAN urn:medveil:operator:NAME

A site's private key is made at the site; only a PKCS #10 request travels, and nothing in the request but its
key is believed. P-256 throughout: gRPC's TLS library does not accept Ed25519 certificates by default.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import BaseModel, ConfigDict, ValidationError

from medveil.models.disk import write_new
from medveil.models.errors import ConfigurationError, RefusedError, StorageError
from medveil.protos.v1.conventions import SITE_NAME, phone_fingerprint

__all__ = [
    "Authority",
    "Caller",
    "Issued",
    "Role",
    "Token",
    "accept_file",
    "caller",
    "create_authority",
    "load_authority",
    "new_token",
    "parse_request",
    "parse_request_file",
    "token_hash",
]

_AUTHORITY_LIFE: Final = timedelta(days=3650)
_LEAF_LIFE: Final = timedelta(days=365)
"""Our choice: once a year is rare enough for a hospital and often enough that renewal stays practised."""
_CLOCK_SKEW: Final = timedelta(hours=1)
"""A certificate is valid from an hour before it is made: a site's clock may be behind."""
_CURVE: Final = ec.SECP256R1()
_KEY_FILE: Final = "authority-key.pem"
_CERTIFICATE_FILE: Final = "authority.pem"
_MAX_REQUEST_BYTES: Final = 4096  # a P-256 request takes about 250
_TOKEN_BYTES: Final = 20
"""160 bits, so that guessing is hopeless without any limit on attempts."""
_ACCEPT_KIND: Final = "medveil-join-accept"


class Role(StrEnum):
    """What a client certificate lets its holder do."""

    SITE = "site"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling, from the client certificate and nothing else."""

    role: Role
    name: str
    serial: int


@dataclass(frozen=True, slots=True)
class Issued:
    """A signed certificate.

    Attributes:
        chain_pem: the certificate, then the authority's.
        serial: its serial number.
        not_after: end of validity, UTC.
    """

    certificate: x509.Certificate
    chain_pem: bytes
    serial: int
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Token:
    """A one-time invitation. Only its hash is stored."""

    text: str = field(repr=False)
    hash: str


@dataclass(frozen=True, slots=True)
class Authority:
    """The certificate authority, ready to sign."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        """The public half, which anyone may have."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """Eight groups of four, to compare over the phone before a token is used."""
        return phone_fingerprint(self.certificate.public_bytes(serialization.Encoding.DER))

    def issue_server(self, names: Sequence[str], now: datetime) -> tuple[Issued, bytes]:
        """Make a key and sign a certificate for the coordinator's own host names and addresses.

        Returns:
            The certificate and its private key as PEM.
        """
        key = ec.generate_private_key(_CURVE)
        issued = self._sign(
            key.public_key(), names[0], [_host(name) for name in names], ExtendedKeyUsageOID.SERVER_AUTH, now
        )
        return issued, _private_pem(key)

    def issue_client(
        self, request: x509.CertificateSigningRequest, role: Role, name: str, now: datetime
    ) -> Issued:
        """Sign the key of a request under a name of the coordinator's choice.

        Raises:
            ConfigurationError: ``site-name``: the name is not one label of lower-case letters, digits, dashes.
        """
        if not SITE_NAME.fullmatch(name):
            raise ConfigurationError(
                "site-name",
                "A site's name has up to 63 lower-case letters, digits and dashes; choose such a one.",
            )
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise _bad_request("the key is not on an elliptic curve")
        uri = x509.UniformResourceIdentifier(f"urn:medveil:{role}:{name}")
        return self._sign(key, name, [uri], ExtendedKeyUsageOID.CLIENT_AUTH, now)

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        alternatives: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        now: datetime,
    ) -> Issued:
        certificate = (
            _builder(_name(name), self.certificate.subject, key, now, _LEAF_LIFE)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        return Issued(
            certificate,
            pem + self.certificate_pem,
            certificate.serial_number,
            certificate.not_valid_after_utc,
        )


def create_authority(folder: Path, now: datetime) -> Authority:
    """Make a new authority in a folder.

    Raises:
        StorageError: ``authority-exists``: another one would lock out every site of the first;
            ``not-writable``.
    """
    key = ec.generate_private_key(_CURVE)
    name = _name("medveil coordinator")
    certificate = (
        _builder(name, name, key.public_key(), now, _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage_of_an_authority(), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority = Authority(certificate, key)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Exclusive creation: two coordinators started at once cannot both win.
        write_new(folder / _KEY_FILE, _private_pem(key), mode=0o600)
        (folder / _CERTIFICATE_FILE).write_bytes(authority.certificate_pem)
    except FileExistsError as exc:
        raise StorageError("authority-exists", "This folder already holds a certificate authority.") from exc
    except OSError as exc:
        raise StorageError(
            "not-writable", "The authority's folder cannot be written to.", private=str(exc)
        ) from exc
    return authority


def load_authority(folder: Path) -> Authority:
    """Read the authority of a folder.

    Raises:
        ConfigurationError: ``no-authority``: there is none, or what is there does not belong together.
    """
    try:
        key = serialization.load_pem_private_key((folder / _KEY_FILE).read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / _CERTIFICATE_FILE).read_bytes())
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigurationError(
            "no-authority", "There is no certificate authority here; run medveil-coordinator init first."
        ) from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigurationError(
            "no-authority", "The authority's key and certificate do not belong together."
        )
    return Authority(certificate, key)


def caller(certificate_pem: bytes) -> Caller:
    """Return whom a client certificate names; its signature and dates were checked in the TLS handshake.

    Raises:
        RefusedError: ``identity``: it names no site and no operator.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        (uri,) = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        scheme, product, role, name = uri.split(":")
        if (scheme, product) != ("urn", "medveil") or not SITE_NAME.fullmatch(name):
            raise ValueError(uri)
        return Caller(Role(role), name, certificate.serial_number)
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise RefusedError("identity", "The client certificate names no site and no operator.") from exc


def parse_request(der: bytes) -> x509.CertificateSigningRequest:
    """Return a signing request whose sender holds the private key.

    Raises:
        RefusedError: ``signing-request``.
    """
    if len(der) > _MAX_REQUEST_BYTES:
        raise _bad_request("too long")
    try:
        request = x509.load_der_x509_csr(der)
        proven, key = request.is_signature_valid, request.public_key()
    except (ValueError, InvalidSignature) as exc:
        raise _bad_request(str(exc)) from exc
    if not proven:
        raise _bad_request("the signature does not match")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != _CURVE.name:
        raise _bad_request("the key is not on P-256")
    return request


def new_token() -> Token:
    """Return a fresh invitation, in groups that can be read out."""
    letters = base64.b32encode(secrets.token_bytes(_TOKEN_BYTES)).decode("ascii")
    text = "-".join(letters[i : i + 4] for i in range(0, len(letters), 4))
    return Token(text, token_hash(text))


def token_hash(text: str) -> str:
    """Return what is stored of a token; case, spaces and dashes don't matter."""
    letters = re.sub(r"[\s-]", "", text).upper()
    return hashlib.sha256(b"medveil token 1\0" + letters.encode("utf-8")).hexdigest()


# Sites without a connection: two small files, carried by hand
# ------------------------------------------------------------------------------------------------


class _RequestFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["medveil-join-request"]
    version: Literal[1]
    signing_request: str


def parse_request_file(text: str) -> x509.CertificateSigningRequest:
    """Read the file of an air-gapped site; the operator compares the key's fingerprint over the phone.

    Raises:
        RefusedError: ``signing-request``.
    """
    try:
        content = _RequestFile.model_validate_json(text)
        der = base64.b64decode(content.signing_request, validate=True)
    except (ValidationError, binascii.Error) as exc:
        raise _bad_request("not a request file") from exc
    return parse_request(der)


def accept_file(site: str, issued: Issued) -> str:
    """Return the text of the file that goes back to an air-gapped site."""
    chain = [
        base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode("ascii")
        for certificate in x509.load_pem_x509_certificates(issued.chain_pem)
    ]
    return json.dumps({"kind": _ACCEPT_KIND, "version": 1, "site": site, "certificates": chain}, indent=2)


def _bad_request(private: str) -> RefusedError:
    return RefusedError(
        "signing-request",
        "This is no signing request that medveil-agent made; make a new one.",
        private=private,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage_of_an_authority() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
