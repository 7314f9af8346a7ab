"""The gRPC front of `operations`: mutual TLS, one port for enrolment, one for everything else.

The caller is who the client certificate says; nothing in a message can name another site. A refusal carries its
stable word in the trailing metadata; what went wrong in private stays in the coordinator's own log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from medveil.coordinator import operations
from medveil.coordinator.pki import Authority, Caller, Issued, Role, caller
from medveil.coordinator.reports import canonical
from medveil.coordinator.store import Store
from medveil.models.errors import ConfigurationError, InputError, MedveilError, RefusedError, StorageError
from medveil.protos.v1 import campaign_pb2, services_pb2, status_pb2
from medveil.protos.v1.conventions import CODE_METADATA, MAX_MESSAGE_BYTES, expiry, methods

__all__ = ["StatusServer"]

_LOG: Final = logging.getLogger(__name__)
_WORKERS: Final = 16
_MAX_WATCHERS: Final = 4
"""A watcher holds a worker for as long as it looks; sites must not wait for them."""
_WATCH_INTERVAL_S: Final = 1.0
_SHORTEST_INTERVAL_S: Final = 0.2
_RENEW_DAYS: Final = 30
_STATUS: Final = (
    (StorageError, grpc.StatusCode.UNAVAILABLE),  # the site keeps its message and tries again
    (RefusedError, grpc.StatusCode.PERMISSION_DENIED),
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (ConfigurationError, grpc.StatusCode.FAILED_PRECONDITION),
)


class StatusServer:
    """Both services on their ports, from `start` to `stop`. The server's own key lives in memory only."""

    def __init__(
        self,
        store: Store,
        authority: Authority,
        names: Sequence[str],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Prepare the services.

        Args:
            store: open store; the server does not close it.
            authority: signs server and client certificates.
            names: host names and addresses under which sites reach this machine.
            now: the clock.
        """
        self._store, self._authority, self._names, self._now = store, authority, names, now
        self._renewal = threading.Lock()
        self._own: dict[bool, Issued] = {}  # by whether the port asks for a client certificate
        self._watchers = threading.BoundedSemaphore(_MAX_WATCHERS)
        self._stopping = threading.Event()
        self._servers: list[Any] = []

    def start(self, host: str, *, campaign_port: int = 0, enrolment_port: int = 0) -> tuple[int, int]:
        """Listen; port 0 takes a free one.

        Returns:
            The campaign port (mutual TLS) and the enrolment port (server certificate only).

        Raises:
            ConfigurationError: ``port``: one of them is taken.
        """
        both = (
            ("CampaignService", self._campaign_calls(), campaign_port, True),
            ("EnrolmentService", {"Join": self._join}, enrolment_port, False),
        )
        ports = [self._serve(name, calls, f"{host}:{port}", mutual) for name, calls, port, mutual in both]
        return ports[0], ports[1]

    def stop(self, grace_s: float = 1.0) -> None:
        """Let calls in progress end, then close both ports."""
        self._stopping.set()
        for ended in [server.stop(grace_s) for server in self._servers]:
            ended.wait()

    def _serve(self, service: str, calls: dict[str, Any], address: str, mutual: bool) -> int:
        table = methods(service)
        handlers = {name: _handler(table[name].streams, call) for name, call in calls.items()}
        server = grpc.server(
            ThreadPoolExecutor(_WORKERS, thread_name_prefix=service),
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
        )
        full_name = services_pb2.DESCRIPTOR.services_by_name[service].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(full_name, handlers),))
        try:
            port = server.add_secure_port(address, self._credentials(mutual))
        except RuntimeError as exc:
            raise ConfigurationError(
                "port", f"Nothing can listen at {address}; choose another port."
            ) from exc
        server.start()
        self._servers.append(server)
        return int(port)

    # The server's certificate: renewed between two handshakes, without a restart
    # ----------------------------------------------------------------------------------------------

    def _credentials(self, mutual: bool) -> Any:
        return grpc.dynamic_ssl_server_credentials(
            self._certificate(mutual), lambda: self._renewed(mutual), require_client_authentication=mutual
        )

    def _renewed(self, mutual: bool) -> Any:
        """Return a configuration if the certificate in use should be replaced, else None (keep it)."""
        with self._renewal:
            fresh = expiry(self._own[mutual].not_after, self._now()).days >= _RENEW_DAYS
        return None if fresh else self._certificate(mutual)

    def _certificate(self, mutual: bool) -> Any:
        issued, key_pem = self._authority.issue_server(self._names, self._now())
        with self._renewal:
            self._own[mutual] = issued
        roots = self._authority.certificate_pem if mutual else None
        return grpc.ssl_server_certificate_configuration([(key_pem, issued.chain_pem)], roots)

    # The calls
    # ----------------------------------------------------------------------------------------------

    def _campaign_calls(self) -> dict[str, Callable[[bytes, Any], Any]]:
        return {
            "Renew": self._renew,
            "ListOffers": self._list_offers,
            "AnswerOffer": self._answer_offer,
            "SendBeat": self._send_beat,
            "SubmitReport": self._submit_report,
            "WatchStatus": self._watch_status,
        }

    def _join(self, payload: bytes, context: Any) -> bytes:
        request = canonical(payload, services_pb2.JoinRequest)
        joined = operations.join(
            self._store, self._authority, request.token, request.signing_request_der, self._now()
        )
        return _serialised(services_pb2.JoinReply(site=joined.site, certificate_der=_chain(joined.issued)))

    def _renew(self, payload: bytes, context: Any) -> bytes:
        site = self._caller(context, Role.SITE)
        request = canonical(payload, services_pb2.RenewRequest)
        issued = operations.renew(
            self._store, self._authority, site, request.signing_request_der, self._now()
        )
        return _serialised(services_pb2.RenewReply(certificate_der=_chain(issued)))

    def _list_offers(self, payload: bytes, context: Any) -> bytes:
        site = self._caller(context, Role.SITE)
        canonical(payload, campaign_pb2.ListOffersRequest)
        return _serialised(operations.list_offers(self._store, site.name))

    def _answer_offer(self, payload: bytes, context: Any) -> bytes:
        site = self._caller(context, Role.SITE)
        request = canonical(payload, campaign_pb2.AnswerOfferRequest)
        operations.answer_offer(self._store, site.name, request, self._now())
        return _serialised(campaign_pb2.AnswerOfferReply())

    def _send_beat(self, payload: bytes, context: Any) -> bytes:
        site = self._caller(context, Role.SITE)
        return _serialised(operations.take_beat(self._store, site, payload, self._now()))

    def _submit_report(self, payload: bytes, context: Any) -> bytes:
        site = self._caller(context, Role.SITE)
        return _serialised(operations.take_report(self._store, site.name, payload, self._now()))

    def _watch_status(self, payload: bytes, context: Any) -> Iterator[bytes]:
        self._caller(context, Role.OPERATOR)
        request = canonical(payload, status_pb2.WatchStatusRequest)
        interval_s = max(_SHORTEST_INTERVAL_S, request.interval_ms / 1000 or _WATCH_INTERVAL_S)
        if not self._watchers.acquire(blocking=False):
            raise RefusedError("watchers", "Too many are watching already; close one.")
        try:
            gone = threading.Event()
            context.add_callback(gone.set)
            last = None
            while not (gone.is_set() or self._stopping.is_set()):
                status = operations.campaign_status(self._store, request.campaign, self._now())
                at, status.at_unix_s = status.at_unix_s, 0
                if status != last:
                    last = status_pb2.CampaignStatus()
                    last.CopyFrom(status)
                    status.at_unix_s = at
                    yield _serialised(status)
                gone.wait(interval_s)
        finally:
            self._watchers.release()

    def _caller(self, context: Any, wanted: Role) -> Caller:
        pem = context.auth_context().get("x509_pem_cert", [b""])[0]
        who = caller(pem)
        operations.identify(self._store, who, wanted, self._now())
        return who


def _chain(issued: Issued) -> list[bytes]:
    certificates = x509.load_pem_x509_certificates(issued.chain_pem)
    return [certificate.public_bytes(serialization.Encoding.DER) for certificate in certificates]


def _serialised(message: Any) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))


def _handler(streams: bool, call: Callable[[bytes, Any], Any]) -> Any:
    """Return a handler over raw bytes, so that what is checked and stored is what came."""
    if not streams:

        def unary(payload: bytes, context: Any) -> Any:
            try:
                return call(payload, context)
            except Exception as exc:
                _refuse(context, exc)

        return grpc.unary_unary_rpc_method_handler(unary)

    def stream(payload: bytes, context: Any) -> Iterator[bytes]:
        try:
            yield from call(payload, context)
        except Exception as exc:
            _refuse(context, exc)

    return grpc.unary_stream_rpc_method_handler(stream)


def _refuse(context: Any, exc: Exception) -> None:
    """End the call with the error's public half; the rest goes to the coordinator's log."""
    if isinstance(exc, MedveilError):
        status = next((s for kind, s in _STATUS if isinstance(exc, kind)), grpc.StatusCode.UNKNOWN)
        code, public = exc.code, exc.public
        _LOG.info("refused: %s %s", exc.code, exc.private)
    else:
        status, code, public = grpc.StatusCode.INTERNAL, "unexpected", "The coordinator failed; see its log."
        _LOG.error("unexpected error", exc_info=exc)
    context.set_trailing_metadata(((CODE_METADATA, code),))
    context.abort(status, public)
