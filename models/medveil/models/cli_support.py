"""What medveil's command lines share: consoles, ``--format json``, ``--debug``, and errors as exit codes.

A command parses, calls one function and renders. Everything between that function and the shell is here::

    app = new_app("What this program does.")


    @app.command()
    def inspect(file: Path, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
        summary = describe(file)
        if output is OutputFormat.JSON:
            print_json(summary)
        else:
            stdout_console().print(as_table(summary))
        return ExitCode.OK


    def main() -> int:
        return run_command(app, "medveil")
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.metadata import version
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typer.core import TyperGroup

from medveil.models.errors import ExitCode, MedveilError

__all__ = [
    "FormatOption",
    "OutputFormat",
    "VersionOption",
    "new_app",
    "open_progress",
    "print_fields",
    "print_json",
    "printable",
    "run_command",
    "stderr_console",
    "stdout_console",
]

# Wide enough that a table in a file or a pipe keeps each row, with a SHA-256 in it, on one line.
_PLAIN_WIDTH = 240
# A victim takes a minute: over a shorter time there is no rate, and so no time left, to show.
_SPEED_PERIOD_S = 600.0
_LINE_EVERY_S = 300.0
_DEBUG_FLAG = "--debug"
_EPILOG = f"{_DEBUG_FLAG} anywhere on the line prints the traceback of an error."


class OutputFormat(StrEnum):
    """How a command prints its result; both forms show the same data."""

    TABLE = "table"
    JSON = "json"


FormatOption = Annotated[
    OutputFormat, typer.Option("--format", help="A table to read, or one JSON object to parse.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medveil {version('medveil')}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
]


def new_app(help_text: str, *, cls: type[TyperGroup] = TyperGroup) -> typer.Typer:
    """Return an empty command group that leaves error handling to `run_command`."""
    return typer.Typer(
        help=help_text,
        cls=cls,
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def stdout_console() -> Console:
    """Return a console for results; plain, wide text without colour codes when stdout is not a terminal."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    return console


def stderr_console() -> Console:
    """Return a console for errors, notices and progress."""
    return Console(file=sys.stderr, highlight=False)


def print_json(value: object) -> None:
    """Print one JSON object on stdout: ASCII only, so that any locale and any parser can take it.

    Raises:
        ValueError: `value` holds NaN or infinity, which are not JSON.
    """
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def print_fields(fields: Mapping[str, object], output: OutputFormat) -> ExitCode:
    """Print a short answer: one JSON object, or a line per field; return success."""
    if output is OutputFormat.JSON:
        print_json(fields)
    else:
        for name, value in fields.items():
            typer.echo(f"{name.replace('_', ' ')}: {value}")
    return ExitCode.OK


def printable(text: str) -> str:
    """Return `text` on one line, control characters escaped: a file name must not steer the terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


class _RateColumn(ProgressColumn):
    """Units per second, as measured so far."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")


class _LoggedProgress(Progress):
    """Progress where no terminal draws a bar: now and then a line with the share done and the time left.

    Args:
        console: where the lines go.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True, speed_estimate_period=_SPEED_PERIOD_S)
        self._next_line: dict[TaskID, float] = {}

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        task = next(task for task in self.tasks if task.id == task_id)
        now = self.get_time()
        due = self._next_line.setdefault(task_id, now + _LINE_EVERY_S)
        if now < due or not task.total or task.finished:
            return
        self._next_line[task_id] = now + _LINE_EVERY_S
        left = task.time_remaining
        minutes = "" if left is None else f", about {max(1, round(left / 60))} min left"
        self.console.print(f"{task.percentage:.0f} %{minutes}", markup=False)


def open_progress(unit: str | None, *, quiet: bool = False) -> Progress:
    """Return a progress bar on stderr with count, rate (`unit` per second) and time left.

    Without a unit, for work that has none, it shows the share done instead of count and rate. Use it as a context
    manager. It draws only on a terminal; a log gets a line every few minutes.
    """
    console = stderr_console()
    if not quiet and not console.is_terminal:
        return _LoggedProgress(console)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *((TaskProgressColumn(),) if unit is None else (MofNCompleteColumn(), _RateColumn(unit))),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=_SPEED_PERIOD_S,
        disable=quiet,
    )


def run_command(app: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run `app` and return the exit code; the console script's whole body.

    A `MedveilError` becomes one red line on stderr, or with ``--format json`` one object on stdout::

        {"error": {"code": "digest", "message": "...", "exit_code": 5}}

    Commands return their `ExitCode` (``None`` counts as success). Ctrl-C is 130; a reader that closed the
    pipe (``| head``) ends the command without a word.

    Args:
        app: the commands.
        program: the name the user typed, for usage texts.
        arguments: the command line without the program's name; None takes ``sys.argv``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = _DEBUG_FLAG in given
    as_json = _asks_for_json(given)
    try:
        # Not in standalone mode: click would print its own messages and choose its own exit codes.
        result = typer.main.get_command(app).main(
            args=[argument for argument in given if argument != _DEBUG_FLAG],
            prog_name=program,
            standalone_mode=False,
        )
        sys.stdout.flush()
        exit_code = int(result) if isinstance(result, int) else ExitCode.OK
        if exit_code == ExitCode.INTERRUPTED:  # click answers Ctrl-C with this code
            _report("interrupted", "Interrupted.", ExitCode.INTERRUPTED, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        exit_code = _report("interrupted", "Interrupted.", ExitCode.INTERRUPTED, as_json=as_json)
    except click.exceptions.NoArgsIsHelpError as help_asked:
        # typer with rich has printed the help already and leaves the message empty
        typer.echo(help_asked.format_message(), err=True, nl=False)
        exit_code = ExitCode.CONFIGURATION
    except click.ClickException as usage:
        exit_code = _report("usage", _usage_sentence(usage, program), ExitCode.CONFIGURATION, as_json=as_json)
    except BrokenPipeError:
        exit_code = _close_broken_pipe()
    except SystemExit as stop:  # click's own answer to a closed pipe
        exit_code = stop.code if isinstance(stop.code, int) else ExitCode.UNEXPECTED
    except MedveilError as error:
        exit_code = _report(error.code, error.public, error.exit_code, as_json=as_json)
        if debug:
            traceback.print_exc()
            if error.private:
                stderr_console().print(Text(f"detail: {error.private}"), soft_wrap=True)
    except Exception as error:  # the last line of defence: a bug still ends in one sentence and a code
        exit_code = _report(
            "unexpected",
            f"medveil stopped on an error it did not expect ({type(error).__name__}). "
            f"Run the same command with {_DEBUG_FLAG} and report what it prints.",
            ExitCode.UNEXPECTED,
            as_json=as_json,
        )
        if debug:
            traceback.print_exc()
    return int(exit_code)


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Tell whether the line asks for JSON, also when it is too wrong for the parser to say so."""
    separated = any(pair == ("--format", "json") for pair in itertools.pairwise(arguments))
    return separated or "--format=json" in arguments


def _usage_sentence(usage: click.ClickException, program: str) -> str:
    command = usage.ctx.command_path if isinstance(usage, click.UsageError) and usage.ctx else program
    return f"{usage.format_message()} See: {command} --help"


def _report(code: str, message: str, exit_code: ExitCode, *, as_json: bool) -> ExitCode:
    with contextlib.suppress(BrokenPipeError):
        if as_json:
            print_json({"error": {"code": code, "message": message, "exit_code": int(exit_code)}})
        else:
            line = Text(f"error: {printable(message)} [{code}]", style="red")
            stderr_console().print(line, soft_wrap=True)
    return exit_code


def _close_broken_pipe() -> ExitCode:
    """Let the interpreter's own flush at exit go nowhere instead of failing once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.UNEXPECTED
