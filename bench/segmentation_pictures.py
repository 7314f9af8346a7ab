"""What the noise looks like and what victims make of it: one row per data set whose licence lets us show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from medveil.models.audit import segmentation_architectures
from medveil.models.audit.segmentation_victims import SegmentationVictimSettings, pretrained
from medveil.models.methods.contour import band
from segmentation_cohort import SegmentationCohort

__all__ = ["FACTOR", "PANELS", "Row", "caption_of", "draw", "licence"]

FACTOR = 20
"""How much the difference is enlarged; grey is no change."""
PANELS = (
    "original",
    "protected",
    f"difference x {FACTOR}",
    "band or structures",
    "clean test image",
    "its reference",
    "found, trained on clean",
    "found, on protected",
)

_VICTIM = "unet-bn"
_SIDE, _GAP, _MARGIN, _HEAD = 168, 6, 96, 24
_PAPER, _INK = (250, 250, 250), (30, 30, 30)
_CLASSES = ((214, 69, 65), (65, 131, 215), (38, 166, 91))
"""Colours of the structures, in turn."""
_OPACITY = 0.55
_CAPTION = "Description"  # one of PNG's own keywords
_STATED, _NOT_SHOWN = "licence as stated upstream:", ("not stated", "gpl")


@dataclass(frozen=True)
class Row:
    """One data set under one protection.

    Attributes:
        title: their names and what the noise costs.
        cohort: public, sites' and test patches.
        protected: the sites' images under the noise.
        radius: of the contour band; 0 where the method needs none, and the structures themselves are shown.
        steps: of the two victims.
        seed: of the two victims.
    """

    title: str
    cohort: SegmentationCohort
    protected: npt.NDArray[np.float32]
    radius: int
    steps: int
    seed: int


def licence(folder: Path) -> str | None:
    """Return what a data folder's PROVENANCE.md says of its licence; None where its images may not be shown here.

    That is where none is stated, and under the GPL: this repository holds nothing under it.
    """
    for line in (folder / "PROVENANCE.md").read_text().splitlines():
        before, mark, stated = line.partition(":")
        if f"{before}{mark}".lstrip("- ").lower() == _STATED:
            forbids = any(word in stated.lower() for word in _NOT_SHOWN)
            return None if forbids else stated.strip()
    return None


def caption_of(file: Path) -> str:
    """Return what a sheet says about itself."""
    with PillowImage.open(file) as sheet:
        return str(sheet.info[_CAPTION])


def draw(rows: Sequence[Row], caption: str, file: Path) -> None:
    """Draw the sheet; the caption travels in it."""
    step = _SIDE + _GAP
    sheet = PillowImage.new("RGB", (_MARGIN + len(PANELS) * step, _HEAD + len(rows) * step), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(PANELS):
        pen.text((_MARGIN + column * step, _GAP), title, _INK, font)
    for number, row in enumerate(rows):
        top = _HEAD + number * step
        pen.text((_GAP, top), row.title, _INK, font)
        for column, panel in enumerate(_panels(row)):
            picture = PillowImage.fromarray(np.rint(255 * panel).astype(np.uint8))
            sheet.paste(
                picture.resize((_SIDE, _SIDE), PillowImage.Resampling.NEAREST), (_MARGIN + column * step, top)
            )
    said = PngInfo()
    said.add_text(_CAPTION, caption)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True, pnginfo=said)


def _panels(row: Row) -> list[npt.NDArray[np.float64]]:
    """Return the pictures of a row, ``(rows, columns, 3)`` in [0, 1] each."""
    union, test = row.cohort.union, row.cohort.test
    shown, tried = _typical(union.labels), _typical(test.labels)
    clean, protected = union.images[shown], row.protected[shown]
    difference = np.clip(0.5 + FACTOR * (protected - clean), 0, 1)
    labels = union.labels[shown]
    marked = band(labels[None], row.radius)[0].astype(np.int64) if row.radius else labels
    found = [_found(row, images, test.images[tried]) for images in (union.images, row.protected)]
    return [
        *(_coloured(planes) for planes in (clean, protected, difference)),
        _marked(clean, marked),
        _coloured(test.images[tried]),
        *(_marked(test.images[tried], labels) for labels in (test.labels[tried], *found)),
    ]


def _typical(labels: npt.NDArray[np.int64]) -> int:
    """Return the patch whose foreground is the median in size."""
    sizes = (labels > 0).sum((1, 2))
    return int(np.argsort(sizes, kind="stable")[len(sizes) // 2])


def _found(
    row: Row, images: npt.NDArray[np.float32], image: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    """Return what a victim that trained on ``images`` finds in a clean image."""
    union = row.cohort.union
    settings = SegmentationVictimSettings(architecture=_VICTIM, steps=row.steps)
    net = segmentation_architectures.build(_VICTIM, channels=images.shape[1], classes=union.classes)
    net.load_state_dict(
        dict(pretrained(images, union.labels, settings, classes=union.classes, seed=row.seed))
    )
    with torch.no_grad():
        return np.asarray(net.eval()(torch.from_numpy(image[None]))[0].argmax(0).numpy(), np.int64)


def _coloured(planes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return ``(C, rows, columns)`` as a colour picture."""
    return np.broadcast_to(planes.astype(np.float64), (3, *planes.shape[1:])).transpose(1, 2, 0)


def _marked(planes: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return an image under the colours of its structures."""
    picture = _coloured(planes).copy()
    for label in np.unique(labels[labels > 0]):
        colour = np.array(_CLASSES[(int(label) - 1) % len(_CLASSES)]) / 255
        inside = labels == label
        picture[inside] = (1 - _OPACITY) * picture[inside] + _OPACITY * colour
    return picture
