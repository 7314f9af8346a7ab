"""``medveil-agent pacs``: receive, pull, push, status, retry, and the service that does all of it."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from medveil.agent.pacs_policy import PacsPolicy
from medveil.agent.policy import load_policy
from medveil.agent.preparation import Wishes
from medveil.agent.screens import listing_table
from medveil.models.cli_support import (
    FormatOption,
    OutputFormat,
    new_app,
    print_json,
    stderr_console,
    stdout_console,
)
from medveil.models.errors import ConfigurationError, ExitCode

if TYPE_CHECKING:
    from medveil.agent.pacs_service import Event, Service

__all__ = ["app"]

app = new_app("The hospital's own PACS: receive from it, protect, send back.")

_EXTRA: Final = ("httpx", "pynetdicom")

_Policy = Annotated[
    Path, typer.Option("--policy", metavar="FILE", help="This site's policy, with its table [pacs].")
]


@app.command("run")
def _run(
    bundle: Annotated[
        Path, typer.Option("--bundle", metavar="FILE", help="The coordinator's signed bundle.")
    ],
    policy: _Policy,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="CSV with the columns uid,label (study, series or object); read again when it changes.",
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End when nothing is left to do.")] = False,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Receive, protect and push until Ctrl-C; a service manager may keep it running."""
    with _stopping() as stop, _service(policy) as service:
        from medveil.agent.pacs_service import Work

        service.run(Work(Wishes(bundle, policy), labels), stop, _say(output), once=once)
    return ExitCode.OK


@app.command("receive")
def _receive(policy: _Policy, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Take in what known senders send, until Ctrl-C; nothing is protected yet."""
    with _stopping() as stop, _service(policy) as service:
        service.receive(stop, _say(output))
    return ExitCode.OK


@app.command("pull")
def _pull(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Study Instance UID.")],
    series: Annotated[str, typer.Argument(metavar="SERIES", help="Series Instance UID.")],
    policy: _Policy,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Fetch one series from the PACS; asking again fetches what is missing."""
    with _service(policy) as service:
        pulled = service.pull(study, series)
    report = {
        "listed": len(pulled.expected),
        "missing": len(pulled.missing),
        "rejected": dict(Counter(one.code for one in pulled.rejected)),
    }
    if output is OutputFormat.JSON:
        print_json(report)
    else:
        here = len(pulled.expected) - len(pulled.missing)
        stdout_console().print(f"{here} of {len(pulled.expected)} objects are here", markup=False)
    return ExitCode.PARTIAL if pulled.missing else ExitCode.OK


@app.command("push")
def _push(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="The release folder.")],
    policy: _Policy,
    private: Annotated[
        Path | None,
        typer.Option("--private", metavar="DIR", help="Its private folder; RELEASE.private if not given."),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Send a release's DICOM objects to the PACS, and read each one back. Run it again to go on."""
    with _stopping() as stop, _service(policy) as service:
        counts = service.push(release, private, stop, _say(OutputFormat.TABLE))
    _show({"delivery": counts}, output)
    return ExitCode.OK if counts["verified"] == sum(counts.values()) else ExitCode.PARTIAL


@app.command("status")
def _status(policy: _Policy, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Show how many objects stand where; works beside a running service."""
    with _extra():
        from medveil.agent.pacs_service import status

        _show(status(_settings(policy)), output)
    return ExitCode.OK


@app.command("retry")
def _retry(policy: _Policy, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Queue again what the PACS refused or holds differently."""
    with _service(policy) as service:
        count = service.retry()
    if output is OutputFormat.JSON:
        print_json({"queued": count})
    else:
        stdout_console().print(f"{count} objects are queued again", markup=False)
    return ExitCode.OK


def _show(figures: dict[str, dict[str, int]], output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(figures)
        return
    rows = [(place, state, count) for place, states in figures.items() for state, count in states.items()]
    stdout_console().print(listing_table("PACS", ("", "state", "objects"), rows))


def _say(output: OutputFormat) -> Callable[[Event], None]:
    """Return what tells the operator of each event: a JSON line on stdout, or a plain line on stderr."""

    def say(event: Event) -> None:
        if output is OutputFormat.JSON:
            typer.echo(json.dumps({"event": event.what, **event.counts, "code": event.code}))
            return
        figures = ", ".join(f"{name} {count}" for name, count in event.counts.items())
        text = " ".join(filter(None, (event.what, event.code, figures)))
        stderr_console().print(text, markup=False, soft_wrap=True)

    return say


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Yield what a service manager's SIGTERM sets; Ctrl-C interrupts at once, which loses nothing either."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _service(policy: Path) -> Iterator[Service]:
    with _extra():
        from medveil.agent.pacs_service import open_service
    with open_service(_settings(policy)) as service:
        yield service


@contextmanager
def _extra() -> Iterator[None]:
    """Say what to install where the DICOM network libraries are missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name not in _EXTRA:
            raise
        raise ConfigurationError(
            "no-dicom-net", "The PACS commands need the extra [dicom-net]: pip install 'medveil[dicom-net]'."
        ) from exc


def _settings(policy: Path) -> PacsPolicy:
    pacs = load_policy(policy).pacs
    if pacs is None:
        raise ConfigurationError(
            "pacs", "The policy has no table [pacs], so the door to the PACS stays shut."
        )
    return pacs
