"""The command ``check`` where a release has masks: parse, check, render."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from medveil.agent.policy import load_policy
from medveil.agent.release_job import recorded_call
from medveil.agent.screens import listing_table
from medveil.agent.segmentation.site_check.check import MaskedCheckSettings, check_masked_release
from medveil.agent.segmentation.site_check.networks import ARCHITECTURES
from medveil.agent.segmentation.site_check.training import SCHEDULE
from medveil.agent.segmentation.site_check.verdict import MaskedFinding, MaskedSiteCheck
from medveil.agent.victim_check.training import Schedule
from medveil.models.cli_support import OutputFormat, open_progress, print_json, stdout_console
from medveil.models.errors import ConfigurationError, ExitCode

__all__ = ["run_check"]

_COLUMNS: Final = (
    "victim", "clean", "protected", "95 %", "protected, best reading", "lost at least", "holds",
)  # fmt: skip


def run_check(
    release: Path,
    private: Path | None,
    *,
    bundle: Path | None,
    policy: Path | None,
    minutes: float | None,
    seeds: int | None,
    victims: list[str] | None,
    threads: int | None,
    output: OutputFormat,
    schedule: Schedule = SCHEDULE,
) -> ExitCode:
    """Train U-Nets on originals and on protected copies and show what they find.

    Args:
        release: folder of the protected copies.
        private: its private folder; None: beside it.
        bundle: what it was made with; None: as its last run says.
        policy: likewise.
        minutes: longest time; None: 30.
        seeds: runs of every victim; None: as the word takes.
        victims: architectures; None or empty: all of them.
        threads: victims trained at once; None: as many as there are threads.
        output: table or JSON.
        schedule: how each victim trains.

    Returns:
        ``REFUSED`` where the site's policy refuses noise that is not proven and these victims were not held off.

    Raises:
        MedveilError: as `check_masked_release`; ConfigurationError "architecture" for an unknown victim.
    """
    settings = MaskedCheckSettings(threads=threads, schedule=schedule)
    if minutes is not None:
        settings = replace(settings, limit_s=60 * minutes)
    if seeds is not None:
        settings = replace(settings, seeds=seeds)
    if victims:
        settings = replace(settings, architectures=_known(victims))
    with open_progress("victims", quiet=output is OutputFormat.JSON) as bar:
        task = bar.add_task("training", total=None)
        check = check_masked_release(
            release,
            private,
            bundle=bundle,
            policy=policy,
            settings=settings,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    refused = _is_refused(check, policy or recorded_call(release, private).wishes.policy)
    _show(check, output, refused=refused)
    return ExitCode.REFUSED if refused else ExitCode.OK


def _known(victims: list[str]) -> tuple[str, ...]:
    unknown = [name for name in victims if name not in ARCHITECTURES]
    if unknown:
        raise ConfigurationError(
            "architecture",
            f"No victim of images with masks is called {unknown[0]!r}; there are: {', '.join(ARCHITECTURES)}.",
        )
    return tuple(dict.fromkeys(victims))


def _is_refused(check: MaskedSiteCheck, policy: Path | None) -> bool:
    """Return whether the policy refuses a release whose protection this check did not prove."""
    return load_policy(policy).segmentation.unproven == "refuse" and check.verdict != "protected"


def _show(check: MaskedSiteCheck, output: OutputFormat, *, refused: bool) -> None:
    if output is OutputFormat.JSON:
        stated = {"verdict": check.verdict, "protection": check.word, "refused_by_policy": refused}
        print_json({**check.model_dump(mode="json"), **stated})
        return
    console = stdout_console()
    console.print(listing_table("medveil check", _COLUMNS, [_row(victim) for victim in check.victims]))
    console.print(
        f"Dice on {check.hold_out_patches} clean patches of {check.hold_out_units} volumes, series or images of this "
        f"site; trained on {check.training_patches}, {check.seeds} seeds, {check.seconds:.0f} s. Best reading: an "
        "attacker who can stop early by clean images.",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"status: {check.word}", markup=False, soft_wrap=True)
    if refused:
        console.print("This site's policy refuses such a release: do not share it.", markup=False)


def _row(victim: MaskedFinding) -> tuple[str, ...]:
    low, high = victim.interval
    return (
        victim.architecture,
        f"{victim.clean_dice:.2f}",
        f"{victim.protected_dice:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{victim.protected_peak_dice:.2f}",
        "-" if victim.lost is None else f"{victim.lost:.0%}",
        {True: "yes", False: "no", None: "can't tell"}[victim.holds],
    )
