"""The receive port: a C-STORE service that writes what known senders send, and does nothing else.

The handler neither parses nor decodes: the bytes go to the inbox as they came, and the answer says whether
they are safely on the disk. A sender that is told "out of resources" keeps the object and tries again.
"""

from __future__ import annotations

import ipaddress
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final, Self, cast

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from medveil.agent.imageio.dicom_header import READABLE
from medveil.agent.imageio.pacs.inbox import Inbox
from medveil.agent.imageio.pacs.web import port_context
from medveil.agent.pacs_policy import ReceiveSettings
from medveil.models.errors import ConfigurationError, ImageError, StorageError

__all__ = ["ReceivePort"]

SUCCESS: Final = 0x0000
REFUSED_NOT_AUTHORIZED: Final = 0x0124  # PS3.7 C.4
OUT_OF_RESOURCES: Final = 0xA700  # PS3.4 table B.2-1
CANNOT_UNDERSTAND: Final = 0xC000

SILENT_PEER_S: Final = 60.0
"""A sender that says nothing for this long has gone; its association is closed. Our choice."""


class ReceivePort(AbstractContextManager["ReceivePort"]):
    """Listens while its block runs.

    Every storage class is offered, each in the transfer syntaxes that medveil reads: a PACS transcodes the
    rest on its side, or says that it cannot.
    """

    def __init__(self, settings: ReceiveSettings, inbox: Inbox) -> None:
        """Describe the port; ``__enter__`` opens it."""
        self._settings = settings
        self._inbox = inbox
        self._addresses = {
            sender.ae_title: {_plain(str(address)) for address in sender.addresses}
            for sender in settings.senders
        }
        self._entity: AE | None = None
        self._server: ThreadedAssociationServer | None = None

    def __enter__(self) -> Self:
        """Start listening.

        Raises:
            ConfigurationError: ``port-in-use`` or ``pacs-tls``.
        """
        tls = self._settings.tls
        context = None if tls is None else port_context(tls)
        self._entity = entity = AE(self._settings.ae_title)
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._addresses)
        entity.maximum_associations = self._settings.maximum_senders
        entity.network_timeout = SILENT_PEER_S
        entity.add_supported_context(Verification)
        for kind in AllStoragePresentationContexts:
            entity.add_supported_context(kind.abstract_syntax or "", sorted(READABLE))
        try:
            self._server = entity.start_server(
                (self._settings.host, self._settings.port),
                block=False,
                ssl_context=context,
                evt_handlers=[(evt.EVT_C_STORE, self._store), (evt.EVT_C_ECHO, self._echo)],
            )
        except OSError as exc:
            raise ConfigurationError(
                "port-in-use",
                "The receive port cannot be opened; choose another port or address.",
                private=str(exc),
            ) from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening and abort what is under way: its sender was not told "stored" and keeps it."""
        if self._entity is not None:
            self._entity.shutdown()
            self._entity = self._server = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        if self._server is None:
            raise ValueError("the receive port is not open")
        return int(self._server.server_address[1])

    def _is_known(self, event: Event) -> bool:
        requestor = event.assoc.requestor
        return _plain(requestor.address) in self._addresses.get(requestor.ae_title.strip(), ())

    def _echo(self, event: Event) -> int:
        return SUCCESS if self._is_known(event) else REFUSED_NOT_AUTHORIZED

    def _store(self, event: Event) -> int:
        if not self._is_known(event):
            return REFUSED_NOT_AUTHORIZED
        request = cast(C_STORE, event.request)
        try:
            self._inbox.accept(str(request.AffectedSOPInstanceUID), event.encoded_dataset())
        except StorageError:
            return OUT_OF_RESOURCES
        except ImageError:
            return CANNOT_UNDERSTAND
        return SUCCESS


def _plain(address: str) -> str:
    """Return an address as it is compared: IPv4 also where it arrives mapped into IPv6."""
    parsed = ipaddress.ip_address(address)
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
