"""The way back: protected copies and sealed sidecars give every original pixel again, or a named refusal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medveil.agent.imageio import ImageFormat, StoredArray
from medveil.agent.ledger import FileRow, Ledger
from medveil.agent.sealing import SidecarReader, SiteKey, clean_digest, open_sidecar
from medveil.agent.workspace import Workspace
from medveil.models.disk import PART_PREFIX, disk_errors, file_sha256, part_beside, publish, sync
from medveil.models.errors import (
    ConfigurationError,
    InputError,
    MedveilError,
    RefusedError,
    StorageError,
)

__all__ = ["Refusal", "Restored", "restore"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file that was not restored, and the named reason."""

    target: PurePosixPath
    code: str
    public: str


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restoration achieved.

    Attributes:
        files: files of the release.
        restored: paths of the originals that were written, below the output folder.
        refused: what was not, and why.
    """

    files: int
    restored: tuple[PurePosixPath, ...]
    refused: tuple[Refusal, ...]


def restore(
    release: Path,
    private: Path,
    out: Path,
    key: SiteKey,
    formats: Sequence[ImageFormat],
    *,
    advance: Callable[[int], None] = lambda files: None,
) -> Restored:
    """Restore every original of a release.

    Each file is checked against the clean digest before it gets its name. One that is refused does not
    stop the rest.

    Args:
        release: folder of protected copies, as it was released.
        private: the private folder of the same job.
        out: folder for the originals; empty or not there yet.
        key: identity that the sidecars were sealed for.
        formats: as the job used them.
        advance: called after every file.

    Raises:
        InputError: ``no-release`` or ``no-private-folder``.
        ConfigurationError: ``folders``: the output lies inside one of the others.
        StorageError: ``foreign-files``, or the disk takes no more.
    """
    workspace = Workspace(release, private)
    if not release.is_dir():
        raise InputError("no-release", "There is no release folder at this path.")
    if not workspace.ledger_path.is_file():
        raise InputError(
            "no-private-folder", "There is no ledger there; name the private folder with --private."
        )
    _check_out(out, workspace)
    with Ledger(workspace.ledger_path) as ledger:
        files = [file for file in ledger.files() if file.output_sha256 is not None]
    by_name = {format_.name: format_ for format_ in formats}
    restored: list[PurePosixPath] = []
    refused: list[Refusal] = []
    for file in files:
        try:
            _restore_file(file, workspace, out, key, by_name)
            restored.append(file.relative)
        except StorageError:
            raise
        except MedveilError as error:
            refused.append(Refusal(file.target, error.code, error.public))
        advance(1)
    return Restored(len(files), tuple(restored), tuple(refused))


def _check_out(out: Path, workspace: Workspace) -> None:
    place = out.resolve()
    for other in (workspace.release.resolve(), workspace.private.resolve()):
        if place == other or other in place.parents or place in other.parents:
            raise ConfigurationError("folders", "The output folder must lie apart from the other two.")
    with disk_errors():
        if out.exists() and any(out.iterdir()):
            raise StorageError("foreign-files", "The output folder is not empty; nothing was changed.")


def _restore_file(
    file: FileRow, workspace: Workspace, out: Path, key: SiteKey, formats: Mapping[str, ImageFormat]
) -> None:
    """Restore one file.

    Raises:
        RefusedError: ``missing``, ``altered``, ``no-sidecar``, ``wrong-key`` or ``wrong-sidecar``.
    """
    format_ = formats.get(file.format)
    if format_ is None:
        raise RefusedError("unknown-format", "This medveil does not know the format of this file.")
    protected = workspace.output(file.target)
    if not protected.is_file():
        raise RefusedError("missing", "The protected file is not in the release folder.")
    digest = file_sha256(protected)
    if digest != file.output_sha256:
        raise RefusedError("altered", "The protected file is not the one that was released; restore refuses.")
    target = out / file.relative
    part = part_beside(target)
    with disk_errors():
        part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_sidecar(workspace.sidecar(file.target), key, protected_sha256=digest) as sidecar:
            _write(file, format_, protected, sidecar, part)
        with disk_errors():
            sync(part)
            part.chmod(0o600)
            publish(part, target)
    finally:
        with disk_errors():
            part.unlink(missing_ok=True)


def _write(file: FileRow, format_: ImageFormat, protected: Path, sidecar: SidecarReader, part: Path) -> None:
    """Write the original under a temporary name and check that it is the original.

    Raises:
        RefusedError: ``wrong-sidecar``.
    """
    with ExitStack() as stack:
        clean: Iterator[StoredArray] = iter(())
        if not sidecar.binding.whole_file:
            written = iter(stack.enter_context(format_.read_back(protected)))
            clean = sidecar.clean_frames(written)
        with disk_errors():
            format_.restore(protected, clean, sidecar.patch, part)
    if sidecar.binding.whole_file:
        found = file_sha256(part)
    else:
        item = format_.inspect(part, file.relative)
        with (
            tempfile.TemporaryDirectory(dir=part.parent, prefix=PART_PREFIX) as scratch,
            format_.open(item, Path(scratch)) as frames,
        ):
            found = clean_digest(frames[frame].digest for frame in range(len(frames)))
    if found != sidecar.binding.clean_sha256:
        raise RefusedError("wrong-sidecar", "This sidecar does not give the original back; restore refuses.")
