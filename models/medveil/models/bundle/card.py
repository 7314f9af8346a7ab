"""The model card: the manifest as a page that people read."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from medveil.models.bundle.manifest import (
    InputContract,
    Manifest,
    ProxyCheck,
    RecipeSettings,
    SegmentationCheck,
    SegmentationContract,
)

__all__ = ["blur_sentence", "constant_mask_sentence", "model_card", "overlap_sentences"]

_TARGETS = {
    "labels": "the masks",
    "foreground": "foreground everywhere",
    "permuted": "another class at each pixel",
}


def model_card(manifest: Manifest) -> str:
    """Return MODEL_CARD.md: nothing but what the manifest says, in Markdown."""
    data = manifest.training_data
    shape = manifest.input
    sections = [
        "# Protection bundle",
        f"Task: {manifest.task}. Made {manifest.created.isoformat(timespec='seconds')} by medveil "
        f"{manifest.tool_version}, seed {manifest.seed}.",
        f"Input: {_size(shape)}, {shape.channel_meaning}, values in [0, 1].",
        "## What it is for\n\n"
        "A hospital adds the perturbation that this bundle describes to images it releases, so that models trained "
        "on the release learn little of use. Graphs in it only serve that: they are not for diagnosis.",
        "## Classes\n\n"
        + _table(
            ("class", "stored value", "training images", "hold-out images"),
            [
                (c.name, str(c.stored_value), str(n), str(m))
                for c, n, m in zip(
                    manifest.taxonomy.classes, data.train_counts, data.hold_out_counts, strict=True
                )
            ],
        ),
        f"## Training data\n\n{_inline(data.name)}, SHA-256 `{data.sha256}`.\n\n"
        + (_inline(data.source_statement) or "The coordinator gave no statement of source and licence."),
        "## Recipe\n\n" + _recipe(manifest.recipe, manifest.segmentation),
        "## Graphs, measured on clean public images\n\n"
        + (
            "None."
            if not manifest.graphs
            else _table(
                ("graph", "role", "architecture", "parameters", "balanced accuracy", "AUC"),
                [
                    (
                        g.name,
                        g.role,
                        g.architecture,
                        f"{g.parameters:,}",
                        "-" if g.hold_out is None else f"{g.hold_out.balanced_accuracy:.3f}",
                        "-" if g.hold_out is None else f"{g.hold_out.auc:.3f}",
                    )
                    for g in manifest.graphs
                ],
            )
        ),
        "## Victims of the protection, as the coordinator measured them\n\n"
        + (
            _proxy(manifest.proxy_check)
            if manifest.segmentation is None
            else _overlap(manifest.segmentation_check)
        ),
        "## Limits\n\n"
        "Measured on public images and small victims only. Adversarial training, pretrained feature "
        "extractors and a share of unprotected images can undo a perturbation of this size.",
    ]
    return "\n\n".join(sections) + "\n"


def overlap_sentences(check: SegmentationCheck) -> list[str]:
    """Return what belongs beside the victims' table: what takes no image, and what a filter leaves."""
    said = []
    if check.constant_mask_dice is not None:
        said.append(constant_mask_sentence(check.constant_mask_dice))
    if check.holds_after_blur is not None:
        taught = median(v.clean_recoverable_dice or 0.0 for v in check.blurred_victims)
        left = max(v.recoverable_dice or 0.0 for v in check.blurred_victims)
        said.append(blur_sentence(left, taught, holds=check.holds_after_blur))
    return said


def blur_sentence(left: float, taught: float, *, holds: bool) -> str:
    """Return what the simplest filter leaves of a protection, for people who decide about a release.

    Args:
        left: what a victim of blurred protected images recovers, in Dice, in the seed that recovers most.
        taught: of blurred clean images.
        holds: whether it lost enough.
    """
    found = f"they recover up to {left:.2f} where clean images give {taught:.2f}"
    if holds:
        return f"After a blur of 1 pixel, in training and test images alike, victims are still held off: {found}."
    return (
        f"This protection does not outlive a blur of 1 pixel in training and test images alike: after it {found}. It "
        "keeps out whoever trains on the images as they are."
    )


def constant_mask_sentence(found: float) -> str:
    """Return what belongs beside the Dice of every victim: how much of it needs no image at all."""
    return (
        f"A constant mask, the same for every image, finds {found:.2f}: where structures usually lie teaches that "
        "much, and no noise can take it away."
    )


def _size(shape: InputContract) -> str:
    plane = f"{shape.rows} x {shape.columns} pixels"
    return plane if shape.slices is None else f"{shape.slices} slices of {plane}"


def _recipe(recipe: RecipeSettings, segmentation: SegmentationContract | None) -> str:
    if segmentation is not None:
        made = (
            "Drawn by the method: nothing was trained"
            if segmentation.target is None
            else f"Generators trained towards {_TARGETS[segmentation.target]}; one pass per image"
        )
        return f"Method {recipe.method}, epsilon {recipe.epsilon_255:g}/255, {_reach(segmentation)}. {made}."
    aim = "the next class" if recipe.label_permutation is None else f"classes {recipe.label_permutation}"
    return (
        f"Method {recipe.method}, objective {recipe.objective} (towards {aim}), epsilon "
        f"{recipe.epsilon_255:g}/255, {recipe.mask_ratio:.0%} of the pixels, {recipe.steps} steps of "
        f"{recipe.step_size:g} epsilon."
    )


def _reach(segmentation: SegmentationContract) -> str:
    """Return where the noise may go."""
    if not segmentation.generators:
        beyond = segmentation.band_radius
        return "in the foreground" + (f" and {beyond} pixels around it" if beyond else " only")
    if {use.part for use in segmentation.generators} == {"roi"}:
        return "in the foreground only"
    bound = "within the local texture" if segmentation.texture_bound else "without a texture bound"
    return f"contour band of {segmentation.band_radius} pixels to both sides, inside {bound}"


def _proxy(check: ProxyCheck | None) -> str:
    if check is None:
        return "Not measured."
    rows = [
        (
            v.architecture,
            str(v.seed),
            f"{v.clean.auc:.3f}",
            f"{v.protected.auc:.3f}",
            f"{v.protected_peak_auc:.3f}",
            f"{v.recoverable_auc:.3f}",
            "-" if v.recoverable_peak_auc is None else f"{v.recoverable_peak_auc:.3f}",
        )
        for v in check.victims
    ]
    header = (
        "victim", "seed", "AUC clean", "AUC protected", "best epoch", "recoverable", "recoverable, best epoch",
    )  # fmt: skip
    return (
        f"{check.images} images at epsilon {check.epsilon_255:g}/255 on {check.mask_ratio:.0%} of the "
        f"pixels, median PSNR {_decibels(check.psnr_db)}.\n\n" + _table(header, rows)
    )


def _overlap(check: SegmentationCheck | None) -> str:
    if check is None:
        return "Not measured."
    rows = [
        (
            design,
            str(v.seed),
            f"{v.clean_dice:.3f}",
            f"{v.protected_dice:.3f}",
            f"{v.protected_peak_dice:.3f}",
            "-" if v.recoverable_dice is None else f"{v.recoverable_dice:.3f}",
            f"{v.protected_iou:.3f}",
            "-" if v.release_dice is None else f"{v.release_dice:.3f}",
        )
        for design, v in [
            *((v.architecture, v) for v in check.victims),
            *((f"{v.architecture}, everything blurred", v) for v in check.blurred_victims),
        ]
    ]
    header = (
        "victim",
        "seed",
        "Dice clean",
        "Dice protected",
        "best reading",
        "recoverable",
        "IoU protected",
        "clean-trained, in protected images",
    )
    return (
        f"{check.images} patches at epsilon {check.epsilon_255:g}/255, median PSNR {_decibels(check.psnr_db)}, "
        f"over the foreground {_decibels(check.roi_psnr_db)}.\n\n"
        + _table(header, rows)
        + "".join(f"\n\n{sentence}" for sentence in overlap_sentences(check))
    )


def _decibels(value: float | None) -> str:
    return "unlimited (most images unchanged)" if value is None else f"{value:.1f} dB"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_inline(cell) for cell in line) + " |" for line in lines)


def _inline(text: str) -> str:
    """Return text that cannot start a table cell, a tag or a new block of Markdown of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
