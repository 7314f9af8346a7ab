"""What a run reports: one value that the table and the JSON both show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

from medveil.agent.budget import Budget
from medveil.agent.job import Outcome
from medveil.agent.ledger import Totals
from medveil.agent.preparation import DRAWN_NOISE, Prepared
from medveil.models.bundle import Manifest, ProxyCheck, SegmentationCheck, overlap_sentences
from medveil.models.errors import ExitCode
from medveil.models.methods.generated import NAME as GENERATED

if TYPE_CHECKING:
    from medveil.agent.segmentation.site_check import MaskedSiteCheck
    from medveil.agent.victim_check import SiteCheck

__all__ = [
    "EXIT_MEANING",
    "NOTHING_PERTURBED",
    "PROTECTION_STATUS",
    "UNPROVEN_STATUS",
    "exit_code",
    "proxy_statement",
    "segmentation_statement",
    "summary",
]

EXIT_MEANING: Final[Mapping[ExitCode, str]] = {
    ExitCode.OK: "every image is verified",
    ExitCode.PARTIAL: "something was quarantined or not protectable; the rest is verified",
    ExitCode.INPUT: "nothing in the source could be used",
}

PROTECTION_STATUS: Final = "perturbed, not verified by a victim"
"""What a site may say on its own: only trained victims can tell whether a release protects."""

UNPROVEN_STATUS: Final = "perturbed, not verified: the coordinator's own victims learned from this noise"
"""Where the bundle's check itself says so: protection depends on the task, and easy ones escape."""

NOTHING_PERTURBED: Final = "nothing was perturbed"


def exit_code(totals: Totals) -> ExitCode:
    """Return how the job stands."""
    if totals.verified == totals.images:
        return ExitCode.OK
    if totals.verified == 0 and totals.not_protectable == 0:
        return ExitCode.INPUT
    return ExitCode.PARTIAL


def proxy_statement(check: ProxyCheck | None) -> str:
    """Return the coordinator's own measurement, made on public images and not on these, in one sentence."""
    if check is None:
        return "The coordinator has measured nothing with this bundle."
    victims = ", ".join(_proxy_victim(design, check) for design in _designs(check))
    return (
        f"Measured by the coordinator on public images (epsilon {check.epsilon_255:g}/255, mask "
        f"{check.mask_ratio:g}, balanced accuracy of victims trained on clean -> protected images): {victims}."
    )


def _designs(check: ProxyCheck | SegmentationCheck) -> list[str]:
    return list(dict.fromkeys(victim.architecture for victim in check.victims))


def _proxy_victim(design: str, check: ProxyCheck) -> str:
    """Return what one design of victim learned, in the median over its seeds."""
    runs = [victim for victim in check.victims if victim.architecture == design]
    clean = median(run.clean.balanced_accuracy for run in runs)
    protected = median(run.protected.balanced_accuracy for run in runs)
    recoverable = median(run.recoverable_auc for run in runs)
    seeds = f", median of {len(runs)} seeds" if len(runs) > 1 else ""
    return f"{design} {clean:.2f} -> {protected:.2f} (recoverable AUC {recoverable:.2f}{seeds})"


def segmentation_statement(check: SegmentationCheck | None) -> str:
    """Return the coordinator's own measurement of overlap with reference masks, and what needs no image for it."""
    if check is None:
        return proxy_statement(None)
    victims = ", ".join(_overlap(design, check) for design in _designs(check))
    measured = (
        f"Measured by the coordinator on public images (epsilon {check.epsilon_255:g}/255, Dice overlap of victims "
        f"trained on clean -> protected images): {victims}."
    )
    for sentence in overlap_sentences(check):
        measured += f" {sentence}"
    read = [victim.release_dice for victim in check.victims if victim.release_dice is not None]
    if read:
        measured += f" Models trained on clean images find {median(read):.2f} in protected ones."
    return measured


def _overlap(design: str, check: SegmentationCheck) -> str:
    """Return what one design of victim found, in the median over its seeds and in the one that found most."""
    runs = [victim for victim in check.victims if victim.architecture == design]
    clean, protected, best = (
        median(getattr(run, name) for run in runs)
        for name in ("clean_dice", "protected_dice", "protected_peak_dice")
    )
    held = [run.recoverable_dice for run in runs if run.recoverable_dice is not None]
    moved = f", {median(held):.2f} with the best thresholds" if held else ""
    seeds = f", median of {len(runs)} seeds" if len(runs) > 1 else ""
    worst = f"; {max(held):.2f} in the one that found most" if held and seeds else ""
    return f"{design} {clean:.2f} -> {protected:.2f} (best epoch {best:.2f}{moved}{seeds}{worst})"


def _status(manifest: Manifest, totals: Totals) -> str:
    if not totals.verified:
        return NOTHING_PERTURBED
    check = manifest.segmentation_check
    return UNPROVEN_STATUS if check is not None and not check.effective else PROTECTION_STATUS


def _statement(prepared: Prepared) -> str:
    manifest = prepared.bundle.manifest
    if manifest.task == "segmentation":
        return segmentation_statement(manifest.segmentation_check)
    quoted = proxy_statement(manifest.proxy_check)
    if prepared.perturber.method.info.name != GENERATED:
        return quoted
    return (
        f"{quoted} That is the optimiser's noise; the generator's, which this release has, was not measured."
    )


def summary(
    outcome: Outcome,
    prepared: Prepared,
    contact_sheet: Path | None,
    check: SiteCheck | MaskedSiteCheck | None = None,
) -> dict[str, object]:
    """Return everything a run has to say, as JSON values; paths are the site's own.

    Args:
        outcome: of the run.
        prepared: what it ran with.
        contact_sheet: where it lies, if one was drawn.
        check: the site's own, if it is about the release as it is now.
    """
    totals, code = outcome.totals, exit_code(outcome.totals)
    return {
        "images": totals.images,
        "verified": totals.verified,
        "quarantined": sum(totals.quarantined.values()),
        "quarantined_by_reason": dict(totals.quarantined),
        "not_protectable": totals.not_protectable,
        "unfinished": totals.unfinished,
        "ignored_files": outcome.ignored,
        "psnr_db": _rounded(totals.psnr_db_median),
        "psnr_db_min": _rounded(totals.psnr_db_min),
        "epsilon_max": totals.epsilon_max,
        "changed_share": _rounded(totals.changed_mean),
        "guessed_windows": totals.guessed_windows,
        **_limits(prepared.budget),
        "method": prepared.perturber.method.info.name,
        "protection": _status(prepared.bundle.manifest, totals) if check is None else check.word,
        "proxy_check": _statement(prepared),
        "bundle_sha256": prepared.bundle.digest,
        "surrogates": _surrogates(prepared),
        "signer": str(prepared.bundle.signer),
        "signer_is_trusted": prepared.policy.trusted_signers is not None,
        "finished_now": outcome.finished,
        "seconds": round(outcome.seconds, 3),
        "images_per_s": round(outcome.finished / outcome.seconds, 2) if outcome.finished else None,
        "release": str(outcome.workspace.release),
        "private": str(outcome.workspace.private),
        "contact_sheet": None if contact_sheet is None else str(contact_sheet),
        "exit_code": int(code),
        "exit_meaning": EXIT_MEANING[code],
    }


def _surrogates(prepared: Prepared) -> str:
    """Return whose surrogates the noise was made with; for masks a bundle has none."""
    if prepared.class_map is not None:
        graphs = prepared.bundle.manifest.graphs
        return "none needed: the bundle's generators make the noise" if graphs else DRAWN_NOISE
    return "the bundle's" if prepared.adapted_sha256 is None else "adapted to this site's images"


def _limits(budget: Budget) -> dict[str, object]:
    return {"epsilon": budget.epsilon, "mask": budget.mask}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
