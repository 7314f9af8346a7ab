"""A coordinator at work: the gRPC services, the SuperLink with its SuperExec, and the edge in front of it.

    sites --- mutual TLS ---> campaign and enrolment ports (gRPC, this process)
    sites --- mutual TLS ---> edge (this process) --- fleet calls only ---> SuperLink on loopback (child)
                              dispatcher (this process) --- Control -------> SuperLink
                              SuperExec (child), which starts the ServerApp of each round --> SuperLink

Everything that must outlive the process is in the store and in the SuperLink's own database, so a killed process is
simply started again. Its children are ended by the kernel when it dies.
"""

from __future__ import annotations

import http.client
import os
import secrets
import ssl
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from medveil.coordinator.fleet.control import Control, check_flower
from medveil.coordinator.fleet.dispatcher import Dispatcher
from medveil.coordinator.fleet.edge import Edge
from medveil.coordinator.fleet.layout import HOME_VARIABLE, Layout
from medveil.coordinator.pki import Authority, load_authority
from medveil.coordinator.status_service import StatusServer
from medveil.coordinator.store import Store
from medveil.models.child_processes import Children, Program, Standing
from medveil.models.disk import locked, replace_file
from medveil.models.errors import BusyError, StorageError

__all__ = ["Serving", "Settings"]

_LOOPBACK: Final = "127.0.0.1"
_TICK_S: Final = 0.5
_PROBE_S: Final = 2.0
"""How long the SuperLink may take to say that it is well, and how long that is believed."""
_RENEW: Final = timedelta(days=300)
"""The age at which the certificate of edge and SuperLink is replaced; it is valid for a year."""
_SECRET_BYTES: Final = 32

Tell = Callable[[dict[str, Any]], None]
"""Takes what happens: one flat value per event, its name under ``event``."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator decides.

    Attributes:
        home: the coordinator's folder.
        names: host names and addresses that sites use.
        host: address to listen at.
        campaign_port: gRPC with mutual TLS.
        enrolment_port: gRPC for joining only.
        fleet_port: the edge.
        superlink_port: on loopback. Fixed, and below the range from which the kernel serves outgoing connections:
            a SuperExec that reconnects could otherwise be given the port that a killed SuperLink has just left.
    """

    home: Path
    names: tuple[str, ...]
    host: str
    campaign_port: int
    enrolment_port: int
    fleet_port: int
    superlink_port: int


class Serving:
    """One run of the coordinator."""

    def __init__(self, settings: Settings, tell: Tell) -> None:
        """Prepare; nothing happens before `run`."""
        self._settings, self._tell = settings, tell
        self._layout = Layout(settings.home)
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let `run` end; may be called from a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Serve until `stop`, in the calling thread: its children end with it.

        Raises:
            BusyError: ``coordinator-runs``: another process serves this folder.
            ConfigurationError: ``no-authority``, ``port``, ``flower-version``, ``app-changed`` or
                ``program-missing``.
            StorageError: ``not-writable``, or the store's errors.
        """
        check_flower()
        settings, layout = self._settings, self._layout
        authority = load_authority(layout.authority)
        with ExitStack() as closing:
            closing.enter_context(_locked(layout))
            store = closing.enter_context(Store(layout.store))
            _renew_certificate(layout, authority, settings.names)
            server = StatusServer(store, authority, settings.names)
            closing.callback(server.stop)
            campaign_port, enrolment_port = server.start(
                settings.host, campaign_port=settings.campaign_port, enrolment_port=settings.enrolment_port
            )
            children = Children(self._programs(authority))
            closing.callback(children.stop)
            # Closed before the programs are stopped: a SuperLink waits for its connections to end.
            control = closing.enter_context(Control(self._superlink, authority.certificate_pem))
            dispatcher = Dispatcher(store, control, _now)
            edge = Edge(settings.superlink_port, authority.certificate_pem, dispatcher.admit)
            closing.callback(edge.stop)
            fleet_port = edge.start(settings.host, settings.fleet_port, layout.certificate)
            ports = {
                "campaign_port": campaign_port,
                "enrolment_port": enrolment_port,
                "fleet_port": fleet_port,
            }
            self._serve(children, dispatcher, edge, authority, ports)
            self._tell({"event": "stopping"})

    def _serve(
        self,
        children: Children,
        dispatcher: Dispatcher,
        edge: Edge,
        authority: Authority,
        ports: dict[str, int],
    ) -> None:
        told = _Told(self._tell, ports)
        renewed = _now()
        while not self._stopping.is_set():
            children.tick()
            standings = children.standings()
            told.programs(standings)
            if standings[0].ready:
                try:
                    dispatcher.tick()
                    told.trouble("")
                except (
                    StorageError
                ) as exc:  # a full disk: sites keep what they have, and so does this process
                    told.trouble(exc.code)
            told.sites(dispatcher.present())
            if _now() - renewed > _RENEW:
                renewed = _now()
                _renew_certificate(self._layout, authority, self._settings.names)
                edge.use(self._layout.certificate)
                children.restart(standings[0].name)
            self._stopping.wait(_TICK_S)

    # The programs
    # ----------------------------------------------------------------------------------------------

    @property
    def _superlink(self) -> str:
        return f"{_LOOPBACK}:{self._settings.superlink_port}"

    def _programs(self, authority: Authority) -> tuple[Program, Program]:
        layout, environment = self._layout, _environment(self._layout)
        probe = _Probe(self._settings.superlink_port, authority.certificate_pem)
        root = str(layout.authority_certificate)

        def fresh() -> None:
            _renew_certificate(layout, authority, self._settings.names)
            probe.forget()

        superlink = [
            *("--host", _LOOPBACK, "--port", str(self._settings.superlink_port)),
            *("--ssl-certfile", str(layout.certificate), "--ssl-keyfile", str(layout.certificate)),
            *("--ssl-ca-certfile", root),
            *("--database", str(layout.superlink_database)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(layout.superexec_secret)),
            # By default it would fetch an app's dependencies from a package index at every run.
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        ]
        superexec = [
            *("--runtime-api-address", self._superlink, "--root-certificates", root),
            *("--superexec-auth-secret-file", str(layout.superexec_secret)),
        ]
        return (
            Program(
                "superlink",
                [_program("flower-superlink"), *superlink],
                environment,
                layout.log("superlink"),
                before=fresh,
                ready=probe.answers,
            ),
            Program(
                "superexec", [_program("flower-superexec"), *superexec], environment, layout.log("superexec")
            ),
        )


class _Probe:
    """Asks the SuperLink whether it is well, at most as often as an answer is believed."""

    def __init__(self, port: int, root_certificate: bytes) -> None:
        self._port = port
        self._context = ssl.create_default_context(cadata=root_certificate.decode("ascii"))
        self.forget()

    def forget(self) -> None:
        """Believe nothing: it is started anew."""
        self._answered, self._asked = False, float("-inf")

    def answers(self) -> bool:
        now = time.monotonic()
        if now - self._asked >= _PROBE_S or not self._answered:
            self._answered, self._asked = self._ask(), now
        return self._answered

    def _ask(self) -> bool:
        connection = http.client.HTTPSConnection(
            _LOOPBACK, self._port, timeout=_PROBE_S, context=self._context
        )
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class _Told:
    """Says what changes, once."""

    def __init__(self, tell: Tell, ports: dict[str, int]) -> None:
        self._tell, self._ports = tell, ports
        self._waited_for: tuple[str, ...] | None = None
        self._restarts: dict[str, int] = {}
        self._present: frozenset[str] = frozenset()
        self._trouble = ""

    def trouble(self, code: str) -> None:
        if code and code != self._trouble:
            self._tell({"event": "trouble", "code": code})
        self._trouble = code

    def programs(self, standings: tuple[Standing, ...]) -> None:
        for standing in standings:
            if standing.restarts > self._restarts.get(standing.name, 0):
                self._restarts[standing.name] = standing.restarts
                self._tell(
                    {"event": "restarted", "program": standing.name, "exit_status": standing.last_exit}
                )
        missing = tuple(standing.name for standing in standings if not standing.ready)
        if missing != self._waited_for:
            self._waited_for = missing
            self._tell(
                {"event": "waiting", "for": list(missing)} if missing else {"event": "ready", **self._ports}
            )

    def sites(self, present: frozenset[str]) -> None:
        for site in sorted(present ^ self._present):
            self._tell({"event": "site-present" if site in present else "site-away", "site": site})
        self._present = present


def _environment(layout: Layout) -> dict[str, str]:
    """Return the children's whole environment; a proxy's variables would send loopback through the proxy."""
    return {
        "PATH": os.pathsep.join((sysconfig.get_path("scripts"), "/usr/bin", "/bin")),
        "HOME": str(layout.fleet),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        HOME_VARIABLE: str(layout.home),
        "FLWR_HOME": str(layout.flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def _program(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


@contextmanager
def _locked(layout: Layout) -> Iterator[None]:
    """Make the folders and hold them for this process."""
    with _writing():
        for folder in (layout.fleet, layout.log("").parent, layout.flower_home):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(layout.lock, BusyError("coordinator-runs", "Another process serves this coordinator.")):
        if not layout.superexec_secret.exists():
            with _writing():
                replace_file(layout.superexec_secret, secrets.token_bytes(_SECRET_BYTES), mode=0o600)
        yield


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(
            "not-writable", "The coordinator's folder cannot be written to.", private=str(exc)
        ) from exc


def _renew_certificate(layout: Layout, authority: Authority, names: tuple[str, ...]) -> None:
    # Loopback, too: the SuperLink shows the same certificate to the edge and to its SuperExec.
    issued, key = authority.issue_server(list(dict.fromkeys((*names, _LOOPBACK, "localhost"))), _now())
    replace_file(layout.certificate, key + issued.chain_pem, mode=0o600)


def _now() -> datetime:
    return datetime.now(UTC)
