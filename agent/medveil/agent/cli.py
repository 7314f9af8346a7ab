"""``medveil-agent``: what a data steward types. Commands parse, call one function and render."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from medveil.agent import campaigns_cli, check_cli, demo_cli, joining_cli, pacs_cli
from medveil.agent.doctor import diagnose
from medveil.agent.formats import reading_formats
from medveil.agent.preparation import Device, Noise, Wishes
from medveil.agent.release_job import Call, Release, ledger_of, make_release, recorded_call
from medveil.agent.restore import restore as restore_release
from medveil.agent.screens import ProgressWatch, listing_table, summary_table
from medveil.agent.sealing import SiteKey, load_site_key, site_key_path
from medveil.agent.workspace import private_beside
from medveil.models.cli_support import (
    FormatOption,
    OutputFormat,
    VersionOption,
    new_app,
    open_progress,
    print_json,
    run_command,
    stderr_console,
    stdout_console,
)
from medveil.models.errors import ConfigurationError, ExitCode

__all__ = ["app", "main"]

app = new_app("Protects this hospital's images, here, without a network.")
_quarantine = new_app("Images that were left out, and why.")
_key = new_app("The site's key, which restores originals.")
_log = new_app("The audit log of a job.")
app.add_typer(_quarantine, name="quarantine")
app.add_typer(_key, name="key")
app.add_typer(_log, name="log")
app.add_typer(pacs_cli.app, name="pacs")
joining_cli.register(app)
campaigns_cli.register(app)
check_cli.register(app)
demo_cli.register(app)

_Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Folder of images, or one NPZ. Never changed.")
]
_Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder for what may be shared; empty or new.")
]
_Bundle = Annotated[Path, typer.Option("--bundle", metavar="FILE", help="The coordinator's signed bundle.")]
_Policy = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="This site's policy; safe defaults without.")
]
_Labels = Annotated[
    Path | None,
    typer.Option("--labels", metavar="FILE", help="CSV with the columns file,label; else SOURCE/labels.csv."),
]
_Private = Annotated[
    Path | None,
    typer.Option("--private", metavar="DIR", help="Folder for what stays here; DIR.private if not given."),
]
_Epsilon = Annotated[
    float | None,
    typer.Option(
        "--epsilon", help="Largest change, in 1/255 of the release window; the bundle's if not given."
    ),
]
_Mask = Annotated[
    float | None,
    typer.Option("--mask", help="Share of an image's pixels that may change; the bundle's if not given."),
]
_DeviceOption = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where surrogates run.")
]
_Noise = Annotated[
    str,
    typer.Option(
        "--noise",
        metavar="optimised|generated",
        help="Made with gradients for each image, or in one pass by the bundle's noise generator.",
    ),
]
_Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all if not given.")]
_Release = Annotated[Path, typer.Argument(metavar="RELEASE", help="The release folder.")]
_KeyFile = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="The key; the site's own if not given.")
]


@app.callback()
def _options(version: VersionOption = False) -> None:
    """Take the options that belong to no command."""


@app.command()
def protect(
    source: _Source,
    out: _Out,
    bundle: _Bundle,
    policy: _Policy = None,
    labels: _Labels = None,
    private: _Private = None,
    epsilon: _Epsilon = None,
    mask: _Mask = None,
    device: _DeviceOption = "auto",
    threads: _Threads = None,
    noise: _Noise = "optimised",
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Make protected copies of labelled images. Run it again to go on after an interruption."""
    wishes = Wishes(bundle, policy, epsilon, mask, _device(device), threads, _noise(noise))
    call = Call(source, out, private, labels, wishes)
    with open_progress("images", quiet=output is OutputFormat.JSON) as progress:
        release = make_release(call, ProgressWatch(progress))
    return _show_release(release, output)


def _device(text: str) -> Device:
    match text:
        case "auto" | "cpu" | "cuda":
            return text
    raise ConfigurationError("device", "--device is auto, cpu or cuda.")


def _noise(text: str) -> Noise:
    match text:
        case "optimised" | "generated":
            return text
    raise ConfigurationError("noise", "--noise is optimised or generated.")


def _show_release(release: Release, output: OutputFormat) -> ExitCode:
    if output is OutputFormat.JSON:
        print_json(release.summary)
    else:
        stdout_console().print(summary_table(release.summary))
    _say_new_key(release.key)
    return ExitCode(int(str(release.summary["exit_code"])))


def _say_new_key(key: SiteKey) -> None:
    if key.created:
        stderr_console().print(
            f"A new site key was made: {key.path}\n"
            "Back it up in a safe place now: without it the originals cannot be restored from a release.",
            soft_wrap=True,
            markup=False,
        )


@app.command("restore")
def restore_command(
    release: _Release,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the originals; empty or new.")
    ],
    private: _Private = None,
    key: _KeyFile = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Give the originals back from protected copies and sealed sidecars: every pixel, every element equal."""
    identity = load_site_key(key)
    with open_progress("files", quiet=output is OutputFormat.JSON) as progress:
        task = progress.add_task("restoring", total=None)
        done = restore_release(
            release,
            private or private_beside(release),
            out,
            identity,
            reading_formats(),
            advance=lambda files: progress.advance(task, files),
        )
    refused = [{"file": str(r.target), "code": r.code, "message": r.public} for r in done.refused]
    report = {"files": done.files, "restored": len(done.restored), "refused": refused, "out": str(out)}
    if output is OutputFormat.JSON:
        print_json(report)
    else:
        stdout_console().print(f"restored {len(done.restored)} of {done.files} files", markup=False)
        if refused:
            rows = [(r["file"], r["code"], r["message"]) for r in refused]
            stdout_console().print(listing_table("refused", ("file", "reason", "what it means"), rows))
    if not done.refused:
        return ExitCode.OK
    return ExitCode.PARTIAL if done.restored else ExitCode.REFUSED


@app.command()
def doctor(
    source: _Source,
    bundle: _Bundle,
    policy: _Policy = None,
    labels: _Labels = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the release would go.")] = Path(),
    epsilon: _Epsilon = None,
    mask: _Mask = None,
    device: _DeviceOption = "auto",
    threads: _Threads = None,
    noise: _Noise = "optimised",
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Check everything, protect three of this site's images, and predict hours and disk for all of them."""
    wishes = Wishes(bundle, policy, epsilon, mask, _device(device), threads, _noise(noise))
    now = datetime.now().astimezone()
    found = diagnose(source, wishes, labels_file=labels, out=out.absolute(), now=now)
    if output is OutputFormat.JSON:
        checks = [{"name": c.name, "ok": c.ok, "detail": c.detail, "code": c.code} for c in found.checks]
        forecast = None if found.forecast is None else asdict(found.forecast)
        print_json({"checks": checks, "forecast": forecast, "exit_code": int(found.exit_code)})
        return found.exit_code
    rows = [(check.name, "ok" if check.ok else "FAILED", check.detail) for check in found.checks]
    stdout_console().print(listing_table("medveil doctor", ("check", "", "found"), rows))
    if found.forecast is not None:
        forecast_line = (
            f"All {found.forecast.images} images: about {found.forecast.hours:.2f} h, "
            f"{found.forecast.release_bytes / 1e6:,.1f} MB to share, "
            f"{found.forecast.private_bytes / 1e6:,.1f} MB to keep."
        )
        stdout_console().print(forecast_line, markup=False, soft_wrap=True)
    return found.exit_code


@_quarantine.command("list")
def quarantine_list(
    release: _Release, private: _Private = None, output: FormatOption = OutputFormat.TABLE
) -> ExitCode:
    """List the images that were left out, with the reason and what to do."""
    with ledger_of(release, private) as ledger:
        entries = [
            {
                "file": str(file.relative),
                "frame": image.frame,
                "reason": image.reason,
                "message": image.sentence,
            }
            for file, image in ledger.quarantined()
        ]
    if output is OutputFormat.JSON:
        print_json({"quarantined": entries})
    else:
        rows = [(e["file"], e["frame"], e["reason"], e["message"]) for e in entries]
        columns = ("file", "frame", "reason", "what to do")
        stdout_console().print(listing_table(f"{len(entries)} quarantined", columns, rows))
    return ExitCode.OK


@_quarantine.command("retry")
def quarantine_retry(
    release: _Release,
    private: _Private = None,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Only this reason; all if not given.")
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Try quarantined images again after their cause was dealt with; goes on with the same job."""
    call = recorded_call(release, private)
    with open_progress("images", quiet=output is OutputFormat.JSON) as progress:
        done = make_release(
            call, ProgressWatch(progress), retry=lambda found: reason is None or found == reason
        )
    return _show_release(done, output)


@_key.command("show")
def key_show(key: _KeyFile = None, output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Show where the key lies and its public half."""
    return _show_key(load_site_key(key), output)


@_key.command("create")
def key_create(output: FormatOption = OutputFormat.TABLE) -> ExitCode:
    """Make the site's key, if there is none yet."""
    if site_key_path().exists():
        raise ConfigurationError(
            "key-exists", "This site has a key already; `medveil-agent key show` shows it."
        )
    key = load_site_key(create=True)
    _say_new_key(key)
    return _show_key(key, output)


def _show_key(key: SiteKey, output: OutputFormat) -> ExitCode:
    if output is OutputFormat.JSON:
        print_json({"path": str(key.path), "recipient": key.recipient})
    else:
        stdout_console().print(f"{key.recipient}\n{key.path}", markup=False, soft_wrap=True)
    return ExitCode.OK


@_log.command("show")
def log_show(
    release: _Release, private: _Private = None, output: FormatOption = OutputFormat.TABLE
) -> ExitCode:
    """Print the audit log."""
    with ledger_of(release, private) as ledger:
        lines = [asdict(line) for line in ledger.log_lines()]
    if output is OutputFormat.JSON:
        print_json({"lines": lines})
    else:
        rows = [(x["sequence"], x["time"], x["event"], x["subject"], x["detail"]) for x in lines]
        columns = ("line", "time", "event", "image", "detail")
        stdout_console().print(listing_table("audit log", columns, rows))
    return ExitCode.OK


@_log.command("verify")
def log_verify(
    release: _Release, private: _Private = None, output: FormatOption = OutputFormat.TABLE
) -> ExitCode:
    """Check that no line of the audit log was changed."""
    with ledger_of(release, private) as ledger:
        changed = ledger.first_changed_line()
    if output is OutputFormat.JSON:
        print_json({"intact": changed is None, "first_changed_line": changed})
    else:
        text = "the log is intact" if changed is None else f"line {changed} is not as it was written"
        stdout_console().print(text, markup=False)
    return ExitCode.OK if changed is None else ExitCode.REFUSED


def main() -> int:
    """Run the command line and return its exit code."""
    return run_command(app, "medveil-agent")
