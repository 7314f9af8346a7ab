"""The agent's commands around the door: ``join``, ``renew``, ``egress log`` and ``egress verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from google.protobuf.json_format import MessageToDict

from medveil.agent.campaign_work.book import Book, book_path
from medveil.agent.campaign_work.places import policy_file
from medveil.agent.campaign_work.standing import noise_budget
from medveil.agent.campaigns_cli import PolicyOption
from medveil.agent.egress import Door
from medveil.agent.joining import (
    Identity,
    accept,
    join,
    key_fingerprint,
    load_identity,
    renew,
    request_file,
)
from medveil.agent.policy import load_policy
from medveil.agent.reporting_channel import open_channel
from medveil.agent.reporting_log import EgressLog, SentMessage, sent_messages, verify_log
from medveil.agent.screens import budget_line
from medveil.agent.sealing import home_folder
from medveil.models.cli_support import FormatOption, OutputFormat, new_app, print_fields, print_json
from medveil.models.disk import make_private_folder, write_atomically
from medveil.models.errors import ConfigurationError, ExitCode
from medveil.protos.v1.conventions import methods

__all__ = ["register"]

_egress = new_app("Shows what has left this site.")
_LOG_NAME: Final = "egress.jsonl"

Fingerprint = Annotated[
    str | None, typer.Option("--fingerprint", help="The coordinator's, as it was read out to you.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to a command line."""
    app.command("join")(_join)
    app.command("renew")(_renew)
    app.add_typer(_egress, name="egress")


def _join(
    address: Annotated[str | None, typer.Argument(help="HOST:PORT for joining, from the invitation.")] = None,
    token: Annotated[str | None, typer.Option("--token", help="From the invitation; valid once.")] = None,
    fingerprint: Fingerprint = None,
    request: Annotated[Path | None, typer.Option("--request", help="Write a request file instead.")] = None,
    accepted: Annotated[Path | None, typer.Option("--accept", help="Take the file that came back.")] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Join a coordinator: over the network with a token, or by two files. The key is made here and stays here."""
    folder = _private_folder()
    if request is not None:
        write_atomically(request, request_file(folder).encode("ascii"))
        return print_fields({"request": str(request), "key_fingerprint": key_fingerprint(folder)}, output)
    if fingerprint is None:
        raise ConfigurationError("fingerprint-missing", "Ask the coordinator for the fingerprint, by phone.")
    if accepted is not None:
        try:
            text = accepted.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError("accept-missing", "The file that came back cannot be read.") from exc
        return _joined(accept(folder, text, fingerprint), output)
    if address is None or token is None:
        raise ConfigurationError("join", "Name the address and the --token, or use --request and --accept.")
    with EgressLog(folder / _LOG_NAME) as log:
        return _joined(join(address, token, fingerprint, folder, log), output)


def _renew(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the campaign service.")],
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Get a certificate for a new key."""
    folder = _private_folder()
    old = load_identity(folder)
    with (
        EgressLog(folder / _LOG_NAME) as log,
        open_channel(address, old.authority_pem, (old.key_pem, old.chain_pem)) as channel,
    ):
        return _joined(renew(folder, Door(channel, log)), output)


@_egress.command("log")
def _log(policy: PolicyOption = None, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Show every message that was ever sent, decoded and byte for byte; then what is left of a noise budget."""
    shown = map(_shown, sent_messages(_private_folder() / _LOG_NAME))
    if output is OutputFormat.JSON:
        print_json(list(shown))
    else:
        line = None
        for line in shown:
            typer.echo(
                f"{line['sequence']} {line['time']} {line['method']} {line['message']} {line['bytes']}"
            )
        if line is None:
            typer.echo("Nothing has ever left this site.")
        if (budget := _noise_budget(policy or policy_file())) is not None:
            typer.echo(f"noise budget: {budget_line(budget)}")
    return ExitCode.OK


def _noise_budget(policy: Path) -> dict[str, float | None] | None:
    """Return what this site's reports have cost and may cost; None where it has none, or no noise."""
    if not book_path(_private_folder()).is_file():
        return None
    with Book(book_path(_private_folder())) as book:
        return noise_budget(load_policy(policy if policy.is_file() else None).egress, book)


def _shown(sent: SentMessage) -> dict[str, Any]:
    return {
        "sequence": sent.sequence,
        "time": sent.time,
        "method": sent.method,
        "bytes": sent.payload.hex(),
        "message": _decoded(sent),
    }


def _decoded(sent: SentMessage) -> dict[str, Any] | None:
    """Return the message's fields; None for one that this version does not know."""
    for service in ("CampaignService", "EnrolmentService"):
        for method in methods(service).values():
            if method.path == sent.method:
                message = method.request.FromString(sent.payload)
                return dict(MessageToDict(message, preserving_proto_field_name=True))
    return None


@_egress.command("verify")
def _verify(output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Check that no line of the log was changed or removed; exit code 5 names the first that was."""
    verdict = verify_log(_private_folder() / _LOG_NAME)
    value = {"intact_lines": verdict.lines, "changed_line": verdict.changed_line, "head": verdict.head}
    print_fields(value, output)
    return ExitCode.OK if verdict.changed_line is None else ExitCode.REFUSED


def _joined(identity: Identity, output: OutputFormat) -> ExitCode:
    return print_fields({"site": identity.site, "certificate_until": identity.not_after.isoformat()}, output)


def _private_folder() -> Path:
    folder = home_folder() / "federation"
    make_private_folder(folder)
    return folder
