"""What a run was reading when it died, for the next run: that file goes to quarantine, and the job ends.

Images are decoded by native libraries. One that fails on a damaged file can take the whole process along, where no
``except`` sees it; the next run would meet the same file and die again. So a run notes which file it reads, and
lets Python's fault handler write below that when the process dies of a fatal signal. A run that was killed, or lost
its power, leaves no such trace: no file is suspected for it.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from medveil.agent.imageio import Frames, Image, ImageFormat, Item
from medveil.agent.ledger import Ledger
from medveil.agent.workspace import Workspace
from medveil.models.disk import changed_ns, disk_errors
from medveil.models.errors import ImageError

__all__ = ["DECODER_CRASH", "CrashNote", "crash_note"]

DECODER_CRASH: Final = "decoder-crash"
"""Why a file is quarantined whose decoding ended an earlier run."""

_META: Final = "decoder_crashes"
_NOBODY: Final = b" " * hashlib.sha256().digest_size * 2
"""Stands for "no file is being read"; as long as the name of one."""
_NAMES_KEPT: Final = 256
"""A file is named again and again while its frames are read; no source's names are all held in memory."""


class CrashNote:
    """The note of one run.

    Args:
        file: descriptor of the note.
        known: names of the files that ended earlier runs.
        files_of: the files that decoding an image takes: its own, and its masks.
    """

    def __init__(self, file: int, known: frozenset[str], files_of: Callable[[Item], Sequence[Item]]) -> None:
        self._file = file
        self._known = known
        self._name = lru_cache(maxsize=_NAMES_KEPT)(lambda item: _name(files_of(item)))
        self._now = _NOBODY

    @contextmanager
    def reading(self, item: Item) -> Iterator[None]:
        """Note that a file, or the copy made of it, is being decoded or encoded.

        Raises:
            ImageError: ``decoder-crash``: it ended an earlier run and hasn't changed since.
        """
        name = self._name(item)
        if name.decode() in self._known:
            raise ImageError(
                DECODER_CRASH,
                "Decoding this file, or its mask, ended an earlier run: it is damaged; export both again.",
            )
        before = self._now
        self._write(name)
        try:
            yield
        finally:
            self._write(before)

    @contextmanager
    def frames(self, format_: ImageFormat, item: Item, scratch: Path) -> Iterator[Frames]:
        """Open a file, and note it again whenever one of its frames is decoded.

        Raises:
            ImageError: as ``reading`` and ``format_.open``.
        """
        with ExitStack() as opened:
            with self.reading(item):
                frames = opened.enter_context(format_.open(item, scratch))
            yield _NotedFrames(frames, item, self)

    def _write(self, name: bytes) -> None:
        self._now = name
        with disk_errors():
            os.pwrite(self._file, name, 0)


@contextmanager
def crash_note(
    workspace: Workspace,
    ledger: Ledger,
    files_of: Callable[[Item], Sequence[Item]] = lambda item: (item,),
    *,
    forget: bool = False,
) -> Iterator[CrashNote]:
    """Learn how the last run of a job ended, and note what this one reads.

    Args:
        workspace: the job's folders.
        ledger: the job's; remembers the files that ended a run.
        files_of: the files that decoding an image takes; it is tried again when one of them changes.
        forget: try them again.
    """
    known = frozenset() if forget else frozenset(json.loads(ledger.meta(_META) or "[]"))
    with disk_errors():
        file = os.open(workspace.crash_note, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        culprit = _culprit(os.pread(file, len(_NOBODY) + 1, 0))
        with ledger.transaction():
            if culprit:
                known |= {culprit}
                ledger.log(DECODER_CRASH, "", "")
            ledger.set_meta(_META, json.dumps(sorted(known)))
        with disk_errors():
            os.ftruncate(file, 0)
            os.lseek(file, os.pwrite(file, _NOBODY, 0), os.SEEK_SET)
        with _fatal_signals_in(file):
            yield CrashNote(file, known, files_of)
    finally:
        os.close(file)


def _culprit(note: bytes) -> str | None:
    """Return the file that was being decoded when a fatal signal came; None where none was, or no signal came."""
    name, trace = note[: len(_NOBODY)], note[len(_NOBODY) :]
    return name.decode("ascii", "replace") if trace and name != _NOBODY else None


@contextmanager
def _fatal_signals_in(file: int) -> Iterator[None]:
    """Have the trace of a fatal signal written to a file, unless it is wanted elsewhere (``PYTHONFAULTHANDLER``)."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(file, all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()


def _name(files: Sequence[Item]) -> bytes:
    """Return a name for files as they are now; it says nothing about them."""
    state = [(str(file.relative), file.size_bytes, changed_ns(file.path)) for file in files]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest().encode()


@dataclass(frozen=True, slots=True)
class _NotedFrames:
    """Frames that are noted while they are decoded."""

    frames: Frames
    item: Item
    note: CrashNote

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, frame: int) -> Image:
        with self.note.reading(self.item):
            return self.frames[frame]
