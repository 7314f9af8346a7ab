"""The steward's commands around campaigns: ``run``, ``approve``, ``decline`` and ``status``."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from medveil.agent.campaign_work.book import Answer, Book, Campaign, book_path
from medveil.agent.campaign_work.places import federation_folder, policy_file
from medveil.agent.campaign_work.standing import site_value
from medveil.agent.policy import SitePolicy, load_policy
from medveil.agent.screens import budget_line, plain
from medveil.models.cli_support import FormatOption, OutputFormat, print_json, stdout_console
from medveil.models.errors import ConfigurationError, ExitCode

__all__ = ["PolicyOption", "register"]

_REFRESH_S: Final = 1.0

PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy", metavar="FILE", help="This site's policy; site.toml in its own folder if not given."
    ),
]
_Number = Annotated[int, typer.Argument(metavar="NUMBER", help="The campaign's number; `status` lists them.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to a command line."""
    app.command("run")(_run)
    app.command("approve")(_approve)
    app.command("decline")(_decline)
    app.command("status")(_status)


def _run(policy: PolicyOption = None, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Take part in campaigns until Ctrl-C; a service manager may keep it running.

    With --format json one line per event.
    """
    from medveil.agent.campaigns_run import run  # Flower, which no other command waits for

    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.set())

    run(_policy_at(policy), stopping, _say_json if output is OutputFormat.JSON else _say_plainly)
    return ExitCode.OK


def _say_json(event: dict[str, Any]) -> None:
    typer.echo(json.dumps(event))


def _say_plainly(event: dict[str, Any]) -> None:
    if event["event"] == "trouble":
        typer.echo(
            f"trouble: {event['trouble']}. This site's records can't be written; it goes on by itself once they can."
        )
    else:
        typer.echo(
            f"{event['site']} takes part in the campaigns of {event['coordinator']}. "
            "`medveil-agent status` shows how it stands; Ctrl-C ends it."
        )


def _approve(number: _Number, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Let a campaign work on this site's images. The originals stay; only its report leaves."""
    return _answer(number, Answer.ACCEPTED, output)


def _decline(number: _Number, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Keep this site's images out of a campaign; the coordinator is told so and nothing else."""
    return _answer(number, Answer.DECLINED, output)


def _answer(number: int, answer: Answer, output: OutputFormat) -> ExitCode:
    with Book(book_path(federation_folder())) as book:
        campaign = book.answer(number, answer, "steward")
    return _said(campaign, output)


def _said(campaign: Campaign, output: OutputFormat) -> ExitCode:
    value = {
        "campaign": campaign.number,
        "revision": campaign.offer.revision,
        "name": campaign.offer.name,
        "answer": str(campaign.answer),
    }
    if output is OutputFormat.JSON:
        print_json(value)
    else:
        stdout_console().print(
            plain(f"{value['answer']}: campaign {value['campaign']}, {value['name']}"), soft_wrap=True
        )
    return ExitCode.OK


def _status(policy: PolicyOption = None, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Show whether it works, how far it is, and why not; live on a terminal until Ctrl-C."""
    settings = load_policy(_policy_at(policy))
    value = site_value(settings)
    if output is OutputFormat.JSON:
        print_json(value)
        return ExitCode.OK
    console = stdout_console()
    if console.is_terminal:
        _live(settings, value, console)
    else:
        console.print(_screen(value))
    return ExitCode.OK


def _live(settings: SitePolicy, value: dict[str, Any], console: Console) -> None:
    with Live(_screen(value), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(_screen(site_value(settings)), refresh=True)


def _policy_at(given: Path | None) -> Path:
    path = given or policy_file()
    if not path.is_file():
        raise ConfigurationError(
            "no-policy",
            "There is no policy file; write one (deploy/site.example.toml) and name it with --policy.",
        )
    return path.absolute()


# The screen: nothing that the value does not say
# ------------------------------------------------------------------------------------------------

_WHY: Final = {
    "waiting-for-steward": "medveil-agent approve NUMBER, or decline",
    "waiting-for-coordinator": "its bundle, or its word to start, is still to come",
    "bundle-refused": "see the bundle's trouble; approve asks for it once more",
    "stopped": "tried again by itself; the trouble says why",
    "reporting": "the coordinator has not taken the report yet",
}


def _screen(value: dict[str, Any]) -> Group:
    return Group(_site_table(value), *(_campaign_table(campaign) for campaign in value["campaigns"]))


def _site_table(value: dict[str, Any]) -> Table:
    table = Table(title="medveil-agent", show_header=False, title_justify="left")
    coordinator, gate = value["coordinator"], value["gate"]
    rows = [
        ("site", value["site"]),
        ("agent", value["agent"]),
        ("certificate", _certificate(value)),
        ("coordinator", _contact(coordinator, is_running=value["agent"] == "running")),
    ]
    if gate is not None:
        refused = f"; {gate['refused']} refused, last: {gate['last_refusal']}" if gate["refused"] else ""
        rows.append(("Flower", f"last reply {gate['last_reply'] or 'never'}{_but(gate['line'])}{refused}"))
    rows += [(program["name"], _program(program)) for program in value["programs"]]
    rows.append(("egress log", f"{value['egress_log_bytes']:,} bytes; medveil-agent egress log shows each"))
    if value["noise_budget"] is not None:
        rows.append(("noise budget", budget_line(value["noise_budget"])))
    if not value["campaigns"]:
        rows.append(("campaigns", "none offered yet"))
    for name, text in rows:
        table.add_row(name, plain(text))
    return table


def _contact(coordinator: dict[str, Any], *, is_running: bool) -> str:
    if not is_running:
        return "no contact while the agent is stopped; medveil-agent run starts it"
    return f"last accepted {coordinator['last_accepted'] or 'never'}{_but(coordinator['trouble'])}"


_RENEWAL: Final = {
    60: "; `run` renews it by itself when fewer than 30 are left",
    30: "; `run` renews it by itself at its next contact",
    7: "; it could not be renewed so far: does `run` run, and does the coordinator answer?",
}
"""What is to be done, by notice."""


def _certificate(value: dict[str, Any]) -> str:
    days, notice = value["certificate_days"], value["certificate_notice"]
    if notice == 0:
        return "expired; ask the coordinator for a new invitation, and join again"
    return f"{days} days left" + _RENEWAL.get(notice, "")


def _campaign_table(value: dict[str, Any]) -> Table:
    table = Table(
        title=plain(f"campaign {value['campaign']}: {value['name']}"), show_header=False, title_justify="left"
    )
    bundle = value["bundle"]
    share = f"{bundle['held_bytes']:,} of {bundle['size_bytes']:,} bytes"
    why = _WHY.get(value["stage"])
    rows = [
        ("stage", value["stage"] + (f" ({why})" if why else "")),
        ("coordinator says", value["coordinator_state"]),
        ("asks for", f"{value['method']}, epsilon {value['epsilon']:g}/255, mask {value['mask']:g}"),
        ("answer", f"{value['answer']} by the {value['answered_by']}" if value["answer"] else "none yet"),
        ("bundle", ("trusted, " if bundle["trusted"] else "") + share + _but(bundle["trouble"])),
    ]
    if value["images"]:
        rows.append(("images", f"{value['done']} of {value['images']} done: {value['verified']} verified, "
                     f"{value['quarantined']} quarantined, {value['not_protectable']} not protectable"))  # fmt: skip
    if value["images_per_s"] and value["done"] < value["images"]:
        rows.append(("speed", f"{value['images_per_s']:g} images/s, about {value['left_s']} s left"))
    if value["psnr_db"] is not None:
        rows.append(("PSNR", f"median {value['psnr_db']:.1f} dB, lowest {value['psnr_db_min']:.1f} dB"))
    if value["trouble"]:
        rows.append(("trouble", value["trouble"]))
    rows.append(("report", value["report"] or "none yet"))
    if value["last_event"]:
        rows.append(("last event", f"{value['last_event']['time']} {value['last_event']['event']}"))
    for name, text in rows:
        table.add_row(name, plain(text))
    return table


def _but(trouble: str) -> str:
    return f"; trouble: {trouble}" if trouble else ""


def _program(program: dict[str, Any]) -> str:
    if program["pid"] is not None:
        return f"running, {program['restarts']} restarts"
    return f"exit {program['last_exit']}, again in {program['retry_in_s']:.0f} s ({program['restarts']} restarts)"
