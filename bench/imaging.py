"""What hospital files go through: every shared file, what survives of the change, speed, memory, overlay, pictures.

    python bench/imaging.py --data shared/data --work /tmp/imaging

Noise: SALM with the small bundle that medveil ships (two networks of 32x32 pixels, trained on drawn phantoms). It
stands for the work that a bundle makes, not for protection: these images are nothing that it was trained for.
Each part is kept in the work folder, so the benchmark can be killed and continued; ``--again PART`` measures a part
anew. Real images are drawn only where their source's licence allows it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import imaging_cost
import imaging_pictures
import imaging_survival
import report
from imaging_files import (
    CARRIED,
    OUTCOMES,
    PROTECTED,
    QUARANTINED,
    REFUSED,
    Fate,
    as_data,
    counts,
    fates,
    files_of,
    folder_of,
)

BUNDLE = Path(str(files("medveil.agent.demo") / "phantom.medveil"))

DICOM = ("dicom_highdicom", "dicom_pydicom_data")
SERIES = "dicom_mr_series"
RASTERS = "nii_ivadomed"
VOLUMES = "nii_hippocampus_a"
FOLDERS = (*DICOM, SERIES, RASTERS, VOLUMES)

PROTECTED_VOLUMES = 20
"""Of 200 hippocampi: one is like the other, and each is 36 images. The others go through a dry run."""

Section = tuple[str, dict[str, Any]]


def every_file(data: Path, work: Path) -> Section:
    """Part (a): every file protected and restored, refused, or quarantined."""
    found: list[Fate] = []
    for name, chosen in (
        ("dicom", [path for folder in DICOM for path in files_of(data, folder)]),
        (SERIES, files_of(data, SERIES)),
        (RASTERS, files_of(data, RASTERS)),
        (VOLUMES, some_volumes(data)),
    ):
        found += fates(data, chosen, BUNDLE, work / name)
    rest = [path for path in files_of(data, VOLUMES) if path not in some_volumes(data)]
    dry = imaging_cost.dry_run(data, rest, work / "scratch")
    text = [
        "Every file goes through `medveil-agent protect` and `restore`. Files that share a SOP Instance UID (one "
        "object in several codings) go into jobs of their own; in one job they would be quarantined as twins. No job "
        "crashed, and no file came back other than it was.",
        report.markdown_table(("folder", "files", "images", *OUTCOMES), list(counts(found, FOLDERS))),
        f"The other {len(rest)} files of `{VOLUMES}` in a dry run (sign noise at full budget, written, read back and "
        f"restored): {dry}.",
        *(_listed(found, outcome) for outcome in (REFUSED, QUARANTINED)),
        _protected_list(found),
    ]
    return "\n\n".join(text), {"files": as_data(found), "dry_run": dry}


def some_volumes(data: Path) -> list[Path]:
    """Return the first volumes with their labels, the one without a label, and what is no volume."""
    every = files_of(data, VOLUMES)
    names = sorted({path.name for path in every if path.parent.name == "images"})[:PROTECTED_VOLUMES]
    return [path for path in every if path.name in names or path.parent.name not in ("images", "labels")]


def _listed(found: Sequence[Fate], outcome: str) -> str:
    rows = [[fate.reason, fate.file] for fate in found if fate.outcome == outcome]
    meaning = {REFUSED: "by what it is", QUARANTINED: "by what is wrong with it"}[outcome]
    return f"### {outcome.capitalize()}, {meaning}\n\n" + report.markdown_table(
        ("reason", "file"), sorted(rows)
    )


def _protected_list(found: Sequence[Fate]) -> str:
    """Return the list of what was protected or carried over; files of a series or of volumes as one line."""
    rows = []
    for folder in DICOM:
        rows += [_row(fate.file, [fate]) for fate in found if folder_of(fate) == folder and _is_out(fate)]
    for folder in (SERIES, RASTERS, VOLUMES):
        for outcome in (PROTECTED, CARRIED):
            alike = [fate for fate in found if folder_of(fate) == folder and fate.outcome == outcome]
            if alike:
                rows.append(_row(f"{folder}: {len(alike)} files", alike))
    header = ("file", "outcome", "images", "lowest PSNR, dB", "largest, /255", "changed", "restored")
    return "### Protected, or carried over\n\n" + report.markdown_table(header, rows)


def _is_out(fate: Fate) -> bool:
    return fate.outcome in (PROTECTED, CARRIED)


def _row(name: str, alike: Sequence[Fate]) -> list[str]:
    psnr = [fate.psnr_db for fate in alike if fate.psnr_db is not None]
    frames = sum(fate.frames for fate in alike)
    return [
        name,
        alike[0].outcome,
        str(frames) if frames else "",
        f"{min(psnr):.1f}" if psnr else "",
        f"{max(fate.epsilon_max for fate in alike):.2f}" if frames else "",
        f"{sum(fate.changed for fate in alike) / len(alike):.0%}" if frames else "",
        ", ".join(sorted({fate.restored for fate in alike})),
    ]


def parts(data: Path, work: Path) -> dict[str, tuple[str, Callable[[], Section]]]:
    """Return each part's title and how it is measured."""
    return {
        "files": ("Every file", lambda: every_file(data, work / "files")),
        "survival": ("What survives of the change", lambda: imaging_survival.measure(data, BUNDLE)),
        "speed": ("Speed", lambda: imaging_cost.speed(data, BUNDLE, work / "speed")),
        "memory": ("Peak memory", lambda: imaging_cost.memory(BUNDLE, work / "memory")),
        "volume": (
            "A brain MR volume and its labels",
            lambda: imaging_cost.volume(data, work / "files" / VOLUMES),
        ),
        "pictures": ("Pictures", lambda: imaging_pictures.draw(data, BUNDLE, report.RESULTS)),
    }


def main() -> None:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared images")
    parser.add_argument("--work", type=Path, required=True, help="where finished parts are kept")
    parser.add_argument("--again", nargs="*", default=[], metavar="PART", help="parts to measure anew")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="PART", help="parts to leave out if not measured"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    sections, figures = [str(__doc__).split("\n\n")[2]], {}
    for name, (title, measure) in parts(arguments.data, arguments.work).items():
        kept = arguments.work / f"{name}.json"
        if name in arguments.skip and not kept.is_file():
            sections.append(f"## {title}\n\nNot measured in this run.")
            continue
        if name in arguments.again or not kept.is_file():
            text, values = measure()
            kept.write_text(json.dumps({"text": text, "values": values}, allow_nan=False))
        part = json.loads(kept.read_text())
        sections.append(f"## {title}\n\n{part['text']}")
        figures[name] = part["values"]
    report.write("imaging", "Hospital formats: files, survival, cost", sections, figures)


if __name__ == "__main__":
    main()
