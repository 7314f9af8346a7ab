"""What a report is made from, and how each figure of it is copied into the message, through the gate of the policy.

Field by field: what isn't named here doesn't leave. Where the policy asks for noise, each count gets it before the
gate, so that what the gate withholds is chosen by what may be known anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from medveil.agent.reporting_gate import Figure, Withheld, gated_parts, gated_total
from medveil.agent.reporting_noise import Draw
from medveil.agent.reporting_policy import NoisePolicy, ReportingPolicy
from medveil.protos.v1 import figures_pb2, report_pb2

__all__ = ["CheckFigures", "Figures", "count", "tell_exactly", "tell_nothing", "tell_with_noise"]

_WHY: Final = {
    Withheld.SMALL: figures_pb2.SUPPRESSION_GROUP_TOO_SMALL,
    Withheld.COMPLEMENTARY: figures_pb2.SUPPRESSION_COMPLEMENTARY,
    Withheld.POLICY: figures_pb2.SUPPRESSION_POLICY,
    Withheld.NOISE: figures_pb2.SUPPRESSION_NOISE,
    Withheld.BUDGET: figures_pb2.SUPPRESSION_BUDGET,
}
_REASONS: Final = tuple(sorted(set(figures_pb2.QuarantineReason.values()) - {0}))
"""Under noise every cell of a table is told: which ones are there at all would say something exact."""


@dataclass(frozen=True, slots=True)
class CheckFigures:
    """What the site's own victims found: means of the strongest one, balanced accuracy in [0, 1].

    Attributes:
        hold_out: clean images that they were measured on.
        half_interval: half the 95 % interval of `protected`.
    """

    hold_out: int
    clean: float
    protected: float
    recoverable: float
    half_interval: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything a report is made from: counts of images, and one mean. Made by `reporting.figures_of`.

    Attributes:
        by_reason: quarantined images by `QuarantineReason`.
        by_class: verified images by class index.
        psnr_bins: verified images by PSNR, bins of `PSNR_EDGES_DB`.
        changed_share_mean: over the verified images, in [0, 1].
        victim_check: None: no victim was trained on this release as it is now.
        classes: how many the bundle knows.
    """

    verified: int
    not_protectable: int
    unfinished: int
    by_reason: Mapping[int, int] = field(default_factory=dict)
    by_class: Mapping[int, int] = field(default_factory=dict)
    psnr_bins: tuple[int, ...] = ()
    changed_share_mean: float = 0.0
    victim_check: CheckFigures | None = None
    classes: int = 0


def tell_exactly(message: report_pb2.Report, figures: Figures, policy: ReportingPolicy) -> None:
    """Tell every figure that the policy lets out, as it is."""
    least = policy.minimum_group_size
    outcomes = (
        figures.verified,
        figures.not_protectable,
        sum(figures.by_reason.values()),
        figures.unfinished,
    )
    images = gated_total(sum(outcomes), least)
    verified, not_protectable, quarantined, unfinished = gated_parts(images, outcomes, least)
    message.outcome.CopyFrom(
        report_pb2.Outcome(
            images=count(images),
            verified=count(verified),
            not_protectable=count(not_protectable),
            quarantined=count(quarantined),
            unfinished=count(unfinished),
        )
    )
    message.changed_share_mean.CopyFrom(
        _rate(
            figures.changed_share_mean,
            Withheld.POLICY if "changed_share" in policy.withhold else verified,
        )
    )
    if "reasons" not in policy.withhold:
        parts = gated_parts(quarantined, list(figures.by_reason.values()), least)
        for reason, images_of_it in zip(figures.by_reason, parts, strict=True):
            message.quarantined_by_reason.add(reason=reason, images=count(images_of_it))
    if "by_class" not in policy.withhold:
        parts = gated_parts(verified, list(figures.by_class.values()), least)
        for index, images_of_it in zip(figures.by_class, parts, strict=True):
            message.verified_by_class.add(class_index=index, verified=count(images_of_it))
    if "psnr" not in policy.withhold and figures.psnr_bins:
        unmeasured = figures.verified - sum(figures.psnr_bins)  # not told, but anyone can subtract
        parts = gated_parts(verified, [*figures.psnr_bins, unmeasured], least)
        message.psnr.bins.extend(count(part) for part in parts[:-1])
    if (check := figures.victim_check) is not None and "victim_check" not in policy.withhold:
        hold_out = gated_total(check.hold_out, least)
        message.victim_check.CopyFrom(
            report_pb2.VictimCheck(
                hold_out=count(hold_out),
                clean_accuracy=_rate(check.clean, hold_out),
                protected_accuracy=_rate(check.protected, hold_out),
                recoverable_accuracy=_rate(check.recoverable, hold_out),
                half_interval=_rate(check.half_interval, hold_out),
            )
        )


# With noise
# ------------------------------------------------------------------------------------------------


def tell_with_noise(
    message: report_pb2.Report, figures: Figures, policy: ReportingPolicy, noise: NoisePolicy, draw: Draw
) -> None:
    """Tell up to four tables: outcomes, reasons for quarantine, classes, PSNR.

    An image is counted once in the outcomes; then in the reasons if it is quarantined, in classes and PSNR if it is
    verified. The number of images is the sum of the outcomes and costs nothing more. Means, and accuracies of victims
    that learned from all images, depend on more than one count and stay here.
    """
    least, withhold = policy.minimum_group_size, set(policy.withhold)
    scale = noise.scale(1 + max(len({"reasons"} - withhold), len({"by_class", "psnr"} - withhold)))
    message.noise.CopyFrom(
        figures_pb2.Noise(
            epsilon=float(noise.epsilon_per_report),
            images_per_patient=noise.images_per_patient,
            scale=float(scale),
        )
    )
    exact = (figures.verified, figures.not_protectable, sum(figures.by_reason.values()))
    outcomes = [images + draw(scale) for images in exact]
    images = Withheld.SMALL if sum(outcomes) < least else sum(outcomes)  # too few, or fewer than none
    verified, not_protectable, quarantined = gated_parts(images, outcomes, least)
    message.outcome.CopyFrom(
        report_pb2.Outcome(
            images=count(images, len(outcomes)),
            verified=count(verified, 1),
            not_protectable=count(not_protectable, 1),
            quarantined=count(quarantined, 1),
            unfinished=_unfinished(figures),
        )
    )
    if "reasons" not in withhold:
        for reason in _REASONS:
            cell = gated_total(figures.by_reason.get(reason, 0) + draw(scale), least)
            message.quarantined_by_reason.add(reason=reason, images=count(cell, 1))
    if "by_class" not in withhold:
        for index in range(figures.classes):
            cell = gated_total(figures.by_class.get(index, 0) + draw(scale), least)
            message.verified_by_class.add(class_index=index, verified=count(cell, 1))
    if "psnr" not in withhold:
        cells = [gated_total(images_in_it + draw(scale), least) for images_in_it in figures.psnr_bins]
        message.psnr.bins.extend(count(cell, 1) for cell in cells)
    is_withheld = "changed_share" in withhold
    message.changed_share_mean.CopyFrom(_rate(0.0, Withheld.POLICY if is_withheld else Withheld.NOISE))


def tell_nothing(message: report_pb2.Report, figures: Figures, noise: NoisePolicy) -> None:
    """Say that the job is done, and why there is not one number."""
    message.noise.CopyFrom(figures_pb2.Noise(images_per_patient=noise.images_per_patient))
    withheld = count(Withheld.BUDGET)
    message.outcome.CopyFrom(
        report_pb2.Outcome(
            images=withheld,
            verified=withheld,
            not_protectable=withheld,
            quarantined=withheld,
            unfinished=_unfinished(figures),
        )
    )
    message.changed_share_mean.CopyFrom(_rate(0.0, Withheld.BUDGET))


def _unfinished(figures: Figures) -> figures_pb2.Count:
    """Return that no image is left: a fact about the job, exact. How many are left isn't told."""
    return count(Withheld.NOISE if figures.unfinished else 0)


def count(figure: Figure, draws: int = 0) -> figures_pb2.Count:
    """Return a gated figure as it goes on the wire.

    Args:
        figure: the count, or why it is withheld.
        draws: draws of noise that are in it; 0: it is exact.
    """
    if isinstance(figure, Withheld):
        return figures_pb2.Count(suppressed=_WHY[figure])
    if draws:
        return figures_pb2.Count(noised=figures_pb2.NoisedCount(images=figure, draws=draws))
    return figures_pb2.Count(exact=figure)


def _rate(value: float, images: Figure) -> figures_pb2.Rate:
    """Return a mean if the number of images behind it may be told."""
    if isinstance(images, Withheld):
        return figures_pb2.Rate(suppressed=_WHY[images])
    return figures_pb2.Rate(exact=value)
