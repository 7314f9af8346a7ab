from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer

from medveil.models.cli_support import (
    FormatOption,
    OutputFormat,
    new_app,
    open_progress,
    print_json,
    printable,
    run_command,
)
from medveil.models.errors import BusyError, ExitCode, InputError, SignatureError, StorageError


def app_that(action: Callable[[], object]) -> typer.Typer:
    app = new_app("A program under test.")

    @app.callback()
    def group() -> None: ...

    @app.command()
    def act(output: FormatOption = OutputFormat.TABLE) -> object:
        return action()

    return app


def raising(error: BaseException) -> typer.Typer:
    def action() -> None:
        raise error

    return app_that(action)


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (InputError("empty", "The folder is empty."), ExitCode.INPUT),
        (SignatureError("digest", "A part was changed."), ExitCode.REFUSED),
        (StorageError("full", "The disk is full."), ExitCode.STORAGE),
        (BusyError("locked", "Another process works here."), ExitCode.BUSY),
        (RuntimeError("a bug"), ExitCode.UNEXPECTED),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
)
def test_every_error_is_one_line_on_stderr_and_an_exit_code(
    error: BaseException, exit_code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error), "medveil", ["act"]) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip().count("\n") == 0
    assert err.startswith("error: ")
    assert "\x1b" not in err


def test_errors_are_one_json_object_on_stdout_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    app = raising(SignatureError("digest", "A part was changed."))
    assert run_command(app, "medveil", ["act", "--format", "json"]) == ExitCode.REFUSED
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"code": "digest", "message": "A part was changed.", "exit_code": 5}}
    assert err == ""


def test_private_details_and_tracebacks_need_debug(capsys: pytest.CaptureFixture[str]) -> None:
    app = raising(InputError("empty", "The folder is empty.", private="/home/somebody"))
    run_command(app, "medveil", ["act"])
    quiet = capsys.readouterr().err
    run_command(app, "medveil", ["act", "--debug"])
    loud = capsys.readouterr().err
    assert "/home/somebody" not in quiet
    assert "Traceback" not in quiet
    assert "/home/somebody" in loud
    assert "Traceback" in loud


@pytest.mark.parametrize("arguments", [["act", "--nonsense"], ["dance"], ["act", "--format", "yaml"]])
def test_a_wrong_command_line_says_where_help_is(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(app_that(lambda: None), "medveil", arguments) == ExitCode.CONFIGURATION
    err = capsys.readouterr().err
    assert "--help" in err
    assert err.strip().count("\n") == 0


def test_a_wrong_command_line_is_json_too_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app_that(lambda: None), "medveil", ["act", "--format=json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_a_group_without_a_command_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app_that(lambda: None), "medveil", []) == ExitCode.CONFIGURATION
    out, err = capsys.readouterr()
    assert "A program under test." in out + err


def test_a_command_chooses_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app_that(lambda: ExitCode.PARTIAL), "medveil", ["act"]) == ExitCode.PARTIAL
    assert run_command(app_that(lambda: None), "medveil", ["act"]) == ExitCode.OK
    assert run_command(app_that(lambda: None), "medveil", ["--help"]) == ExitCode.OK


def test_a_hostile_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    app = raising(InputError("empty", "The folder \x1b[2Jx\n[red]y[/red] is empty."))
    run_command(app, "medveil", ["act"])
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "[red]y[/red]" in err
    assert printable("a\tb\u202ec\x9bü") == "a\\tb\\u202ec\\x9bü"


def test_json_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="JSON"):
        print_json({"psnr_db": float("inf")})


def test_a_reader_that_leaves_early_is_not_an_error() -> None:
    program = (
        "import sys\n"
        "from medveil.models.cli_support import new_app, run_command\n"
        "app = new_app('x')\n"
        "@app.callback()\n"
        "def group() -> None: ...\n"
        "@app.command()\n"
        "def act() -> None:\n"
        "    for _ in range(100_000): print('line of a long table')\n"
        "sys.exit(run_command(app, 'medveil', ['act']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == ExitCode.UNEXPECTED


def test_a_log_is_told_every_five_minutes_how_far_it_is_and_what_is_left(capsys):
    now = 0.0
    with open_progress(None) as progress:
        progress.get_time = lambda: now
        task = progress.add_task("training", total=3000)
        for _ in range(30):
            now += 100
            progress.advance(task, 100)
    told = [(13, 43), (23, 38), (33, 33), (43, 28), (53, 23), (63, 18), (73, 13), (83, 8), (93, 3)]
    assert capsys.readouterr().err.splitlines() == [f"{done} %, about {left} min left" for done, left in told]


@pytest.mark.parametrize("quiet", [True, False])
def test_short_work_and_quiet_work_leave_no_line(quiet, capsys):
    with open_progress("images", quiet=quiet) as progress:
        task = progress.add_task("protecting", total=None)
        for done in range(20):
            progress.update(task, completed=done, total=20)
            progress.advance(task, 0)
    assert capsys.readouterr().err == ""
