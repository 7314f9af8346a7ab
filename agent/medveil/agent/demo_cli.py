"""The command ``demo``: one hospital, or with ``--campaign`` a coordinator and three."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from medveil.agent.screens import ProgressWatch, listing_table, summary_table
from medveil.models.cli_support import FormatOption, OutputFormat, open_progress, print_json, stdout_console
from medveil.models.errors import ExitCode

__all__ = ["register"]

_COLUMNS = (
    "site",
    "images",
    "verified",
    "quarantined",
    "not protectable",
    "median PSNR",
    "victim, clean -> protected (recoverable)",
    "report",
)
_NOT_SHOWN = (
    "Victims: balanced accuracy on clean images of the site, one seed, so a direction and no proof; 0.50 is chance. "
    "`medveil-agent check RELEASE` trains three seeds and says what the release has earned."
)

_STAND_IN = (
    "The shipped surrogates know drawn images only, so this shows the campaign, and that such noise does not protect "
    "these images: `medveil-coordinator train` makes surrogates from public images of their kind (--bundle)."
)


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command("demo")(_demo)


def _demo(
    campaign: Annotated[
        bool,
        typer.Option(
            "--campaign", help="A coordinator and three hospitals on this machine, over Flower and gRPC."
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="PATH", help="Your own labelled images; phantoms are drawn if not given."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for all it makes; medveil-demo[-campaign][-own] if not given.",
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="FILE", help="A coordinator's bundle for the classes of --data."),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Show the main job on images that medveil draws itself, or on your own."""
    name = "medveil-demo" + ("-campaign" if campaign else "") + ("" if data is None else "-own")
    show = _campaign if campaign else _one_site
    return show(out or Path(name), data, bundle, output)


def _one_site(out: Path, data: Path | None, bundle: Path | None, output: OutputFormat) -> ExitCode:
    from medveil.agent.demo import demonstrate  # draws with SciPy, which no other command waits for

    with open_progress("images", quiet=output is OutputFormat.JSON) as progress:
        shown = demonstrate(out, data, bundle, ProgressWatch(progress))
    report = shown.report
    if output is OutputFormat.JSON:
        print_json(report)
    else:
        console = stdout_console()
        console.print(f"originals: {shown.source}", markup=False, soft_wrap=True)
        console.print(summary_table(report))
        console.print(f"Not shown: {shown.not_shown}", markup=False, soft_wrap=True)
    return ExitCode(int(str(report["exit_code"])))


# The campaign
# ------------------------------------------------------------------------------------------------


def _campaign(out: Path, data: Path | None, bundle: Path | None, output: OutputFormat) -> ExitCode:
    from medveil.agent.demo import show_campaign

    with open_progress("images", quiet=output is OutputFormat.JSON) as progress:
        shown = show_campaign(out, data, bundle, _Watch(progress, quiet=output is OutputFormat.JSON))
    if output is OutputFormat.JSON:
        print_json(shown)
    else:
        console = stdout_console()
        state = shown["campaign"]["state"]
        title = f"campaign {state} after {shown['seconds_to_seal']:.0f} s"
        console.print(listing_table(title, _COLUMNS, [_row(site) for site in shown["sites"]]))
        console.print(_NOT_SHOWN, markup=False, soft_wrap=True)
        if not shown["surrogates_know_the_classes"]:
            console.print(_STAND_IN, markup=False, soft_wrap=True)
        for site in shown["sites"]:
            console.print(f"{site['site']}: release {site['release']}", markup=False, soft_wrap=True)
        console.print(
            f"Everything lies in {shown['folder']}; each site's `home/federation/egress.jsonl` holds what left it.",
            markup=False,
            soft_wrap=True,
        )
    whole = all(site["verified"] == site["images"] for site in shown["sites"])
    return ExitCode.OK if whole else ExitCode.PARTIAL


class _Watch:
    """Prints each step, and moves the bar while sites work."""

    def __init__(self, progress: Progress, *, quiet: bool) -> None:
        self._progress, self._quiet = progress, quiet
        self._task = progress.add_task("protecting, all sites", total=None)

    def step(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            self._progress.console.print(text, markup=False, soft_wrap=True)

    def images(self, done: int, total: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, total=total or None)


def _row(site: dict[str, Any]) -> tuple[object, ...]:
    psnr = "-" if site["psnr_db"] is None else f"{site['psnr_db']:.1f} dB"
    counts = tuple(site[name] for name in ("images", "verified", "quarantined", "not_protectable"))
    return (site["site"], *counts, psnr, _victims(site), site["report"] or "none")


def _victims(site: dict[str, Any]) -> str:
    if site["check"] is None:
        return f"not checked: {site['check_refused']}"
    return "; ".join(
        f"{v['victim']} {v['clean']:.2f} -> {v['protected']:.2f} ({v['recoverable']:.2f})"
        for v in site["check"]
    )
