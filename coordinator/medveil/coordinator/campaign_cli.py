"""The commands that run campaigns, from ``init`` and ``invite`` to ``campaign seal`` and ``watch``.

`register` adds them to the coordinator's command line.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import platformdirs
import typer
from cryptography.hazmat.primitives import serialization
from rich.console import Console
from rich.live import Live

from medveil.coordinator import operations
from medveil.coordinator.campaign import Campaign, CampaignState
from medveil.coordinator.fleet.bundles import keep_bundle
from medveil.coordinator.fleet.layout import Layout
from medveil.coordinator.pki import create_authority, load_authority, parse_request_file
from medveil.coordinator.status_service import StatusServer
from medveil.coordinator.store import Store
from medveil.coordinator.watch import as_screen, status_value
from medveil.models.bundle import open_bundle
from medveil.models.cli_support import (
    FormatOption,
    OutputFormat,
    new_app,
    print_fields,
    print_json,
    stdout_console,
)
from medveil.models.errors import ConfigurationError, ExitCode, StorageError
from medveil.protos.fleet import EDGE_PORT
from medveil.protos.v1 import campaign_pb2
from medveil.protos.v1.conventions import phone_fingerprint

__all__ = ["register"]

_REFRESH_S: Final = 1.0
_OVER: Final = (CampaignState.SEALED, CampaignState.ABORTED)

Home = Annotated[
    Path | None, typer.Option("--home", help="The coordinator's folder; default: MEDVEIL_HOME or the user's.")
]
Number = Annotated[int, typer.Argument(metavar="NUMBER", help="The campaign's number.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept with the step.")]
Names = Annotated[list[str], typer.Option("--name", help="Host name or address that sites use; repeatable.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen at.")]
CampaignPort = Annotated[int, typer.Option("--campaign-port", help="Mutual TLS.")]
EnrolmentPort = Annotated[int, typer.Option("--enrolment-port", help="For joining only.")]

_campaign = new_app("Creates campaigns and moves them on.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module to a command line."""
    app.command("init")(_init)
    app.command("invite")(_invite)
    app.command("approve")(_approve)
    app.command("revoke")(_revoke)
    app.command("run")(_run)
    app.command("serve")(_serve)
    app.command("status")(_status)
    app.command("watch")(_watch)
    app.add_typer(_campaign, name="campaign")


def _init(home: Home = None, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Make the certificate authority and the store."""
    folder = _folder(home)
    authority = create_authority(folder / "authority", _now())
    with Store(folder / "coordinator.sqlite"):
        return print_fields({"authority_fingerprint": authority.fingerprint, "folder": str(folder)}, output)


def _invite(site: str, home: Home = None, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Print a one-time token and the fingerprint that the site compares by phone."""
    authority = load_authority(_folder(home) / "authority")
    with _store(home) as store:
        token = operations.invite(store, site, _now())
    return print_fields(
        {"site": site, "token": token.text, "authority_fingerprint": authority.fingerprint}, output
    )


def _approve(
    site: str,
    request: Annotated[Path, typer.Argument(help="The file of a site without a connection.")],
    out: Annotated[Path, typer.Option("--out", help="The file that goes back.")],
    fingerprint: Annotated[str, typer.Option("--fingerprint", help="The key's, as the site reads it out.")],
    home: Home = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Sign the request file of a site without a connection."""
    authority = load_authority(_folder(home) / "authority")
    try:
        text = request.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError("request-missing", "The request file cannot be read.") from exc
    presented = phone_fingerprint(
        parse_request_file(text)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    if fingerprint.strip().upper() != presented:
        raise ConfigurationError("fingerprint", "The file holds another key than the one that was read out.")
    with _store(home) as store:
        answer = operations.approve_file(store, authority, site, text, _now())
    try:
        out.write_text(answer, encoding="utf-8")
    except OSError as exc:
        raise StorageError("not-writable", "The answer cannot be written there.", private=str(exc)) from exc
    return print_fields(
        {"site": site, "authority_fingerprint": authority.fingerprint, "file": str(out)}, output
    )


def _revoke(site: str, home: Home = None) -> ExitCode:
    """Shut a site out: its certificates and invitations are void at once, its reports stay."""
    with _store(home) as store:
        store.revoke(site, _now())
    return ExitCode.OK


def _serve(
    name: Names,
    host: Host = "127.0.0.1",
    campaign_port: CampaignPort = 8451,
    enrolment_port: EnrolmentPort = 8452,
    home: Home = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Answer sites until Ctrl-C, without Flower: for sites that are brought their bundle by hand."""
    with _store(home) as store:
        server = StatusServer(store, load_authority(_folder(home) / "authority"), name)
        try:
            ports = server.start(host, campaign_port=campaign_port, enrolment_port=enrolment_port)
            print_fields({"host": host, "campaign_port": ports[0], "enrolment_port": ports[1]}, output)
            threading.Event().wait()
        finally:
            server.stop()
    return ExitCode.OK


def _run(
    name: Names,
    host: Host = "127.0.0.1",
    campaign_port: CampaignPort = 8451,
    enrolment_port: EnrolmentPort = 8452,
    fleet_port: Annotated[int, typer.Option("--fleet-port", help="For the sites' Flower nodes.")] = EDGE_PORT,
    superlink_port: Annotated[
        int, typer.Option("--superlink-port", help="Free port on loopback, for this machine alone.")
    ] = 8454,
    home: Home = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Run campaigns until Ctrl-C: the services of serve, and Flower, which carries offers and bundles.

    With --format json one line per event. Killed at any moment, the same command goes on.
    """
    try:
        from medveil.coordinator.fleet.serving import Serving, Settings  # late: it imports Flower
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] not in {"flwr", "h11"}:
            raise
        raise ConfigurationError("flower-missing", "This needs Flower; install medveil anew.") from exc
    for variable in list(os.environ):
        if variable.lower().endswith("_proxy"):  # what is meant for loopback would go through it
            del os.environ[variable]
    settings = Settings(
        _folder(home), tuple(name), host, campaign_port, enrolment_port, fleet_port, superlink_port
    )
    serving = Serving(settings, _tell_json if output is OutputFormat.JSON else _tell_plainly)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: serving.stop())
    serving.run()
    return ExitCode.OK


def _tell_json(event: dict[str, Any]) -> None:
    typer.echo(json.dumps({"at": _now().isoformat(timespec="milliseconds"), **event}))


def _tell_plainly(event: dict[str, Any]) -> None:
    name = str(event["event"])
    details = "; ".join(
        f"{'' if key in name else key.replace('_', ' ') + ' '}"  # not "site present site st-anna"
        f"{', '.join(value) if isinstance(value, list) else value}"
        for key, value in event.items()
        if key != "event"
    )
    typer.echo(f"{_now():%H:%M:%S} {name.replace('-', ' ')} {details}".rstrip())


def _status(number: Number, home: Home = None, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Show how a campaign stands, once."""
    with _store(home) as store:
        value = status_value(store, number, _now())
    if output is OutputFormat.JSON:
        print_json(value)
    else:
        stdout_console().print(as_screen(value))
    return ExitCode.OK


def _watch(number: Number, home: Home = None) -> ExitCode:
    """Show how a campaign stands until it is over; on a terminal live, elsewhere one table per change."""
    console = stdout_console()
    with _store(home) as store:
        value = status_value(store, number, _now())
        if console.is_terminal:
            _watch_live(store, number, value, console)
        else:
            _watch_plainly(store, number, value, console)
    return ExitCode.OK


def _watch_live(store: Store, number: int, value: dict[str, Any], console: Console) -> None:
    with Live(as_screen(value), console=console, auto_refresh=False) as live:
        while value["state"] not in _OVER:
            time.sleep(_REFRESH_S)
            value = status_value(store, number, _now())
            live.update(as_screen(value), refresh=True)


def _watch_plainly(store: Store, number: int, value: dict[str, Any], console: Console) -> None:
    console.print(as_screen(value))
    while value["state"] not in _OVER:
        time.sleep(_REFRESH_S)
        before, value = value, status_value(store, number, _now())
        if {**value, "at": ""} != {**before, "at": ""}:
            console.print(as_screen(value))


@_campaign.command("create")
def _create(
    name: str,
    site: Annotated[list[str], typer.Option("--site", help="A site that takes part; repeatable.")],
    bundle: Annotated[Path, typer.Option("--bundle", help="The signed bundle that sites will run.")],
    minimum_group_size: Annotated[
        int, typer.Option("--minimum-group-size", min=1, help="Fewest images behind any reported figure.")
    ],
    due_days: Annotated[
        int | None, typer.Option("--due-days", min=1, help="From then on a site counts as late.")
    ] = None,
    home: Home = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Write a draft."""
    manifest = open_bundle(bundle, trusted=None).manifest
    due = None if due_days is None else _now() + timedelta(days=due_days)
    with _store(home) as store:
        offer = campaign_pb2.Offer(
            name=name,
            task=manifest.task,
            method=manifest.recipe.method,
            epsilon_255=manifest.recipe.epsilon_255,
            mask_ratio=manifest.recipe.mask_ratio,
            bundle_sha256=keep_bundle(Layout(_folder(home)).bundles, bundle),
            bundle_size_bytes=bundle.stat().st_size,
            minimum_group_size=minimum_group_size,
        )
        return _moved(operations.create_campaign(store, offer, tuple(site), due, _now()), output)


@_campaign.command("offer")
def _offer(
    number: Number, reason: Reason = "offered", home: Home = None, output: FormatOption = OutputFormat.TABLE
) -> ExitCode:
    """Offer a draft to its sites."""
    with _store(home) as store:
        return _moved(operations.offer_campaign(store, number, _now(), reason), output)


@_campaign.command("pause")
def _pause(
    number: Number, reason: Reason, home: Home = None, output: FormatOption = OutputFormat.TABLE
) -> ExitCode:
    """Start nothing new; what sites have begun and report still counts."""
    return _move(number, CampaignState.PAUSED, reason, home, output)


@_campaign.command("resume")
def _resume(
    number: Number, reason: Reason, home: Home = None, output: FormatOption = OutputFormat.TABLE
) -> ExitCode:
    """Go on after a pause."""
    return _move(number, CampaignState.RUNNING, reason, home, output)


@_campaign.command("seal")
def _seal(
    number: Number, reason: Reason = "complete", home: Home = None, output: FormatOption = OutputFormat.TABLE
) -> ExitCode:
    """End a campaign whose every site is verified or waived by name."""
    return _move(number, CampaignState.SEALED, reason, home, output)


@_campaign.command("abort")
def _abort(
    number: Number, reason: Reason, home: Home = None, output: FormatOption = OutputFormat.TABLE
) -> ExitCode:
    """End a campaign without a result."""
    return _move(number, CampaignState.ABORTED, reason, home, output)


@_campaign.command("waive")
def _waive(
    number: Number,
    site: str,
    by: Annotated[str, typer.Option("--by", help="Who decides so.")],
    reason: Reason,
    home: Home = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Let a campaign complete without a site, on a person's word."""
    with _store(home) as store:
        return _moved(operations.waive_site(store, number, site, by, _now(), reason), output)


def _move(
    number: int, state: CampaignState, reason: str, home: Path | None, output: OutputFormat
) -> ExitCode:
    with _store(home) as store:
        return _moved(operations.move_campaign(store, number, state, _now(), reason), output)


def _moved(campaign: Campaign, output: OutputFormat) -> ExitCode:
    return print_fields({"campaign": campaign.plan.number, "state": str(campaign.state)}, output)


def _folder(home: Path | None) -> Path:
    chosen = home or os.environ.get("MEDVEIL_HOME")
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("medveil-coordinator"))


@contextmanager
def _store(home: Path | None) -> Iterator[Store]:
    folder = _folder(home)
    if not folder.is_dir():
        raise ConfigurationError(
            "no-authority", "Nothing is set up here; run medveil-coordinator init first."
        )
    with Store(folder / "coordinator.sqlite") as store:
        yield store


def _now() -> datetime:
    return datetime.now(UTC)
