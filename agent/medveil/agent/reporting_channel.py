"""The line behind the door: a TLS channel to one coordinator, and what its failures mean to the steward."""

from __future__ import annotations

import re
import socket
import ssl
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from medveil.models.errors import ConfigurationError, MedveilError, RefusedError
from medveil.protos.v1.conventions import CODE_METADATA, same_fingerprint

__all__ = ["fetch_authority", "open_channel", "translated"]

_GREETING_S: Final = 30.0
_CODE: Final = re.compile(r"[a-z0-9-]{1,40}")
_MAX_SENTENCE: Final = 200
"""A coordinator's text is shown, but it shall not fill the steward's screen."""


def open_channel(
    address: str, authority_pem: bytes, identity: tuple[bytes, bytes] | None, *, now: datetime | None = None
) -> Any:
    """Return a TLS channel that trusts one authority only. It connects at the first call.

    A server that refuses our certificate only hangs up, so what it would refuse is named here instead.

    Args:
        address: ``host:port``.
        authority_pem: the coordinator's certificate authority.
        identity: the site's private key and certificate chain as PEM; None for the enrolment port.
        now: the moment to check the certificate at; None: the clock's.

    Raises:
        RefusedError: ``certificate-expired`` or ``certificate-foreign``.
    """
    import grpc  # late: the many commands that send nothing start without it

    key, chain = identity or (None, None)
    if chain is not None:
        _check_own(chain, authority_pem, now or datetime.now(UTC))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority_pem, key, chain))


def _check_own(chain_pem: bytes, authority_pem: bytes, now: datetime) -> None:
    certificate = x509.load_pem_x509_certificates(chain_pem)[0]
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority_pem))
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise RefusedError(
            "certificate-foreign", "This site's certificate is not from this coordinator; join it first."
        ) from exc
    if now >= certificate.not_valid_after_utc:
        raise RefusedError(
            "certificate-expired", "This site's certificate has expired; ask for a new invitation."
        )


def fetch_authority(address: str, fingerprint: str, *, timeout_s: float = _GREETING_S) -> bytes:
    """Return the coordinator's authority certificate (DER) if it is the one that was read out by phone.

    Nothing is sent but the greeting of TLS: only what comes back under the right fingerprint is trusted.

    Raises:
        ConfigurationError: ``unreachable``.
        RefusedError: ``fingerprint``.
    """
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            # Public from Python 3.13 on; until then the same call, one level down.
            chain = getattr(tls, "get_unverified_chain", None) or tls._sslobj.get_unverified_chain  # type: ignore[attr-defined]
            presented = [item if isinstance(item, bytes) else _der(item) for item in chain()]
    except (OSError, ValueError) as exc:
        raise _unreachable(str(exc)) from exc
    for der in presented:
        if same_fingerprint(fingerprint, der):
            return der
    raise RefusedError(
        "fingerprint", "The coordinator's fingerprint is not the one you were told. Do not join; call them."
    )


def _der(certificate: Any) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.public_bytes())


def _unreachable(private: str) -> ConfigurationError:
    return ConfigurationError(
        "unreachable",
        "The coordinator does not answer; check address and network, or try again later.",
        private=private,
    )


def translated(exc: Any) -> MedveilError:
    """Return what a failed call (`grpc.RpcError`) means; the coordinator's own word if it sent one."""
    said = str(exc.details() or "")
    details = said[:_MAX_SENTENCE]
    code = dict(exc.trailing_metadata() or ()).get(CODE_METADATA, "")
    if _CODE.fullmatch(code):
        return RefusedError(code, details)
    if "certificate is not yet valid" in said:
        return RefusedError(
            "clock-off", "This site's clock is behind the coordinator's; set it by NTP.", private=details
        )
    if "certificate has expired" in said:
        return RefusedError(
            "coordinator-certificate-expired",
            "The coordinator's certificate has expired, or this site's clock is ahead; check it, then call them.",
            private=details,
        )
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return RefusedError(
            "unknown-authority",
            "The other end is not the coordinator that this site joined; nothing was sent to it.",
            private=details,
        )
    return _unreachable(details)
