"""What both sides hold fixed beside the protos: limits, bin edges, method paths, names and fingerprints."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from google.protobuf.message_factory import GetMessageClass

from medveil.protos.v1 import services_pb2

__all__ = [
    "CODE_METADATA",
    "MAX_MESSAGE_BYTES",
    "PSNR_EDGES_DB",
    "SITE_NAME",
    "SSIM_EDGES",
    "Expiry",
    "Method",
    "expiry",
    "methods",
    "phone_fingerprint",
    "same_fingerprint",
]

MAX_MESSAGE_BYTES: Final = 64 * 1024
"""Largest message a site may send. A federation was blocked for hours by a payload of 758 MB; ours can't."""

PSNR_EDGES_DB: Final = tuple(float(edge) for edge in range(24, 62, 2))
"""Inner edges of the PSNR histogram in dB; below the first and from the last on are bins of their own."""

SSIM_EDGES: Final = (0.80, 0.85, 0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999)
"""Inner edges of the SSIM histogram, finer where released images lie."""

CODE_METADATA: Final = "medveil-code"
"""Trailing metadata of a refusal: the stable word of the error."""

SITE_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""A site's name, chosen by the coordinator: the form of one label of a host name."""

_NOTICES_DAYS: Final = (7, 30, 60)
"""Days before a certificate's expiry at which its state becomes more urgent."""

_FINGERPRINT_BYTES: Final = 20
"""160 bits of SHA-256: a second certificate with the same fingerprint is out of reach."""
_GROUP: Final = 4


@dataclass(frozen=True, slots=True)
class Expiry:
    """How long a certificate lasts.

    Attributes:
        days: whole days left; negative: expired.
        notice: 60, 30 or 7 when fewer days than that are left, 0 when it is expired, None before.
    """

    days: int
    notice: int | None


def expiry(not_after: datetime, now: datetime) -> Expiry:
    """Return how long is left, and which notice is due."""
    days = (not_after - now) // timedelta(days=1)
    if now >= not_after:
        return Expiry(days, 0)
    return Expiry(days, next((notice for notice in _NOTICES_DAYS if days < notice), None))


@dataclass(frozen=True, slots=True)
class Method:
    """One remote call, read from the compiled protos.

    Attributes:
        path: ``/package.Service/Method``.
        request: message class.
        reply: message class.
        streams: whether the server answers with a stream.
    """

    path: str
    request: Any
    reply: Any
    streams: bool


def methods(service: str) -> dict[str, Method]:
    """Return a service's methods by name.

    Raises:
        KeyError: there is no such service.
    """
    descriptor = services_pb2.DESCRIPTOR.services_by_name[service]
    return {
        method.name: Method(
            f"/{descriptor.full_name}/{method.name}",
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            method.server_streaming,
        )
        for method in descriptor.methods
    }


def phone_fingerprint(der: bytes) -> str:
    """Return eight groups of four letters or digits that two people can compare over the phone.

    Base32 has neither 0, 1, 8 nor 9, so nothing is misheard as a letter.

    Args:
        der: a certificate, or a public key.
    """
    letters = base64.b32encode(hashlib.sha256(der).digest()[:_FINGERPRINT_BYTES]).decode("ascii")
    return "-".join(letters[i : i + _GROUP] for i in range(0, len(letters), _GROUP))


def same_fingerprint(typed: str, der: bytes) -> bool:
    """Return whether a typed fingerprint is that of ``der``; case, spaces and dashes don't matter."""
    return re.sub(r"[\s-]", "", typed).upper() == phone_fingerprint(der).replace("-", "")
