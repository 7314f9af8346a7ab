"""The command ``check`` where a release has masks: parse, check, render."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from medveil.agent.check_call import CheckCall
from medveil.agent.policy import load_policy
from medveil.agent.release_job import recorded_call
from medveil.agent.screens import listing_table
from medveil.agent.segmentation.site_check.check import MaskedCheckSettings, check_masked_release
from medveil.agent.segmentation.site_check.networks import ARCHITECTURES
from medveil.agent.segmentation.site_check.training import SCHEDULE
from medveil.agent.segmentation.site_check.verdict import MaskedFinding, MaskedSiteCheck
from medveil.agent.victim_check.training import Schedule
from medveil.models.bundle import blur_sentence, constant_mask_sentence
from medveil.models.cli_support import OutputFormat, print_json, stdout_console
from medveil.models.errors import ConfigurationError, ExitCode

__all__ = ["run_check"]

_COLUMNS: Final = ("victim", "clean", "protected", "best", "recoverable", "95 %", "lost", "holds")


def run_check(call: CheckCall, *, schedule: Schedule = SCHEDULE) -> ExitCode:
    """Train U-Nets on originals and on protected copies and show what they find.

    Args:
        call: what was asked.
        schedule: how each victim trains.

    Returns:
        ``REFUSED`` where the site's policy refuses noise that is not proven and these victims were not held off.

    Raises:
        MedveilError: as `check_masked_release`; ConfigurationError "architecture" for an unknown victim.
    """
    _check_known(call.victims)
    check = call.carry_out(check_masked_release, MaskedCheckSettings(schedule=schedule))
    refused = _is_refused(check, call.policy or recorded_call(call.release, call.private).wishes.policy)
    _show(check, call.output, refused=refused)
    return ExitCode.REFUSED if refused else ExitCode.OK


def _check_known(victims: tuple[str, ...]) -> None:
    unknown = [name for name in victims if name not in ARCHITECTURES]
    if unknown:
        raise ConfigurationError(
            "architecture",
            f"No victim of images with masks is called {unknown[0]!r}; there are: {', '.join(ARCHITECTURES)}.",
        )


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
        f"site; trained on {check.training_patches}, {check.seeds} seeds, {check.seconds:.0f} s. Best: an "
        "attacker who can stop early by clean images. Recoverable: with the thresholds that serve best on these "
        "patches, from protected images in the seed that recovers most / from clean images; the 95 % are of the "
        "former. Lost: at least, of what clean images give above the constant mask; -: too little to tell.",
        markup=False,
        soft_wrap=True,
    )
    if check.constant_mask_dice is not None:
        console.print(constant_mask_sentence(check.constant_mask_dice), markup=False, soft_wrap=True)
    if check.blurred is not None and check.blurred.holds is not None:
        left, taught = check.blurred.counted
        console.print(blur_sentence(left, taught, holds=check.blurred.holds), markup=False, soft_wrap=True)
    console.print(f"status: {check.word}", markup=False, soft_wrap=True)
    if refused:
        console.print("This site's policy refuses such a release: do not share it.", markup=False)


def _row(victim: MaskedFinding) -> tuple[str, ...]:
    (low, high), (kept, taught) = victim.interval, victim.counted
    return (
        victim.architecture,
        f"{victim.clean_dice:.2f}",
        f"{victim.protected_dice:.2f}",
        f"{victim.protected_peak_dice:.2f}",
        f"{kept:.2f} / {taught:.2f}",
        f"{low:.2f}-{high:.2f}",
        "-" if victim.lost is None else f"{max(0.0, victim.lost):.0%}",
        {True: "yes", False: "no", None: "-"}[victim.holds],
    )
