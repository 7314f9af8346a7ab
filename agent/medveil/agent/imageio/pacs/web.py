"""Talking to the PACS in DICOMweb: QIDO-RS, WADO-RS and STOW-RS.

Plain HTTP requests, because the bytes matter: ``transfer-syntax=*`` asks for each object as it is stored,
and what comes is written as it came. Proxy settings of the environment are ignored and redirects are not
followed: images go to the address that the site configured and nowhere else.

The TLS of DIMSE is here as well: one module of the door makes the contexts (PS3.15 B.9; BCP 195 asks for TLS 1.2 or
newer, as Python does).
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Final, Self

import httpx

from medveil.agent.imageio.limits import MAX_FILE_BYTES
from medveil.agent.imageio.pacs.content import Outgoing
from medveil.agent.imageio.pacs.inbox import Inbox, valid_uid
from medveil.agent.imageio.pacs.multipart import decode_related, encode_related
from medveil.agent.imageio.pacs.pulled import Pulled, require_listed
from medveil.agent.pacs_policy import PeerTls, PortTls, WebPeer
from medveil.models.errors import ConfigurationError, ImageError, InputError

__all__ = ["WebPacs", "peer_context", "port_context", "pull_by_wado"]

CONNECT_TIMEOUT_S: Final = 10.0
ANSWER_TIMEOUT_S: Final = 60.0
"""Between two pieces of an answer; our choice."""

PAGE: Final = 500
"""Objects asked for at a time: archives cut long QIDO-RS answers at limits of their own."""

AS_STORED: Final = 'multipart/related; type="application/dicom"; transfer-syntax=*'  # PS3.18 8.7.3.5.2
JSON_TYPE: Final = "application/dicom+json"

SOP_INSTANCE: Final = "00080018"
REFERENCED_INSTANCE: Final = "00081155"
FAILED: Final = "00081198"
STORED: Final = "00081199"
FAILURE_REASON: Final = "00081197"

NOTHING: Final = (204, 404)
STORE_ANSWERS: Final = (200, 202, 400, 409, 413, 415, 422, 500)
"""Answers about the object that was sent (PS3.18 10.5.3: all, some or none stored; or it breaks the archive).
Any other, such as 401, 404 or 503, is about us or the archive, and the queue waits."""

FETCH_FAILURES: Final = (400, 406, 410, 413, 422, 500)
"""Answers about the object that was asked for."""

NO_ANSWER: Final = "no-answer"

SILENT_CALLER_S: Final = 30.0
"""A TLS caller that stops in the middle of a message has gone. Our choice, as long as the ARTIM timer of PS3.8."""


class WebPacs(AbstractContextManager["WebPacs"]):
    """A PACS behind DICOMweb: sender and reader of a delivery (see ``delivery``), and source of a pull."""

    def __init__(self, peer: WebPeer, *, transport: httpx.BaseTransport | None = None) -> None:
        """Prepare the connection; nothing is sent yet.

        Args:
            peer: the PACS.
            transport: stands in for the network in tests.
        """
        headers = {}
        if peer.token is not None:
            headers["Authorization"] = f"Bearer {peer.token.get_secret_value()}"
        login = None
        if peer.user is not None and peer.password is not None:
            login = httpx.BasicAuth(peer.user, peer.password.get_secret_value())
        self._client = httpx.Client(
            base_url=peer.url.rstrip("/") + "/",
            auth=login,
            headers=headers,
            verify=peer_context(PeerTls(ca_file=peer.ca_file)),
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
            follow_redirects=False,
            transport=transport,
        )

    def __enter__(self) -> Self:
        """Return the connection."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._client.close()

    def find_instances(self, study: str, series: str, *, instance: str = "") -> frozenset[str]:
        """Return the SOP Instance UIDs that the PACS lists for a series (or the one asked for).

        Raises:
            InputError: the PACS cannot be reached or refuses the query.
            ImageError: ``bad-uid`` or ``bad-answer``.
        """
        path = f"studies/{valid_uid(study)}/series/{valid_uid(series)}/instances"
        found: set[str] = set()
        while True:
            query = {"limit": str(PAGE), "offset": str(len(found))}
            if instance:
                query["SOPInstanceUID"] = valid_uid(instance)
            status, _, body = self._request("GET", path, params=query, headers={"Accept": JSON_TYPE})
            page = set() if status in NOTHING else _instances(_json(body))
            if instance or page <= found:  # past the last page, or an archive that ignores the offset
                return frozenset(found | page)
            found |= page

    def fetch(self, study: str, series: str, instance: str) -> bytes | None:
        """Return one object as it is stored, as a DICOM file; None where the PACS has none.

        Raises:
            InputError: the PACS cannot be reached or refuses the request.
            ImageError: ``bad-uid``, ``too-large``, ``bad-answer`` or ``http-<status>``.
        """
        path = f"studies/{valid_uid(study)}/series/{valid_uid(series)}/instances/{valid_uid(instance)}"
        status, content_type, body = self._request(
            "GET", path, headers={"Accept": AS_STORED}, accepted=(200, *NOTHING, *FETCH_FAILURES)
        )
        if status in NOTHING:
            return None
        if status in FETCH_FAILURES:
            raise ImageError(f"http-{status}", "The PACS cannot deliver this object; ask its administrator.")
        parts = decode_related(content_type, body)
        if len(parts) != 1:
            raise _bad_answer(f"{len(parts)} parts")
        return parts[0]

    def retrieve(self, wanted: Outgoing) -> bytes | None:
        """Read an object back: it has to be listed as well as delivered; None where it is not.

        Raises:
            InputError: the PACS cannot be reached or refuses the request.
            ImageError: it cannot deliver this object.
        """
        listed = self.find_instances(wanted.study, wanted.series, instance=wanted.instance)
        if wanted.instance not in listed:
            return None
        return self.fetch(wanted.study, wanted.series, wanted.instance)

    def send(self, objects: Sequence[Outgoing]) -> Iterator[tuple[Outgoing, str | None]]:
        """Store objects one request each, so that memory holds one and a refusal concerns one.

        Raises:
            InputError: the PACS cannot be reached or refuses us as a whole.
        """
        for item in objects:
            content_type, body = encode_related(item.path.read_bytes())
            try:
                status, _, answer = self._request(
                    "POST",
                    "studies",
                    content=body,
                    headers={"Content-Type": content_type, "Accept": JSON_TYPE},
                    accepted=STORE_ANSWERS,
                )
                reason = _refusal(status, answer, item.instance)
            except InputError as error:
                if error.code == NO_ANSWER:
                    yield item, NO_ANSWER
                raise
            yield item, reason

    def _request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None = None,
        content: bytes | None = None,
        accepted: Sequence[int] = (200, *NOTHING),
    ) -> tuple[int, str, bytes]:
        """Return status, content type and body of an answer.

        Raises:
            InputError: no answer, or none of the accepted ones.
            ImageError: ``too-large``.
        """
        with (
            _http_errors(),
            self._client.stream(
                method, path, headers=dict(headers), params=params, content=content
            ) as answer,
        ):
            if answer.status_code not in accepted:
                raise InputError(
                    "pacs-refused",
                    "The PACS refused the request; check its address, our login and our rights.",
                    private=f"HTTP {answer.status_code}",
                )
            body = bytearray()
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > MAX_FILE_BYTES:
                    raise ImageError("too-large", "This object is larger than medveil takes in one piece.")
            return answer.status_code, answer.headers.get("Content-Type", ""), bytes(body)


def peer_context(settings: PeerTls) -> ssl.SSLContext:
    """Return how we call the PACS: it has to show a certificate for its name, and we show ours where we have one.

    Raises:
        ConfigurationError: ``pacs-tls``: the files are not certificates and keys that belong together.
    """
    with _readable():
        context = ssl.create_default_context(cafile=settings.ca_file)
        if settings.certificate_file is not None:
            context.load_cert_chain(settings.certificate_file, settings.key_file)
    return context


def port_context(settings: PortTls) -> ssl.SSLContext:
    """Return how we are called: we show our certificate, and callers theirs where the policy names an authority.

    Raises:
        ConfigurationError: ``pacs-tls``.
    """
    context = _PatientContext(ssl.PROTOCOL_TLS_SERVER)
    with _readable():
        context.load_cert_chain(settings.certificate_file, settings.key_file)
        if settings.ca_file is not None:
            context.load_verify_locations(settings.ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    return context


class _PatientContext(ssl.SSLContext):
    """Greets each caller in the thread of its association.

    pynetdicom 3.0.4 wraps a socket in the thread that accepts calls, and waits there for the greeting: one silent
    caller would shut everybody else out.
    """

    def wrap_socket(self, sock: Any, *args: Any, **settings: Any) -> ssl.SSLSocket:
        sock.settimeout(SILENT_CALLER_S)
        return super().wrap_socket(sock, *args, **settings | {"do_handshake_on_connect": False})


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigurationError(
            "pacs-tls",
            "A certificate, key or authority for the PACS cannot be used; check the files that the"
            " policy names.",
            private=repr(exc),
        ) from exc


def pull_by_wado(pacs: WebPacs, inbox: Inbox, study: str, series: str) -> Pulled:
    """Fetch a series object by object; those already in the inbox are not fetched again.

    Raises:
        InputError: the PACS cannot be reached, lists nothing, or refuses the request.
        StorageError: the disk takes no more.
    """
    expected = require_listed(pacs.find_instances(study, series))
    for instance in sorted(expected - inbox.held()):
        try:
            data = pacs.fetch(study, series, instance)
        except ImageError:
            continue  # reported as missing
        if data is not None:
            inbox.accept(instance, data)
    rejected = inbox.collect()
    return Pulled(expected, expected - inbox.held(), rejected)


@contextmanager
def _http_errors() -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        raise InputError(
            "pacs-unreachable",
            "The PACS does not answer; check its address, its certificate and the network, and try again.",
            private=str(exc),
        ) from exc
    except httpx.HTTPError as exc:
        raise InputError(NO_ANSWER, "The connection to the PACS broke; try again.", private=str(exc)) from exc


def _json(body: bytes) -> Any:
    try:
        return json.loads(body or b"[]")
    except ValueError as exc:
        raise _bad_answer("no JSON") from exc


def _values(element: Any) -> list[Any]:
    """Return the values of an element in DICOM JSON (PS3.18 F.2); nothing where it is anything else."""
    values = element.get("Value") if isinstance(element, dict) else None
    return values if isinstance(values, list) else []


def _instances(answer: Any) -> set[str]:
    if not isinstance(answer, list):
        raise _bad_answer("no list")
    return {
        valid_uid(str(value))
        for item in answer
        if isinstance(item, dict)
        for value in _values(item.get(SOP_INSTANCE))
    }


def _refusal(status: int, body: bytes, instance: str) -> str | None:
    """Return None if the answer says that the object was stored, else a code.

    A status of 200 does not say so: archives answer it with an empty list of stored objects.
    """
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        return f"http-{status}"
    for item in _values(answer.get(STORED)):
        if instance in _values(item.get(REFERENCED_INSTANCE)):
            return None
    for item in _values(answer.get(FAILED)):
        if instance in _values(item.get(REFERENCED_INSTANCE)):
            reasons = [value for value in _values(item.get(FAILURE_REASON)) if isinstance(value, int)]
            return f"status-{reasons[0]:04x}" if reasons else f"http-{status}"
    return "not-stored"


def _bad_answer(private: str) -> ImageError:
    return ImageError(
        "bad-answer", "The PACS answered with something that medveil cannot read; try again.", private=private
    )
