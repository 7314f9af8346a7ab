"""The command ``check``: what victims learn from this site's own release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medveil.agent.check_call import CheckCall
from medveil.agent.screens import listing_table
from medveil.models.cli_support import FormatOption, OutputFormat, print_json, stdout_console
from medveil.models.errors import ExitCode

if TYPE_CHECKING:
    from medveil.agent.victim_check import VictimFinding

__all__ = ["register"]

_COLUMNS = (
    "victim",
    "clean",
    "protected",
    "95 %",
    "protected, best epoch",
    "recoverable",
    "recoverable AUC",
    "lost at least",
    "holds",
)


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command("check")(_check)


def _check(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="The release folder.")],
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle", metavar="FILE", help="What it was made with; as its last run says if not given."
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="This site's policy; as the last run had it."),
    ] = None,
    private: Annotated[
        Path | None,
        typer.Option("--private", metavar="DIR", help="The private folder; RELEASE.private if not given."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes", min=0, help="Longest time, 30 if not given; seeds cut off by it don't count."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Runs of every victim; 3 if not given, as the word takes."),
    ] = None,
    victims: Annotated[
        list[str] | None,
        typer.Option(
            "--victim",
            help="mobilenet, inception or mlp; with masks unet-bn or unet-in; repeatable; all of them if not given.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Victims trained at once; all CPU threads if not given."),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Train small models on originals and on protected copies, here, and show what they learn."""
    from medveil.agent.segmentation.site_check.check import has_masks  # SciPy: no other command waits
    from medveil.agent.segmentation.site_check.command import run_check
    from medveil.agent.victim_check.check import CheckSettings, check_release

    call = CheckCall(release, private, bundle, policy, minutes, seeds, tuple(victims or ()), threads, output)
    if has_masks(release, private):
        return run_check(call)
    check = call.carry_out(check_release, CheckSettings())
    if output is OutputFormat.JSON:
        print_json({**check.model_dump(mode="json"), "verdict": check.verdict, "protection": check.word})
        return ExitCode.OK
    console = stdout_console()
    console.print(listing_table("medveil check", _COLUMNS, [_row(victim) for victim in check.victims]))
    console.print(
        f"Balanced accuracy on {check.hold_out} clean images of this site; trained on {check.training_images}, "
        f"{check.seeds} seeds, {check.seconds:.0f} s. Recoverable: the best relabelling of the answers, or after "
        "calibration on 50 clean images. Best epoch: an attacker who can stop early by clean images.",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"status: {check.word}", markup=False, soft_wrap=True)
    return ExitCode.OK


def _row(victim: VictimFinding) -> tuple[str, ...]:
    low, high = victim.balanced_interval
    return (
        victim.architecture,
        f"{victim.clean.balanced_accuracy:.2f}",
        f"{victim.protected.balanced_accuracy:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{victim.protected_peak.balanced_accuracy:.2f}",
        f"{victim.protected.recoverable_accuracy:.2f}",
        f"{victim.protected.recoverable_auc:.2f}",
        "-" if victim.lost is None else f"{max(0.0, victim.lost):.0%}",
        {True: "yes", False: "no", None: "can't tell"}[victim.holds],
    )
