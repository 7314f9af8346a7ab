"""Protected pixels of a file with many images, kept on the disk until the file can be written as a whole."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from medveil.agent.imageio import StoredArray
from medveil.models.disk import disk_errors
from medveil.models.errors import StorageError

__all__ = ["Spool"]


class Spool(AbstractContextManager["Spool"]):
    """An append-only file of stored values; the ledger knows where each image begins.

    An image counts once `sync` has returned and the ledger has its offset. What a killed run appended
    after that is dead space, overwritten by nothing and read by nobody.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the spool of one file."""
        with disk_errors():
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self._file = os.fdopen(handle, "r+b")
            self._end = self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with disk_errors():
            self._file.close()

    def append(self, pixels: StoredArray) -> int:
        """Write one image's stored values behind the last and return where it begins."""
        offset = self._end
        with disk_errors():
            self._file.seek(offset)
            self._end += self._file.write(np.ascontiguousarray(pixels).tobytes())
        return offset

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        with disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def read(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> StoredArray:
        """Return the image that begins at ``offset``.

        Raises:
            StorageError: ``spool-damaged``.
        """
        size = math.prod(shape) * dtype.itemsize
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) < size:
            raise StorageError(
                "spool-damaged",
                "Unfinished work in the private folder is damaged; delete its folder `spool` and run again.",
            )
        stored: StoredArray = np.frombuffer(data, dtype).reshape(shape)
        return stored

    def holds(self, offset: int) -> bool:
        """Return whether anything was written at ``offset``."""
        return offset < self._end
