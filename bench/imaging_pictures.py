"""A contact sheet of one CT, MR, DX and US: original, protected, difference x20, in the clinical window.

Real images whose source grants their use (MIT, see PROVENANCE.md of the shared data): pydicom/pydicom-data and
ImagingDataCommons/highdicom. Text burned into a picture is cut away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from medveil.agent.budget import enforce, measure
from medveil.agent.formats import reading_formats
from medveil.agent.imageio import DicomFormat, Image, StoredArray
from medveil.agent.preparation import Wishes, prepare

FACTOR = 20
WIDTH = 288
"""Of a picture; smaller ones are enlarged to it."""
GAP = 6
MARGIN = 120
HEAD = 24
SATURATED = 255 / (2 * FACTOR)
"""Change from which on the difference is black or white, in 1/255."""
PAPER, INK = (250, 250, 250), (30, 30, 30)


@dataclass(frozen=True)
class Example:
    """One row of the sheet.

    Attributes:
        title: modality and window.
        file: below the data folder.
        licence: of its source.
        crop: rows and columns that are drawn; what is left out holds text.
    """

    title: str
    file: str
    licence: str
    crop: tuple[slice, slice] = (slice(None), slice(None))


EXAMPLES = (
    Example("CT, 40/100", "dicom_pydicom_data/693_UNCR.dcm", "MIT"),
    Example("MR, 1000/2000", "dicom_pydicom_data/MR2_UNCR.dcm", "MIT"),
    Example("DX, 128/256", "dicom_highdicom/dx_image.dcm", "MIT"),
    Example("US, colour", "dicom_pydicom_data/US1_UNCR.dcm", "MIT", crop=(slice(112, 335), slice(46, 600))),
)


def draw(data: Path, bundle: Path, folder: Path) -> tuple[str, dict[str, Any]]:
    """Draw the sheet into ``folder``; return what it shows."""
    prepared = prepare(Wishes(bundle))
    rows, figures = [], {}
    for example in EXAMPLES:
        image = _read(data, example.file)
        wanted = prepared.perturber.wanted([image], [0], prepared.budget)[0]
        protected = enforce(image, wanted, prepared.budget)
        change = measure(image, protected, prepared.budget)
        caption = f"{example.title}\n{change.psnr_db:.1f} dB\n{change.changed:.0%} changed"
        rows.append((caption, _panels(image, protected, example)))
        figures[example.file] = {"psnr_db": change.psnr_db, "largest_255": change.epsilon_max}
    folder.mkdir(exist_ok=True)
    _sheet(rows).save(folder / "imaging.png", optimize=True)
    sources = "; ".join(f"{example.title}: `{example.file}` ({example.licence})" for example in EXAMPLES)
    said = (
        f"Real images, each in its clinical window (centre/width) and with their source's licence: {sources}. In the"
        f" difference grey is no change, black and white are {SATURATED:.1f}/255 of the window or more."
    )
    return f"![contact sheet](imaging.png)\n\n{said}", figures


def _sheet(rows: Sequence[tuple[str, list[PillowImage.Image]]]) -> PillowImage.Image:
    """Put captions and pictures under one another, each row as high as its pictures."""
    height = HEAD + sum(panels[0].height + GAP for _, panels in rows)
    sheet = PillowImage.new("RGB", (MARGIN + 3 * (WIDTH + GAP), height), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(("original", "protected", f"difference x {FACTOR}")):
        pen.text((MARGIN + column * (WIDTH + GAP), GAP), title, INK, font)
    top = HEAD
    for caption, panels in rows:
        pen.text((GAP, top), caption, INK, font)
        for column, panel in enumerate(panels):
            sheet.paste(panel, (MARGIN + column * (WIDTH + GAP), top))
        top += panels[0].height + GAP
    return sheet


def _read(data: Path, file: str) -> Image:
    reader = next(entry for entry in reading_formats() if isinstance(entry, DicomFormat))
    item = reader.inspect(data / file, PurePosixPath(file))
    with reader.open(item, data) as frames:
        return frames[0]


def _panels(image: Image, protected: StoredArray, example: Example) -> list[PillowImage.Image]:
    clean, changed = (image.window.display(pixels)[example.crop] for pixels in (image.pixels, protected))
    difference = np.clip(0.5 + FACTOR * (changed - clean), 0, 1)
    return [_panel(values) for values in (clean, changed, difference)]


def _panel(values: Any) -> PillowImage.Image:
    picture = PillowImage.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    height = round(picture.height * WIDTH / picture.width)
    return picture.resize((WIDTH, height), PillowImage.Resampling.LANCZOS)
