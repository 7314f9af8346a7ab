"""One file of the release: written, read back, compared, sealed, and only then given its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medveil.agent.imageio import Frames, ImageFormat, Item, StoredArray
from medveil.agent.sealing import Binding, clean_digest, frame_change, write_sidecar
from medveil.agent.workspace import Workspace
from medveil.models.disk import disk_errors, file_sha256, publish, sync
from medveil.models.errors import ImageError

__all__ = ["FileWriter"]


class FileWriter:
    """Writes files of one job."""

    def __init__(
        self,
        workspace: Workspace,
        formats: Mapping[str, ImageFormat],
        recipients: Sequence[str],
        settings_digest: str,
    ) -> None:
        """Keep where to write, how, and for whom.

        Args:
            workspace: the job's folders.
            formats: by name.
            recipients: age public keys that can open the sidecars.
            settings_digest: what the sidecars are bound to.
        """
        self._workspace = workspace
        self._formats = formats
        self._recipients = recipients
        self._settings_digest = settings_digest

    def write(
        self,
        item: Item,
        frames: Frames,
        protected: Mapping[int, Callable[[], StoredArray]],
        digests: Sequence[bytes],
    ) -> tuple[str, str]:
        """Write, read back, compare, seal, and give the final name; return both digests (output, clean).

        Args:
            item: the source file.
            frames: the clean images.
            protected: for each frame to release, how to get its protected stored values; ascending.
            digests: of every clean image.

        Raises:
            ImageError: ``read-back``: the file that was written does not say what was meant.
            StorageError: the disk takes no more; nothing is left under the final name.
        """
        format_ = self._formats[item.format]
        part = self._workspace.part(item.target)
        try:
            with disk_errors():
                part.parent.mkdir(parents=True, exist_ok=True)
                format_.write(item, list(protected), (get() for get in protected.values()), part)
                sync(part)
            _compare(format_, part, protected)
            output = file_sha256(part)
            clean = self._seal(item, frames, protected, digests, output)
            with disk_errors():
                publish(part, self._workspace.output(item.target))
        finally:
            with disk_errors():
                part.unlink(missing_ok=True)
        return output, clean

    def _seal(
        self,
        item: Item,
        frames: Frames,
        protected: Mapping[int, Callable[[], StoredArray]],
        digests: Sequence[bytes],
        output: str,
    ) -> str:
        """Write the sidecar that turns the protected copy back into the original; return the clean digest."""
        patch = self._formats[item.format].patch(item)
        clean = file_sha256(item.path) if item.seals_original else clean_digest(digests)
        changes = (
            frame_change(frames[frame].pixels, protected[frame]() if frame in protected else None)
            for frame in ([] if item.seals_original else range(len(frames)))
        )
        binding = Binding(output, clean, self._settings_digest, item.seals_original)
        sidecar = self._workspace.sidecar(item.target)
        write_sidecar(sidecar, binding, patch, changes, self._recipients)
        return clean


def _compare(format_: ImageFormat, part: Path, protected: Mapping[int, Callable[[], StoredArray]]) -> None:
    """Read a written file back as any reader would, and compare it with what was meant, value by value.

    Raises:
        ImageError: ``read-back``.
    """
    with format_.read_back(part) as written:
        read = iter(written)
        for get in protected.values():
            meant, found = get(), next(read, None)
            if found is None or found.dtype != meant.dtype or not np.array_equal(found, meant):
                raise _read_back_error()
        if next(read, None) is not None:
            raise _read_back_error()


def _read_back_error() -> ImageError:
    return ImageError("read-back", "The written copy does not read back as it was meant; report this image.")
