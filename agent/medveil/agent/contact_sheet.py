"""A picture for the steward: originals beside protected copies. It shows originals, so it stays private."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from medveil.agent.imageio import Image, ImageFormat, Item, StoredArray
from medveil.agent.ledger import FileRow, ImageRow, ImageState, Ledger
from medveil.agent.workspace import Workspace
from medveil.models.disk import write_atomically
from medveil.models.errors import ImageError

__all__ = ["Example", "Marks", "chosen_examples", "draw", "write_contact_sheet"]

_ROWS: Final = 8
_CELL: Final = 176
_GAP: Final = 8
_MARGIN: Final = 150
_HEAD: Final = 64
_FONT_SIZE: Final = 14
_PAPER: Final = (250, 250, 250)
_INK: Final = (30, 30, 30)
_GREY: Final = 0.5
_MARK: Final = np.array([1.0, 0.55, 0.0], np.float32)
"""Colour of what is marked: orange, which no common display of grey images uses."""

_AMPLIFIED_TO: Final = 120.0
"""Distance from mid-grey, in 1/255, at which the largest change of a sheet is drawn. Our choice."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What is marked in an image with a mask, so that people see which mask the job took for it.

    Attributes:
        title: what it is, in two words.
        of: which pixels of an image are, ``(rows, columns)``.
    """

    title: str
    of: Callable[[Item, Image], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Example:
    """One image of the sheet.

    Attributes:
        caption: class and figures.
        image: the original.
        protected: stored values of the protected copy.
        marked: pixels that are shown in colour, ``(rows, columns)``, where it has a mask.
    """

    caption: str
    image: Image
    protected: StoredArray
    marked: npt.NDArray[np.bool_] | None = None


def write_contact_sheet(
    workspace: Workspace,
    ledger: Ledger,
    root: Path,
    formats: Sequence[ImageFormat],
    class_names: Sequence[str],
    marks: Marks | None = None,
) -> bool:
    """Draw up to eight verified images into the private folder; return whether there was one to draw.

    Args:
        workspace: the job's folders.
        ledger: its ledger.
        root: the source folder.
        formats: as the job used them.
        class_names: the taxonomy.
        marks: what is marked in images with masks.
    """
    examples = chosen_examples(workspace, ledger, root, formats, class_names, marks)
    if not examples:
        return False
    buffer = io.BytesIO()
    draw(examples, "" if marks is None else marks.title).save(buffer, "PNG")
    write_atomically(workspace.contact_sheet, buffer.getvalue(), mode=0o600)
    return True


def chosen_examples(
    workspace: Workspace,
    ledger: Ledger,
    root: Path,
    formats: Sequence[ImageFormat],
    class_names: Sequence[str],
    marks: Marks | None = None,
) -> list[Example]:
    """Return the examples: classes in turn, within a class by digest, so that a rerun shows the same ones."""
    by_name = {format_.name: format_ for format_ in formats}
    wanted = _spread_over_classes(ledger)
    files: dict[int, FileRow] = {file.id: file for file in ledger.files()}
    by_file: dict[int, list[ImageRow]] = defaultdict(list)
    for row in wanted:
        by_file[row.file].append(row)
    found: dict[tuple[int, int], Example] = {}
    for number, rows in by_file.items():
        file = files[number]
        try:
            found.update(
                _read_examples(workspace, ledger, root, by_name[file.format], file, rows, class_names, marks)
            )
        except ImageError:
            continue  # the source went away since; a sheet with fewer rows is no reason to fail
    return [found[row.file, row.frame] for row in wanted if (row.file, row.frame) in found]


def _spread_over_classes(ledger: Ledger) -> list[ImageRow]:
    classes: dict[int, list[ImageRow]] = defaultdict(list)
    for row in ledger.verified_by_digest():
        # A frame that stayed as it was (blank, or a slice without a structure) has nothing to show.
        changed = row.receipt is not None and row.receipt.changed > 0
        if row.receipt is not None and changed and len(classes[row.receipt.class_index]) < _ROWS:
            classes[row.receipt.class_index].append(row)
    turns = zip_longest(*(classes[index] for index in sorted(classes)))
    return [row for row in chain.from_iterable(turns) if row is not None][:_ROWS]


def _read_examples(
    workspace: Workspace,
    ledger: Ledger,
    root: Path,
    format_: ImageFormat,
    file: FileRow,
    rows: Sequence[ImageRow],
    class_names: Sequence[str],
    marks: Marks | None,
) -> dict[tuple[int, int], Example]:
    released = [row.frame for row in ledger.images(file.id) if row.state is ImageState.VERIFIED]
    positions = {released.index(row.frame): row for row in rows}
    item = format_.inspect(root / file.relative, file.relative)
    examples = {}
    with (
        format_.open(item, workspace.scratch) as frames,
        format_.read_back(workspace.output(file.target)) as written,
    ):
        for position, protected in enumerate(written):
            row = positions.pop(position, None)
            if row is not None and row.receipt is not None:
                psnr = "" if row.receipt.psnr_db is None else f"{row.receipt.psnr_db:.1f} dB"
                caption = f"{class_names[row.receipt.class_index]}\n{psnr}\n{row.receipt.changed:.0%} changed"
                image = frames[row.frame]
                marked = None if marks is None else marks.of(item, image)
                examples[row.file, row.frame] = Example(caption, image, np.array(protected), marked)
            if not positions:
                break
    return examples


def draw(examples: Sequence[Example], marked: str = "") -> PillowImage.Image:
    """Return the sheet: one row per example; original, protected, amplified difference, changed pixels.

    Args:
        examples: from top to bottom.
        marked: title of a last column, with what is marked in each of them; none where it is empty.
    """
    differences = [_difference(example) for example in examples]
    largest = max(float(np.abs(difference).max()) for difference in differences) * 255
    factor = max(1, int(_AMPLIFIED_TO / largest)) if largest > 0 else 1
    columns = ["original", "protected", f"difference x {factor}", "changed pixels"]
    if marked:
        columns.append(marked)
    width = _MARGIN + len(columns) * (_CELL + _GAP) + _GAP
    sheet = PillowImage.new("RGB", (width, _HEAD + len(examples) * (_CELL + _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    pen.text((_GAP, _GAP), "medveil contact sheet. Shows originals: keep it inside the hospital.", _INK, font)
    for column, title in enumerate(columns):
        pen.text((_left(column), _HEAD - _FONT_SIZE - _GAP), title, _INK, font)
    for number, (example, difference) in enumerate(zip(examples, differences, strict=True)):
        top = _HEAD + number * (_CELL + _GAP)
        pen.text((_GAP, top + _GAP), _wrapped(example.caption), _INK, font)
        panels = [
            example.image.window.display(example.image.pixels),
            example.image.window.display(example.protected),
            np.clip(_GREY + difference * factor, 0, 1),
            (difference != 0).any(axis=2, keepdims=True) if difference.ndim == 3 else difference != 0,
        ]
        if marked and example.marked is not None:
            panels.append(_coloured(panels[0], example.marked))
        for column, panel in enumerate(panels):
            sheet.paste(_panel(np.asarray(panel, np.float32)), (_left(column), top))
    return sheet


def _left(column: int) -> int:
    return _MARGIN + column * (_CELL + _GAP)


def _difference(example: Example) -> npt.NDArray[np.float32]:
    display = example.image.window.display
    return display(example.protected) - display(example.image.pixels)


def _coloured(shown: npt.NDArray[np.float32], marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Return an image with what is marked laid over it in colour; what lies under it shines through."""
    colour = shown if shown.ndim == 3 else np.repeat(shown[:, :, None], 3, axis=2)
    return np.where(marked[:, :, None], (colour + _MARK) / 2, colour)


def _wrapped(caption: str) -> str:
    longest = 18  # characters of this font that fit into the margin
    return "\n".join(
        line if len(line) <= longest else f"{line[: longest - 1]}." for line in caption.split("\n")
    )


def _panel(values: npt.NDArray[np.float32]) -> PillowImage.Image:
    """Return values in [0, 1] as a square panel; small images keep their hard pixels."""
    grey = values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values
    picture = PillowImage.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resample = PillowImage.Resampling.NEAREST if scale > 1 else PillowImage.Resampling.LANCZOS
    panel = PillowImage.new("RGB", (_CELL, _CELL), _PAPER)
    panel.paste(picture.resize(size, resample), ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    return panel
