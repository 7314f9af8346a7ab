"""Going through a source: every file is an item to protect, a quarantine entry, or ignored."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from medveil.agent.imageio.base import ImageFormat, Item, Quarantined
from medveil.agent.imageio.labels import LABELS_FILE
from medveil.models.errors import ImageError, InputError

__all__ = ["Listing", "scan"]

_HEAD_BYTES: Final = 512  # enough for every signature we know; DICOM's stands at byte 128
_SYSTEM_NAMES: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds.

    Attributes:
        items: files to protect, sorted by path, each with a target that no other file has.
        quarantined: files that could not be looked at, or are no images.
        ignored: number of hidden and system files and of links to folders inside the source.
    """

    items: tuple[Item, ...]
    quarantined: tuple[Quarantined, ...]
    ignored: int


def scan(source: Path, formats: Sequence[ImageFormat], *, labels_file: Path | None = None) -> Listing:
    """List a folder (recursively) or a single file; headers only, nothing is decoded.

    Links that lead out of the source aren't followed, nor are links to folders, so a loop cannot arise.

    Args:
        source: folder or file.
        formats: asked in this order whether a file is theirs.
        labels_file: the labels CSV, which is no image.

    Raises:
        InputError: ``no-source``: there is nothing at this path, or it cannot be opened.
    """
    if not source.exists():
        raise InputError("no-source", "There is no folder or file at the source path; check its spelling.")
    items: list[Item] = []
    quarantined: list[Quarantined] = []
    ignored = 0
    root = source if source.is_dir() else source.parent
    for path in _files(source):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if path != source and _is_system(relative):
            ignored += 1
        elif path.is_symlink() and path.is_dir() and _is_inside(path, root):
            ignored += 1  # its files are visited under their real path
        elif path.name == LABELS_FILE or (labels_file is not None and _same_file(path, labels_file)):
            continue
        else:
            try:
                items.append(_inspect(path, relative, root, formats))
            except ImageError as error:
                quarantined.append(Quarantined(_printable_path(relative), error.code, error.public))
    unique, twins = _apart_by_identity(items)
    return Listing(_with_distinct_targets(unique), (*quarantined, *twins), ignored)


def _apart_by_identity(items: Sequence[Item]) -> tuple[list[Item], list[Quarantined]]:
    """Divide items into those that only they claim to be, and those that share an identity with another.

    None of the latter is taken: their copies would share an identity as well, an archive keeps one of
    them without a word, and which one is right only the sender knows.
    """
    claims = Counter(item.identity for item in items)
    shared = {identity for identity, files in claims.items() if identity and files > 1}
    sentence = "Two files say that they are this same object (SOP Instance UID); remove the wrong one."
    twins = [
        Quarantined(item.relative, "duplicate-instance", sentence)
        for item in items
        if item.identity in shared
    ]
    return [item for item in items if item.identity not in shared], twins


def _files(source: Path) -> Iterator[Path]:
    """Yield files, links to folders, and folders that cannot be opened; in sorted order."""
    if not source.is_dir():
        yield source
        return
    closed: list[Path] = []

    def note(error: OSError) -> None:
        closed.append(Path(str(error.filename)))

    for folder, subfolders, names in os.walk(source, onerror=note):
        subfolders.sort()
        here = Path(folder)
        links = [name for name in subfolders if (here / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield here / name
    if source in closed:
        raise InputError("no-source", "The source folder cannot be opened; check its permissions.")
    yield from closed


def _is_system(relative: PurePosixPath) -> bool:
    return any(part.startswith(".") or part.lower() in _SYSTEM_NAMES for part in relative.parts)


def _is_inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _same_file(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _printable_path(relative: PurePosixPath) -> PurePosixPath:
    """Return the path with undecodable bytes of a file name shown as escapes, so that it can be stored."""
    return PurePosixPath(os.fsencode(str(relative)).decode("utf-8", "backslashreplace"))


def _inspect(path: Path, relative: PurePosixPath, root: Path, formats: Sequence[ImageFormat]) -> Item:
    """Return the item that one file is.

    Raises:
        ImageError: the reason for its quarantine.
    """
    if _printable_path(relative) != relative:
        raise ImageError("file-name", "This file's name is not valid text; rename it.")
    if path.is_symlink() and not _is_inside(path, root):
        raise ImageError("link-outside", "This is a link that leads out of the source; copy the file itself.")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError("unreadable", "This folder cannot be opened; check its permissions.")
        if not stat.S_ISREG(mode):
            raise ImageError("not-a-file", "This is neither a file nor a folder; remove it from the source.")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as exc:
        raise ImageError(
            "unreadable", "This file cannot be read; check its permissions and the disk.", private=str(exc)
        ) from exc
    if not head:
        raise ImageError("empty-file", "This file is empty (0 bytes); copy it again from where it came.")
    for format_ in formats:
        if format_.recognises(head, path):
            return format_.inspect(path, relative)
    raise ImageError(
        "not-an-image", "This file is in no image format that medveil knows; remove or convert it."
    )


def _with_distinct_targets(items: Sequence[Item]) -> tuple[Item, ...]:
    """Give every item a target of its own, also on disks that don't tell upper from lower case.

    ``a.jpg`` beside ``a.png`` becomes ``a.jpg.png``. A file that keeps its own name goes before one that is
    renamed, and among equals the path decides, so the outcome doesn't depend on the order of the files.
    """
    taken: Counter[str] = Counter()
    chosen: dict[PurePosixPath, PurePosixPath] = {}
    for item in sorted(items, key=lambda item: (item.target != item.relative, str(item.relative))):
        target, number = item.target, 1
        while taken[str(target).casefold()]:
            suffix = item.target.suffix if number == 1 else f".{number}{item.target.suffix}"
            target, number = item.relative.with_name(item.relative.name + suffix), number + 1
        taken[str(target).casefold()] += 1
        chosen[item.relative] = target
    ordered = sorted(items, key=lambda item: str(item.relative))
    return tuple(replace(item, target=chosen[item.relative]) for item in ordered)
