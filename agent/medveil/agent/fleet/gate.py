"""The gate: the only way from the SuperNode to the coordinator, and the hospital's own.

    SuperNode  -- TLS on loopback, the gate's throw-away certificate -->  gate
    gate       -- mutual TLS, this site's certificate, one authority -->  the coordinator's edge

A refusal answers 403, which a SuperNode takes as "this run is not for me"; a line that is down answers 503, and so
does an egress log that takes no more: it tries again. What was refused, and why the line is down, is in
`Gate.standing`.
"""

from __future__ import annotations

import http.client
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.supercore.error import ApiErrorCode, FlowerError

from medveil.agent.fleet.passage import CARRIES_CONTENT, Passage, brings_work
from medveil.agent.reporting_log import EgressLog
from medveil.models.disk import make_private_folder, write_atomically
from medveil.models.errors import MedveilError, RefusedError, StorageError
from medveil.protos.fleet import FLEET_PREFIX, NODE_KEY_HEADER
from medveil.protos.v1.conventions import MAX_MESSAGE_BYTES

__all__ = ["Gate", "GateStanding"]

_LOOPBACK: Final = "127.0.0.1"
_CERTIFICATE_LIFE: Final = timedelta(days=3650)
_SKEW: Final = timedelta(days=1)
_KEY: Final = "gate-key.pem"
_CERTIFICATE: Final = "gate.pem"
_JOURNAL: Final = "gate.log"
_JOURNAL_BYTES: Final = 2**20
_IDLE_S: Final = 300.0
_CERTIFICATE_NOT_YET_VALID: Final = 9  # X509_V_ERR_CERT_NOT_YET_VALID, <openssl/x509_vfy.h>
_CERTIFICATE_HAS_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED, likewise
_OTHER_NAME: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH, likewise
_CLOCK_OFF: Final = "clock-off"
_LARGEST_SKEW_S: Final = (-(TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE), SYSTEM_TIME_TOLERANCE)
"""How far this clock may be behind or ahead of the SuperLink's, which refuses what is signed at another time."""
_READMITTED_SOON: Final = "readmitted-within-60-s"
"""Two heartbeats of 30 s, after which the SuperLink believes that a SuperNode which was killed is gone."""
_WORD: Final = re.compile(r"[a-z0-9-]{1,40}")
_CALL_S: Final = 60.0
"""Longer than any of Flower's own timeouts, so that the SuperNode gives up first and tries again."""
_HEARTBEAT: Final = "send-node-heartbeat"
_ASKS_FOR_WORK: Final = "pull-messages"
_STUCK_S: Final = 330.0
"""A SuperNode that did nothing but beat for this long will never do anything again. It happens when a client app dies
between announcing its answer and handing it over: flwr 1.41 waits for the rest for ever. The coordinator waits 300 s
for an answer, so nothing that takes longer is of use to anybody."""
_LARGEST_REPLY_BYTES: Final = 32 * 2**20
"""Flower sends arrays in chunks of 5 MB; our choice, six times that."""
_HEADERS: Final = (
    "content-type", "accept", NODE_KEY_HEADER, "flwr-timestamp", "flwr-signature",
    "flwr-package-name", "flwr-package-version", "flwr-component-name",
)  # fmt: skip
"""All that a SuperNode of the pinned version sends beside what HTTP itself needs."""
_HEADER_BYTES: Final = 1024
_HUNG_UP: Final = (
    http.client.RemoteDisconnected,
    ConnectionResetError,
    BrokenPipeError,
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
)
"""How a connection looks that the other end closed while it was idle."""


@dataclass(frozen=True, slots=True)
class GateStanding:
    """How the gate stands.

    Attributes:
        last_reply_unix_s: when the coordinator last answered a call with success; 0: never.
        line: why the line to the coordinator is down, why the coordinator turns this site's node away, or why nothing
            can be written down and so nothing sent (a code); empty: none of these.
        refused: how many requests or replies did not pass.
        last_refusal: code of the last of them; empty: there was none.
        sent_bytes: bodies that left through the gate since it opened.
    """

    last_reply_unix_s: int = 0
    line: str = ""
    refused: int = 0
    last_refusal: str = ""
    sent_bytes: int = 0


class Gate:
    """An open gate; close it with `stop`."""

    def __init__(
        self,
        coordinator: str,
        credentials: Callable[[], tuple[bytes, Path]],
        passage: Passage,
        log: EgressLog,
        folder: Path,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the gate's own certificate and listen on a free loopback port.

        Args:
            coordinator: ``host:port`` of the edge.
            credentials: the authority's certificate (PEM), and the file of this site's key and chain; asked for each
                new connection, so that a renewal needs no restart.
            passage: the rules.
            log: the egress log; what carries content is written there before it is sent.
            folder: for the gate's own key and certificate.
            now: the clock.
            monotonic: seconds that nobody sets back.

        Raises:
            StorageError: they cannot be written.
        """
        host, _, port = coordinator.rpartition(":")
        self._edge = (host.strip("[]"), int(port))
        self._credentials, self._passage, self._log, self._now = credentials, passage, log, now
        self._guard, self._standing = threading.Lock(), GateStanding()
        self._monotonic, self._last_call, self._calls = monotonic, monotonic(), 0
        self._orders, self._open_order = 0, 0
        self.certificate = _own_certificate(folder)
        self._journal = _journal(folder / _JOURNAL)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, folder / _KEY)
        self._server = _Server(self, context)
        self._thread = threading.Thread(target=self._server.serve_forever, name="gate", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """``host:port`` for the SuperNode."""
        return f"{_LOOPBACK}:{self._server.server_port}"

    @property
    def standing(self) -> GateStanding:
        """How the gate stands now."""
        with self._guard:
            return self._standing

    def stop(self) -> None:
        """Close the gate."""
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()
        for handler in list(self._journal.handlers):
            self._journal.removeHandler(handler)
            handler.close()

    def connect(self) -> http.client.HTTPSConnection:
        """Return a connection that trusts one authority and shows this site's certificate; it opens when used.

        Raises:
            OSError: the certificate has expired, or the file can't be read.
        """
        authority, identity = self._credentials()
        if x509.load_pem_x509_certificate(identity.read_bytes()).not_valid_after_utc <= self._now():
            raise _ExpiredError
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=authority.decode("ascii"))
        context.load_cert_chain(identity)
        return http.client.HTTPSConnection(*self._edge, timeout=_CALL_S, context=context)

    def outward(self, path: str, body: bytes) -> bytes:
        """Return what may go out, written down first."""
        allowed = self._passage.outward(path, body)
        if path.removeprefix(FLEET_PREFIX) in CARRIES_CONTENT:
            self._log.append(path, allowed)
        return allowed

    def is_stuck(self, path: str) -> bool:
        """Return whether this is the heartbeat of a SuperNode that has done nothing else for too long."""
        with self._guard:
            return path == FLEET_PREFIX + _HEARTBEAT and self._monotonic() - self._last_call > _STUCK_S

    @property
    def open_order(self) -> int:
        """The number of the message that the SuperNode is at work on, 1, 2, 3, ...; 0: it asks for the next."""
        with self._guard:
            return self._open_order

    @property
    def quiet_s(self) -> float:
        """Seconds since the SuperNode was last at work here; 0 while it is, or can't be because the line is down."""
        with self._guard:
            return 0.0 if self._calls or self._standing.line else self._monotonic() - self._last_call

    @contextmanager
    def at_work(self, path: str) -> Iterator[None]:
        """Remember that the SuperNode is at work for as long as a call takes; a heartbeat is none."""
        if path == FLEET_PREFIX + _HEARTBEAT:
            yield
            return
        with self._guard:
            self._calls, self._last_call = self._calls + 1, self._monotonic()
            if path == FLEET_PREFIX + _ASKS_FOR_WORK:
                self._open_order = 0
        try:
            yield
        finally:
            with self._guard:
                self._calls, self._last_call = self._calls - 1, self._monotonic()

    def inward(self, path: str, body: bytes) -> bytes:
        """Return what may come in."""
        allowed = self._passage.inward(path, body)
        if path == FLEET_PREFIX + _ASKS_FOR_WORK and brings_work(allowed):
            with self._guard:
                self._orders += 1
                self._open_order = self._orders
        return allowed

    def note_lost_order(self) -> None:
        """Write down that the SuperNode was started anew because its client app had died."""
        self._journal.warning("the client app died with an order; the SuperNode begins anew")

    def note_refusal(self, path: str, error: MedveilError) -> None:
        """Count what did not pass, and write down for this site why."""
        self._journal.warning("refused %s: %s %s", path, error.code, error.private)
        with self._guard:
            self._standing = replace(
                self._standing, refused=self._standing.refused + 1, last_refusal=error.code
            )

    def note_line_down(self, code: str) -> None:
        """Remember why the coordinator could not be reached."""
        with self._guard:
            self._standing = replace(self._standing, line=code)

    def note_reply(self, sent_bytes: int, status: int, headers: Message, body: bytes) -> None:
        """Count a call that the coordinator answered, and remember why it turned this site's node away, if it did."""
        now, line = self._now(), ""
        if status == HTTPStatus.UNAUTHORIZED:
            line = _refusal_code(headers, body, now)
        elif status == HTTPStatus.PRECONDITION_FAILED and _counts_as_online(body):
            line = _READMITTED_SOON
        with self._guard:
            last = int(now.timestamp()) if status == HTTPStatus.OK else self._standing.last_reply_unix_s
            sent = self._standing.sent_bytes + sent_bytes
            if self._standing.line:  # what the SuperNode couldn't say, it says now
                self._last_call = self._monotonic()
            self._standing = replace(self._standing, line=line, last_reply_unix_s=last, sent_bytes=sent)


class _ExpiredError(OSError):
    """This site's certificate has expired; an edge that is shown it would only hang up."""


class _Server(ThreadingHTTPServer):
    """Listens on loopback, for one SuperNode."""

    daemon_threads = False  # closing waits for the handlers, which `hang_up` ends

    def __init__(self, gate: Gate, context: ssl.SSLContext) -> None:
        super().__init__((_LOOPBACK, 0), _Handler)
        self.gate = gate
        self.handlers: set[_Handler] = set()
        # The handshake happens in the connection's own thread: who says nothing keeps nobody else waiting.
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def hang_up(self) -> None:
        """Break every connection, so that their handlers end."""
        for handler in list(self.handlers):
            handler.break_off()

    def handle_error(self, request: object, client_address: object) -> None:
        """Drop a connection that broke; the SuperNode tries again, and the standing says what is wrong."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of the SuperNode, and one to the coordinator for as long as it lasts."""

    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_S

    def setup(self) -> None:
        """Begin without a connection to the coordinator."""
        super().setup()
        self._edge: http.client.HTTPSConnection | None = None
        self.server.handlers.add(self)

    def finish(self) -> None:
        """Close both connections."""
        self.server.handlers.discard(self)
        self._hang_up()
        super().finish()

    def break_off(self) -> None:
        """Make whatever this handler waits for end at once; called from another thread."""
        edge = self._edge
        for connection in (self.connection, None if edge is None else edge.sock):
            if connection is not None:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write nothing: the egress log and the standing have it."""

    def do_POST(self) -> None:
        """Let one call through, or refuse it."""
        gate = self.server.gate
        try:
            length = int(self.headers.get("content-length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MAX_MESSAGE_BYTES:
            gate.note_refusal(self.path, RefusedError("gate-size", "A message was too large."))
            self.close_connection = True
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"gate-size")
            return
        body = self.rfile.read(length)
        if gate.is_stuck(self.path):
            # To a SuperNode a 401 means: take your leave. Its supervisor starts it anew, and it is let in at once.
            stuck = RefusedError("node-stuck", "The SuperNode was stuck; it begins anew.")
            gate.note_refusal(self.path, stuck)
            self._answer(HTTPStatus.UNAUTHORIZED, stuck.code.encode("ascii"))
        else:
            with gate.at_work(self.path):  # a slow one, too, is work until its end
                self._let_through(body)

    def _let_through(self, body: bytes) -> None:
        gate = self.server.gate
        try:
            allowed = gate.outward(self.path, body)
            status, headers, reply = self._asked(allowed)
            gate.note_reply(len(allowed), status, headers, reply)
            if status == HTTPStatus.OK:
                reply = gate.inward(self.path, reply)
            self._answer(status, reply, headers.get_content_type())
        except StorageError as error:  # the egress log: what can't be written down waits until there is room
            gate.note_line_down(error.code)
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, error.code.encode("ascii"))
        except MedveilError as error:
            gate.note_refusal(self.path, error)
            self._answer(HTTPStatus.FORBIDDEN, error.code.encode("ascii"))
        except (OSError, http.client.HTTPException) as exc:
            self._hang_up()
            gate.note_line_down(_line_code(exc))
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"coordinator-unreachable")

    def _asked(self, body: bytes) -> tuple[int, Message, bytes]:
        """Send an allowed call and return status, headers and body of the answer."""
        headers = {
            name: value
            for name in _HEADERS
            if (value := self.headers.get(name)) is not None and len(value) <= _HEADER_BYTES
        }
        fresh = self._edge is None
        try:
            response = self._sent(body, headers)
        except _HUNG_UP:
            if fresh:
                raise
            # An idle connection that the other end had closed meanwhile: the call never arrived.
            self._hang_up()
            response = self._sent(body, headers)
        reply = response.read(_LARGEST_REPLY_BYTES + 1)
        if len(reply) > _LARGEST_REPLY_BYTES:
            self._hang_up()
            raise RefusedError("gate-size", "The coordinator sent more than any of its messages needs.")
        return response.status, response.headers, reply

    def _sent(self, body: bytes, headers: dict[str, str]) -> http.client.HTTPResponse:
        self._edge = self._edge or self.server.gate.connect()
        self._edge.request("POST", self.path, body, headers)
        return self._edge.getresponse()

    def _hang_up(self) -> None:
        if self._edge is not None:
            self._edge.close()
            self._edge = None

    def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response_only(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _journal(path: Path) -> logging.Logger:
    journal = logging.Logger(
        "medveil gate", logging.INFO
    )  # not among the process's loggers: nobody else hears it
    handler = RotatingFileHandler(path, maxBytes=_JOURNAL_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    journal.addHandler(handler)
    return journal


def _line_code(exc: Exception) -> str:
    """Return why the coordinator cannot be reached, as far as the other end lets us know."""
    match exc:
        case _ExpiredError():
            return "certificate-expired"
        case ssl.SSLCertVerificationError() if exc.verify_code == _CERTIFICATE_HAS_EXPIRED:
            return "coordinator-certificate-expired"
        case ssl.SSLCertVerificationError() if exc.verify_code == _CERTIFICATE_NOT_YET_VALID:
            return _CLOCK_OFF  # the coordinator makes it valid from an hour before it is signed
        case ssl.SSLCertVerificationError() if exc.verify_code in _OTHER_NAME:
            return "coordinator-name"
        case ssl.SSLCertVerificationError():
            return "unknown-authority"
        case ssl.SSLError():
            return "certificate-refused"
    return "unreachable"


def _refusal_code(headers: Message, body: bytes, now: datetime) -> str:
    """Return why the coordinator turns this site's node away: the edge's own word, or what its clock shows.

    The SuperLink has one sentence for every wrong signature; most of them are right and of another hour.
    """
    word = body.decode("ascii", "replace")
    if headers.get_content_type() == "text/plain" and _WORD.fullmatch(word):
        return word
    with suppress(TypeError, ValueError):
        ahead_s = now.timestamp() - parsedate_to_datetime(headers["date"]).timestamp()
        behind_most_s, ahead_most_s = _LARGEST_SKEW_S
        if not behind_most_s < ahead_s < ahead_most_s:
            return _CLOCK_OFF
    return "node-refused"


def _counts_as_online(body: bytes) -> bool:
    """Return whether a SuperNode is refused because the one before it, which was killed, is still believed to run."""
    error = FlowerError.from_json(body.decode("utf-8", "replace"))
    # The code has another meaning, too: a key that nobody registered. The edge registers it before this call.
    return error is not None and error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED


def _own_certificate(folder: Path) -> Path:
    """Make key and certificate of the gate's loopback side, for this run only, and return the certificate's file."""
    make_private_folder(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "medveil gate")])
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    subject = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _CERTIFICATE_LIFE)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(_LOOPBACK))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(subject, critical=False)
        .add_extension(authority, critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(folder / _KEY, private, mode=0o600)
    path = folder / _CERTIFICATE
    write_atomically(path, certificate.public_bytes(serialization.Encoding.PEM))
    return path
