"""A job whose process dies of a signal while it works on a certain file; run as a program by `test_crash_note.py`.

python crashing_job.py SOURCE OUT FILE SIGNAL open|write|read_back|perturb [retry]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import analytic_job

from medveil.agent.imageio import Frames, ImageFormat, Item, StoredArray, raster_formats


class Deadly:
    """A format that ends the process at one file."""

    def __init__(self, format_: ImageFormat, file: str, signal: int, when: str) -> None:
        self._format = format_
        self._file, self._signal, self._when = file, signal, when

    def __getattr__(self, name: str) -> object:
        return getattr(self._format, name)

    def _meet(self, item: Item, when: str) -> None:
        if self._file and item.relative.as_posix().endswith(self._file) and when == self._when:
            os.kill(os.getpid(), self._signal)

    @contextmanager
    def open(self, item: Item, scratch: Path) -> Iterator[Frames]:
        self._meet(item, "open")
        with self._format.open(item, scratch) as frames:
            yield frames

    def write(self, item: Item, frames: Sequence[int], pixels: Iterable[StoredArray], target: Path) -> None:
        self._meet(item, "write")
        self._written = item
        self._format.write(item, frames, pixels, target)

    def read_back(self, target: Path) -> AbstractContextManager[Iterable[StoredArray]]:
        self._meet(self._written, "read_back")
        return self._format.read_back(target)


class DeadlyOracle(analytic_job.LinearOracle):
    """A surrogate that ends the process."""

    def __init__(self, signal: int) -> None:
        super().__init__()
        self._signal = signal

    def loss_and_gradient(self, images: object, targets: object) -> object:
        os.kill(os.getpid(), self._signal)


if __name__ == "__main__":
    source, out, file, number, when, *retry = sys.argv[1:]
    formats = [Deadly(format_, file, int(number), when) for format_ in raster_formats()]
    oracle = DeadlyOracle(int(number)) if when == "perturb" else None
    job = analytic_job.make_job(Path(source), Path(out), formats=formats, oracle=oracle)
    analytic_job.protect(job, retry=lambda reason: bool(retry))
