"""The only way in to the SuperLink from outside: mutual TLS, and of its one port the fleet calls only.

Flower's Control API has no login in its open-source form and shares the port with the Fleet API: whoever reaches it
starts programs at every site. So the SuperLink listens on loopback, and this small proxy stands in front of it. A
caller without a site's certificate does not get past the handshake; a site gets the twelve calls that its SuperNode
makes, under its own node key, with small bodies. h11 reads and writes the HTTP, so that both sides of the proxy
agree on where a request ends.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import h11

from medveil.coordinator.pki import Caller, caller
from medveil.models.errors import ConfigurationError, MedveilError, RefusedError
from medveil.protos.fleet import FLEET_CALLS, FLEET_PREFIX, NODE_KEY_HEADER

__all__ = ["Admit", "Edge"]

_LOG: Final = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 256 * 1024
"""Of one call from a site; our choice: an acknowledgement takes about 1 KiB, and nothing else leaves a site here."""
_MAX_HEAD_BYTES: Final = 16 * 1024
_READ_BYTES: Final = 64 * 1024
_HANDSHAKE_S: Final = 10.0
_IDLE_S: Final = 120.0
_BODY_S: Final = 30.0
_ANSWER_S: Final = 60.0
"""A SuperNode waits 30 s for an answer; whatever takes longer than twice that comes from a SuperLink that hangs."""
_CONNECTIONS_PER_SITE: Final = 16
"""A SuperNode opens four at most; the rest is for reconnects whose ends have not been noticed."""
_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"host", b"expect"}
)

Admit = Callable[[Caller, bytes, str], None]
"""Takes who calls, the node key that it shows and the name of the call; raises what the caller is told."""


class Edge:
    """The proxy, in a thread of its own from `start` to `stop`."""

    def __init__(self, upstream_port: int, authority_pem: bytes, admit: Admit) -> None:
        """Prepare.

        Args:
            upstream_port: the SuperLink's on loopback.
            authority_pem: signs the certificates of sites and of the SuperLink.
            admit: asked before every call, in a worker thread.
        """
        self._upstream_port, self._admit = upstream_port, admit
        self._inside = ssl.create_default_context(cadata=authority_pem.decode("ascii"))
        self._outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._outside.minimum_version = ssl.TLSVersion.TLSv1_3  # both ends are ours
        self._outside.verify_mode = ssl.CERT_REQUIRED
        self._outside.load_verify_locations(cadata=authority_pem.decode("ascii"))
        self._open: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edge", daemon=True)
        self._server: asyncio.Server | None = None

    def start(self, host: str, port: int, certificate: Path) -> int:
        """Listen.

        Args:
            host: address to listen at.
            port: 0 takes a free one.
            certificate: PEM of the private key and the certificate chain.

        Returns:
            The port.

        Raises:
            ConfigurationError: ``port``: it is taken.
        """
        self.use(certificate)
        self._thread.start()
        opening = asyncio.run_coroutine_threadsafe(self._listen(host, port), self._loop)
        try:
            self._server = opening.result()
        except OSError as exc:
            raise ConfigurationError(
                "port", f"Nothing can listen at {host}:{port}; choose another port."
            ) from exc
        return int(self._server.sockets[0].getsockname()[1])

    def use(self, certificate: Path) -> None:
        """Take another server certificate; connections that are open keep the one before."""
        self._outside.load_cert_chain(certificate)

    def stop(self) -> None:
        """Close every connection."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    async def _listen(self, host: str, port: int) -> asyncio.Server:
        return await asyncio.start_server(
            self._serve,
            host,
            port,
            ssl=self._outside,
            ssl_handshake_timeout=_HANDSHAKE_S,
            limit=_READ_BYTES,
        )

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        site = ""
        try:
            who = _peer(writer)
            site = who.name
            self._open[site] += 1
            if self._open[site] <= _CONNECTIONS_PER_SITE:
                peer = _Peer(reader, writer, h11.Connection(h11.SERVER, _MAX_HEAD_BYTES))
                while await self._exchange(peer, who):
                    peer.http.start_next_cycle()
        except asyncio.CancelledError:
            pass  # by `stop`; Python 3.11 would print a traceback for each connection otherwise
        except (OSError, TimeoutError, EOFError, h11.RemoteProtocolError, RefusedError) as exc:
            _LOG.debug("connection of %s ended: %r", site or "a stranger", exc)
        finally:
            if site:
                self._open[site] -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _exchange(self, peer: _Peer, who: Caller) -> bool:
        """Answer one call; return whether the connection can take another."""
        request = await peer.receive(_IDLE_S)
        if not isinstance(request, h11.Request):
            return False
        try:
            call, length = _checked(request)
            key = _node_key(request)
            await asyncio.to_thread(self._admit, who, key, call)
            body = await peer.body(length)
        except _TurnedAwayError as refusal:
            return await peer.refuse(refusal.status, refusal.code)
        except RefusedError as exc:
            # To a SuperNode 401 means: give up. It would read a 403 as the end of a run.
            _LOG.warning("site %s: refused: %s", who.name, exc)
            return await peer.refuse(401, exc.code)
        except MedveilError as exc:
            _LOG.info(
                "site %s: %s %s", who.name, exc, exc.private
            )  # a SuperLink that restarts; told elsewhere
            return await peer.refuse(503, exc.code)
        return await self._forward(peer, request, body)

    async def _forward(self, peer: _Peer, request: h11.Request, body: bytes) -> bool:
        """Pass a call on over a connection of its own: one that was kept open may be dead by now."""
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self._upstream_port, ssl=self._inside, ssl_handshake_timeout=_HANDSHAKE_S
            )
        except OSError as exc:
            _LOG.info("the SuperLink does not answer: %r", exc)
            return await peer.refuse(502, "superlink-down")
        try:
            link = _Peer(reader, writer, h11.Connection(h11.CLIENT, _MAX_HEAD_BYTES))
            host = f"127.0.0.1:{self._upstream_port}".encode("ascii")
            headers = [*_end_to_end(request), (b"host", host), (b"connection", b"close")]
            await link.send(h11.Request(method=request.method, target=request.target, headers=headers))
            await link.send(h11.Data(data=body))
            await link.send(h11.EndOfMessage())
            return await _answer(link, peer)
        except (OSError, TimeoutError, EOFError, h11.RemoteProtocolError) as exc:
            _LOG.warning("the SuperLink broke off: %r", exc)
            if peer.http.our_state is h11.SEND_RESPONSE:
                return await peer.refuse(502, "superlink-down")
            return False
        finally:
            writer.transport.abort()  # the answer is whole or lost; a farewell would outlive this call


@dataclass(frozen=True, slots=True)
class _Peer:
    """One end of a connection that speaks HTTP."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection

    async def receive(self, timeout_s: float) -> h11.Event | type[h11.PAUSED]:
        async with asyncio.timeout(timeout_s):
            while (event := self.http.next_event()) is h11.NEED_DATA:
                self.http.receive_data(await self.reader.read(_READ_BYTES))
        return event  # type: ignore[return-value]  # NEED_DATA is no event

    async def send(self, event: h11.Event) -> None:
        data = self.http.send(event)
        if data:
            self.writer.write(data)
            async with asyncio.timeout(_ANSWER_S):
                await self.writer.drain()

    async def body(self, length: int) -> bytes:
        parts: list[bytes] = []
        while isinstance(event := await self.receive(_BODY_S), h11.Data):
            parts.append(event.data)
        if not isinstance(event, h11.EndOfMessage) or sum(map(len, parts)) != length:
            raise EOFError("a body that broke off")
        return b"".join(parts)

    async def refuse(self, status: int, code: str) -> bool:
        """Answer with a word, and end the connection: the body may not have been read."""
        text = code.encode("ascii")
        headers = [
            ("content-type", "text/plain"),
            ("content-length", str(len(text))),
            ("connection", "close"),
        ]
        await self.send(h11.Response(status_code=status, headers=headers))
        await self.send(h11.Data(data=text))
        await self.send(h11.EndOfMessage())
        return False


class _TurnedAwayError(Exception):
    """A call that is not let through; its word goes back."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


def _peer(writer: asyncio.StreamWriter) -> Caller:
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    if certificate is None:  # the context asks for one; should that ever be changed, nobody gets in
        raise RefusedError("identity", "The caller shows no certificate.")
    return caller(ssl.DER_cert_to_PEM_cert(certificate).encode("ascii"))


def _checked(request: h11.Request) -> tuple[str, int]:
    """Return the name of a call that may pass and the length of its body."""
    target = request.target.decode("ascii", "replace")
    call = target.removeprefix(FLEET_PREFIX)
    # Exactly so: no query, no second slash, no other spelling that the SuperLink might resolve.
    if request.method != b"POST" or target != FLEET_PREFIX + call or call not in FLEET_CALLS:
        raise _TurnedAwayError(403, "forbidden-path")
    lengths = [value for name, value in request.headers if name == b"content-length"]
    if len(lengths) != 1:
        raise _TurnedAwayError(411, "length-required")
    if int(lengths[0]) > MAX_BODY_BYTES:
        raise _TurnedAwayError(413, "too-large")
    return call, int(lengths[0])


def _node_key(request: h11.Request) -> bytes:
    shown = [value for name, value in request.headers if name == NODE_KEY_HEADER.encode("ascii")]
    try:
        (encoded,) = shown
        return base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as exc:
        raise _TurnedAwayError(401, "node-key") from exc


def _end_to_end(message: h11.Request | h11.Response) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in message.headers if name not in _HOP_BY_HOP]


async def _answer(link: _Peer, peer: _Peer) -> bool:
    while isinstance(event := await link.receive(_ANSWER_S), h11.InformationalResponse):
        pass
    if not isinstance(event, h11.Response):
        raise EOFError("no answer")
    await peer.send(h11.Response(status_code=event.status_code, headers=_end_to_end(event)))
    while isinstance(event := await link.receive(_ANSWER_S), h11.Data):
        await peer.send(h11.Data(data=event.data))
    if not isinstance(event, h11.EndOfMessage):
        raise EOFError("an answer that broke off")
    await peer.send(h11.EndOfMessage())
    return peer.http.our_state is h11.DONE and peer.http.their_state is h11.DONE
