"""The ``[pacs]`` table of a policy: who the site's own PACS is, and what is received from it and sent to it.

[pacs]
folder = "/srv/medveil/pacs"               # private: what is received, the releases made of it, the send queue

[pacs.dicom]                               # the PACS over DIMSE: C-FIND, C-MOVE, C-GET, C-STORE
ae_title = "HOSPITAL"
host = "pacs.hospital.example"
port = 104

[pacs.dicom.tls]                           # ... with TLS
ca_file = "/etc/medveil/hospital-ca.pem"

[pacs.web]                                 # the PACS over DICOMweb, instead or as well
url = "https://pacs.hospital.example/dicom-web"
ca_file = "/etc/medveil/hospital-ca.pem"

[pacs.receive]                             # our receive port; C-MOVE brings images through it, too
port = 11112
senders = [{ ae_title = "HOSPITAL", addresses = ["10.0.0.7"] }]

[pacs.receive.tls]                         # ... with TLS
certificate_file = "/etc/medveil/dicom.pem"
key_file = "/etc/medveil/dicom-key.pem"
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    HttpUrl,
    IPvAnyAddress,
    SecretStr,
    model_validator,
)

__all__ = [
    "MAXIMUM_USED",
    "MINIMUM_FREE_BYTES",
    "DicomPeer",
    "KnownSender",
    "PacsPolicy",
    "PeerTls",
    "PortTls",
    "ReceiveSettings",
    "WebPeer",
]

MERCURE_QUIET_S: Final = 60.0
"""Quiet period after which a series counts as complete: the default of the mercure DICOM router."""

MINIMUM_FREE_BYTES: Final = 5 * 10**9
MAXIMUM_USED: Final = 0.75
"""Disk watermarks of MONAI's Informatics Gateway: refuse below 5 GB free or above 75 % used."""

MAXIMUM_SENDERS: Final = 10
"""Associations at a time; pynetdicom's default."""


def _ae_title(text: str) -> str:
    """Return an AE title as it is compared: 1 to 16 printable characters (PS3.5 6.2, VR AE)."""
    title = text.strip(" ")
    if not 1 <= len(title) <= 16 or not title.isascii() or not title.isprintable() or "\\" in title:
        raise ValueError("an AE title has 1 to 16 printable ASCII characters and no backslash")
    return title


AeTitle = Annotated[str, AfterValidator(_ae_title)]
Port = Annotated[int, Field(ge=0, le=65535)]


class PeerTls(BaseModel):
    """How the PACS is called over TLS.

    Attributes:
        ca_file: PEM file of the authority that signed the PACS's certificate; None trusts the system's.
        server_name: name in its certificate; None: the peer's ``host``.
        certificate_file: PEM file with our certificate, where the PACS asks for one.
        key_file: PEM file with its private key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca_file: FilePath | None = None
    server_name: str | None = None
    certificate_file: FilePath | None = None
    key_file: FilePath | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("give certificate_file and key_file, or neither")
        return self


class PortTls(BaseModel):
    """How we are called over TLS; who calls without it is not served.

    Attributes:
        certificate_file: PEM file with our certificate.
        key_file: PEM file with its private key.
        ca_file: PEM file of the authority that signs the senders' certificates; None asks them for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate_file: FilePath
    key_file: FilePath
    ca_file: FilePath | None = None


class DicomPeer(BaseModel):
    """The PACS as it is reached over DIMSE.

    Attributes:
        ae_title: its AE title.
        host: name or address.
        port: its DICOM port.
        calling_ae_title: how we introduce ourselves; the PACS has to know it.
        tls: how it is called over TLS; None: in clear.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ae_title: AeTitle
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    calling_ae_title: AeTitle = "MEDVEIL"
    tls: PeerTls | None = None


class WebPeer(BaseModel):
    """The PACS as it is reached over DICOMweb.

    Attributes:
        url: root of its QIDO-RS, WADO-RS and STOW-RS services.
        user: name for HTTP basic authentication, with ``password``.
        password: the password; never printed.
        token: bearer token, instead of a name and a password; never printed.
        ca_file: PEM file of the hospital's own certificate authority; None trusts the system's.
        allow_http: whether images may cross the hospital's network without TLS. Loopback always may.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    user: str | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None
    ca_file: FilePath | None = None
    allow_http: bool = False

    @model_validator(mode="after")
    def _safe(self) -> Self:
        parts = HttpUrl(self.url)  # refuses what is no web address
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("the address of the PACS holds no name, password or query")
        if parts.scheme == "http" and not self.allow_http and not _is_loopback(parts.host or ""):
            raise ValueError(
                "without https the images cross the network in clear; set allow_http to accept it"
            )
        if (self.user is None) != (self.password is None) or (
            self.user is not None and self.token is not None
        ):
            raise ValueError("give user and password, or a token, or neither")
        return self


class KnownSender(BaseModel):
    """A PACS or modality that may send to us.

    An AE title is only a claim, so the address is compared as well.

    Attributes:
        ae_title: how it introduces itself.
        addresses: IP addresses from which it may do so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ae_title: AeTitle
    addresses: Annotated[tuple[IPvAnyAddress, ...], Field(min_length=1)]


class ReceiveSettings(BaseModel):
    """The receive port.

    Attributes:
        ae_title: our AE title; calls for another one are rejected.
        host: address to listen on.
        port: DICOM port; 0 takes a free one.
        senders: who may send; nobody else.
        quiet_s: seconds without a new image after which a series counts as complete.
        minimum_free_bytes: refuse images while the disk has less left than this.
        maximum_used: refuse images while a larger share of the disk than this is in use.
        maximum_senders: associations at a time.
        tls: how we are called over TLS; None: in clear.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ae_title: AeTitle = "MEDVEIL"
    host: str = "127.0.0.1"
    port: Port = 11112
    senders: Annotated[tuple[KnownSender, ...], Field(min_length=1)]
    quiet_s: Annotated[float, Field(ge=0)] = MERCURE_QUIET_S
    minimum_free_bytes: Annotated[int, Field(ge=0)] = MINIMUM_FREE_BYTES
    maximum_used: Annotated[float, Field(gt=0, le=1)] = MAXIMUM_USED
    maximum_senders: Annotated[int, Field(ge=1)] = MAXIMUM_SENDERS
    tls: PortTls | None = None


class PacsPolicy(BaseModel):
    """The door to the PACS; a site without this table has none.

    Attributes:
        folder: private folder for what is received, the releases made of it, and the send queue.
        dicom: the PACS over DIMSE; None: not reached that way.
        web: the PACS over DICOMweb; None: not reached that way.
        receive: the receive port; None: nothing is received, and nothing can be pulled by C-MOVE.
        keep_received: whether the received originals stay after every protected copy of their study was verified in
            the PACS. They came from there, so a site short of disk may let them go.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    dicom: DicomPeer | None = None
    web: WebPeer | None = None
    receive: ReceiveSettings | None = None
    keep_received: bool = True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
