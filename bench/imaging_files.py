"""What becomes of every file of a folder, by the real commands: ``medveil-agent protect``, then ``restore``.

Copies of one object in several codings share a SOP Instance UID, and a job rightly quarantines such twins. So that
each coding has its turn, the n-th holder of an identity goes into the n-th job.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from medveil.agent.formats import reading_formats
from medveil.agent.imageio import Item
from medveil.agent.imageio.dicom_header import looks_like_dicom, read_dataset
from medveil.agent.ledger import FileRow, ImageState, Ledger
from medveil.agent.release_job import ledger_of
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.errors import ImageError
from medveil.models.phantoms import CLASS_NAMES

BIN = Path(sys.executable).parent
HEAD_BYTES = 512

PROTECTED, CARRIED, REFUSED, QUARANTINED = "protected", "carried over", "refused", "quarantined"
OUTCOMES = (PROTECTED, CARRIED, REFUSED, QUARANTINED)

OTHER_KINDS = frozenset(
    {
        "1-bit",
        "32-bit",
        "4d",
        "already-protected",
        "dicomdir",
        "float-pixels",
        "mixed-pages",
        "nifti-pair",
        "not-an-image",
        "nothing-fits",
        "parametric-map",
        "rgb",
        "rt-dose",
        "unsupported-transfer-syntax",
        "video",
    }
)
"""Reasons that say what a file is: refused by rule. Every other reason says what is wrong with it."""


@dataclass(frozen=True)
class Fate:
    """One file's outcome.

    Attributes:
        file: path below the data folder.
        outcome: one of ``OUTCOMES``.
        reason: code, where it was refused or quarantined.
        frames: images in it.
        psnr_db: of its worst frame.
        epsilon_max: largest change of any frame, in 1/255 of the release window.
        changed: mean share of changed pixels.
        restored: "same bytes", "same elements" (DICOM), "same content" (the bytes inside a gzip) or "same pixels"
            (a raster that was encoded anew).
    """

    file: str
    outcome: str
    reason: str = ""
    frames: int = 0
    psnr_db: float | None = None
    epsilon_max: float = 0.0
    changed: float = 0.0
    restored: str = ""


@dataclass(frozen=True)
class Ran:
    """A finished command: its JSON, exit code, peak resident memory and processor time of its processes."""

    report: dict[str, Any]
    code: int
    peak_bytes: int
    cpu_s: float


def agent(home: Path, *arguments: object) -> Ran:
    """Run ``medveil-agent`` in a process of its own."""
    command = [str(BIN / "medveil-agent"), *(str(argument) for argument in arguments), "--format", "json"]
    environment = os.environ | {"MEDVEIL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not said.strip():
        sys.exit(f"`{' '.join(command)}` said nothing and ended with {process.returncode}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Ran(json.loads(said), process.returncode, usage.ru_maxrss * 1024, cpu_s)


def fates(data: Path, files: Sequence[Path], bundle: Path, work: Path) -> list[Fate]:
    """Protect and restore ``files`` (paths below ``data``); a rerun goes on in ``work``."""
    found = []
    for number, chosen in enumerate(_jobs(data, files)):
        place = work / f"job-{number}"
        source, release, back = place / "source", place / "release", place / "restored"
        if not source.is_dir():
            _lay_out(data, chosen, source)
        if not Workspace(release, private_beside(release)).summary.is_file():
            done = agent(work / "home", "protect", source, "--out", release, "--bundle", bundle)
            assert done.report.get("unfinished") == 0, done.report
        shutil.rmtree(back, ignore_errors=True)
        restored = agent(work / "home", "restore", release, "--out", back)
        assert restored.report["refused"] == [], restored.report["refused"]
        with ledger_of(release, None) as ledger:
            found += [_fate(row, ledger, source, back) for row in ledger.files()]
    return sorted(found, key=lambda fate: fate.file)


def files_of(data: Path, folder: str) -> list[Path]:
    """Return every file of a folder, as paths below ``data``."""
    return sorted(path.relative_to(data) for path in (data / folder).rglob("*") if path.is_file())


def _jobs(data: Path, files: Sequence[Path]) -> list[list[Path]]:
    """Return the files of each job; no two of one job claim to be the same object."""
    jobs: list[list[Path]] = []
    met: Counter[str] = Counter()
    for path in files:
        item = _inspected(data / path)
        number = met[item.identity] if item is not None and item.identity else 0
        if item is not None:
            met[item.identity] += 1
        while len(jobs) <= number:
            jobs.append([])
        jobs[number].append(path)
    return jobs


def _inspected(path: Path) -> Item | None:
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    for entry in reading_formats():
        if entry.recognises(head, path):
            try:
                return entry.inspect(path, PurePosixPath(path.name))
            except ImageError:
                return None
    return None


def _lay_out(data: Path, files: Sequence[Path], source: Path) -> None:
    """Copy the files of one job, and give them the two classes of the bundle in turn."""
    part = source.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    for relative in files:
        (part / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / relative, part / relative)
    with (part / "labels.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("file", "label"))
        writer.writerows((path, CLASS_NAMES[number % 2]) for number, path in enumerate(files))
    part.rename(source)


def _fate(row: FileRow, ledger: Ledger, source: Path, back: Path) -> Fate:
    images = ledger.images(row.id)
    name = str(row.relative)
    if row.output_sha256 is None:
        reason = next((image.reason for image in images if image.reason), None) or "no reason"
        return Fate(name, REFUSED if reason in OTHER_KINDS else QUARANTINED, reason)
    restored = same(source / row.relative, back / row.relative)
    if not images:
        return Fate(name, CARRIED, restored=restored)
    receipts = [image.receipt for image in images if image.receipt is not None]
    assert all(image.state is ImageState.VERIFIED for image in images)
    return Fate(
        name,
        PROTECTED,
        frames=len(images),
        psnr_db=min((r.psnr_db for r in receipts if r.psnr_db is not None), default=None),
        epsilon_max=max(receipt.epsilon_max for receipt in receipts),
        changed=sum(receipt.changed for receipt in receipts) / len(receipts),
        restored=restored,
    )


def same(original: Path, restored: Path) -> str:
    """Return in what sense a restored file is its original; a file that is not ends the benchmark."""
    before, after = original.read_bytes(), restored.read_bytes()
    if before == after:
        return "same bytes"
    if before.startswith(b"\x1f\x8b") and gzip.decompress(before) == gzip.decompress(after):
        return "same content"
    if looks_like_dicom(before[:HEAD_BYTES]):
        if read_dataset(original) == read_dataset(restored):
            return "same elements"
    elif all(starmap(np.array_equal, zip(pixels_of(original), pixels_of(restored), strict=True))):
        return "same pixels"
    sys.exit(f"{original.name} was not restored")


def pixels_of(path: Path) -> list[Any]:
    """Return the stored values of every frame of a raster."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    taken = next(entry for entry in reading_formats() if entry.recognises(head, path))
    item = taken.inspect(path, PurePosixPath(path.name))
    with taken.open(item, path.parent) as frames:
        return [frames[number].pixels for number in range(len(frames))]


def folder_of(fate: Fate) -> str:
    """Return the data folder that a file belongs to."""
    return PurePosixPath(fate.file).parts[0]


def counts(found: Sequence[Fate], folders: Sequence[str]) -> Iterator[list[str]]:
    """Yield one table row per folder: its name, files, images, and files of each outcome."""
    for folder in (*folders, "all"):
        here = [fate for fate in found if folder in (folder_of(fate), "all")]
        outcomes = Counter(fate.outcome for fate in here)
        frames = sum(fate.frames for fate in here)
        yield [folder, str(len(here)), str(frames), *(str(outcomes[outcome]) for outcome in OUTCOMES)]


def as_data(found: Sequence[Fate]) -> list[dict[str, Any]]:
    """Return JSON values."""
    return [asdict(fate) for fate in found]
