"""How a site joins: its key is made here and never leaves; a request goes out, a certificate comes back.

    begin_joining           key on the disk, request in hand
    join                    over the network, with a one-time token        (or)
    request_file / accept   two files carried by hand, for a site without a connection
    renew                   a new key and certificate; the old ones work until the moment of the change

Key and certificate lie in one file that is replaced in one step, so they always belong together.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from pydantic import BaseModel, ConfigDict, ValidationError

from medveil.agent.egress import Door
from medveil.agent.reporting_channel import fetch_authority, open_channel
from medveil.agent.reporting_log import EgressLog
from medveil.models.disk import disk_errors, make_private_folder, write_atomically
from medveil.models.errors import ConfigurationError, RefusedError
from medveil.protos.v1 import services_pb2
from medveil.protos.v1.conventions import methods, phone_fingerprint, same_fingerprint

__all__ = [
    "Identity",
    "accept",
    "begin_joining",
    "identity_file",
    "join",
    "key_fingerprint",
    "load_identity",
    "renew",
    "request_file",
]

_PENDING: Final = "pending-key.pem"
_IDENTITY: Final = "identity.pem"
_KIND_REQUEST: Final = "medveil-join-request"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this site is to its coordinator.

    Attributes:
        site: the coordinator's name for it.
        key_pem: private key.
        chain_pem: the site's certificate, then the authority's.
        authority_pem: the only authority that this site trusts.
        not_after: end of the certificate's validity, UTC.
    """

    site: str
    key_pem: bytes = field(repr=False)
    chain_pem: bytes
    authority_pem: bytes
    not_after: datetime


def begin_joining(folder: Path) -> bytes:
    """Make a key, or take the one of an attempt that was not finished, and return the request (DER).

    Raises:
        StorageError: the key cannot be stored.
        ConfigurationError: ``key-unreadable``.
    """
    make_private_folder(folder)
    path = folder / _PENDING
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_atomically(path, _private_pem(key), mode=0o600)
    # The subject is empty: the coordinator decides on the name.
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(_load_key(path), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def join(address: str, token: str, fingerprint: str, folder: Path, log: EgressLog) -> Identity:
    """Join over the network. After a failure the same call goes on with the same key.

    Args:
        address: ``host:port`` of the enrolment port.
        token: from the invitation.
        fingerprint: the authority's, as read out by phone.
        folder: the site's private folder.
        log: the egress log.

    Raises:
        RefusedError: ``fingerprint``, ``token-unknown``, ``token-replayed``, ``token-expired``.
        ConfigurationError: ``unreachable``.
    """
    authority = fetch_authority(address, fingerprint)
    request = begin_joining(folder)
    with open_channel(address, _as_pem(authority), None) as channel:
        message = services_pb2.JoinRequest(token=token.strip(), signing_request_der=request)
        reply = Door(channel, log).send(methods("EnrolmentService")["Join"], message)
    return _adopt(folder, list(reply.certificate_der), authority)


def request_file(folder: Path) -> str:
    """Return the text of the file that an operator approves; compare `key_fingerprint` by phone."""
    encoded = base64.b64encode(begin_joining(folder)).decode("ascii")
    return json.dumps({"kind": _KIND_REQUEST, "version": 1, "signing_request": encoded}, indent=2)


def key_fingerprint(folder: Path) -> str:
    """Return the pending key's fingerprint, to be read out to the operator.

    Raises:
        ConfigurationError: ``key-unreadable``: no request is pending.
    """
    return phone_fingerprint(_public(_load_key(folder / _PENDING)))


class _AcceptFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["medveil-join-accept"]
    version: Literal[1]
    site: str
    certificates: list[str]


def accept(folder: Path, text: str, fingerprint: str) -> Identity:
    """Take the file that came back.

    Raises:
        RefusedError: ``accept-file``: it is none, or not for this site's key; ``fingerprint``.
    """
    try:
        certificates = [
            base64.b64decode(item, validate=True)
            for item in _AcceptFile.model_validate_json(text).certificates
        ]
    except (ValidationError, binascii.Error) as exc:
        raise _not_ours("not an accept file") from exc
    authority = next((der for der in certificates if same_fingerprint(fingerprint, der)), None)
    if authority is None:
        raise RefusedError(
            "fingerprint", "The file's authority is not the one you were told; call the coordinator."
        )
    return _adopt(folder, certificates, authority)


def renew(folder: Path, door: Door) -> Identity:
    """Get a certificate for a new key, over a channel that the old one opened.

    Raises:
        RefusedError: the coordinator refused, or answered for another key or from another authority.
        ConfigurationError: ``unreachable``.
    """
    authority = _as_der(load_identity(folder).authority_pem)
    message = services_pb2.RenewRequest(signing_request_der=begin_joining(folder))
    reply = door.send(methods("CampaignService")["Renew"], message)
    return _adopt(folder, list(reply.certificate_der), authority)


def identity_file(folder: Path) -> Path:
    """Return the file of key, certificate and authority, in the order in which TLS libraries read them."""
    return folder / _IDENTITY


def load_identity(folder: Path) -> Identity:
    """Return who this site is.

    Raises:
        ConfigurationError: ``not-joined``.
    """
    try:
        content = (folder / _IDENTITY).read_bytes()
        key = serialization.load_pem_private_key(content, None)
        certificate, authority = x509.load_pem_x509_certificates(content)
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
    except (OSError, ValueError, TypeError, x509.ExtensionNotFound) as exc:
        raise ConfigurationError("not-joined", "This site has not joined a coordinator; run join.") from exc
    return Identity(
        site=uri.rpartition(":")[2],
        key_pem=_private_pem(key),
        chain_pem=_pem(certificate) + _pem(authority),
        authority_pem=_pem(authority),
        not_after=certificate.not_valid_after_utc,
    )


def _as_pem(der: bytes) -> bytes:
    return _pem(x509.load_der_x509_certificate(der))


def _as_der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)


def _adopt(folder: Path, certificates: Sequence[bytes], authority_der: bytes) -> Identity:
    """Store a certificate if it is for our pending key and from the authority that we trust."""
    key = _load_key(folder / _PENDING)
    try:
        authority = x509.load_der_x509_certificate(authority_der)
        certificate = x509.load_der_x509_certificate(certificates[0])
        certificate.verify_directly_issued_by(authority)
    except (IndexError, ValueError, TypeError, InvalidSignature) as exc:
        raise _not_ours(str(exc)) from exc
    if certificate.public_key() != key.public_key():
        raise _not_ours("certificate for another key")
    content = _private_pem(key) + _pem(certificate) + _pem(authority)
    write_atomically(folder / _IDENTITY, content, mode=0o600)
    with disk_errors():
        (folder / _PENDING).unlink()
    return load_identity(folder)


def _not_ours(private: str) -> RefusedError:
    return RefusedError(
        "accept-file", "The answer holds no certificate for this site's key; begin again.", private=private
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigurationError(
            "key-unreadable", "No request is pending here; begin joining again."
        ) from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError("key-unreadable", "The pending key is no key that medveil made.")
    return key


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
