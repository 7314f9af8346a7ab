"""What protecting images with masks costs: one pass at the site beside torch and PGD, volumes per minute, memory.

    python bench/segmentation_cost.py --data FOLDER --work /tmp/cost

By processor time on one thread, so that other work on the machine does not count. Generators have random weights:
speed and memory don't depend on what they learned.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

import report
from medveil.agent.engine import open_generator
from medveil.agent.segmentation.tiling import Tiles
from medveil.models.bundle import (
    GraphStatement,
    InputContract,
    ManifestDraft,
    MemberTraining,
    RecipeSettings,
    Taxonomy,
    TaxonomyClass,
    TrainingData,
    write_bundle,
)
from medveil.models.bundle.manifest import GeneratorUse, SegmentationContract
from medveil.models.datasets.masked import Patches
from medveil.models.export import to_onnx
from medveil.models.methods.segmentation import SegmentationSettings, get_segmentation
from medveil.models.nets.segmentation import ALIGNMENT, HALO, Generator, folded
from medveil.models.training.segmentation import answers, keyed
from medveil.models.training.segmentation_em import error_minimised

_SIDE = 256
"""Of the crops of the images: one tile of a generator."""
_CROPS, _EM_CROPS = 8, 2
_ROUNDS = 5
"""Of each way, one after the other in turn; the median is told with its spread."""
_BESIDE = "one pass, onnxruntime, as a site runs it"
_SMALL_TILE, _LARGE_TILE = (64, 64, 64), (64, 128, 128)
"""Tiles of volumes as the trainer writes them into a bundle (`medveil.coordinator.train_segmentation`)."""
_DRAWN = (256, 256, 128)
"""Columns, rows and slices of a drawn volume: half a chest CT."""
_VOLUMES = 20
_METHODS = ("voxshield", "grating-volume", "grating")
_MEMORY_BYTES = 2**30


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds seg_drive and nii_hippocampus_a"
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; emptied")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    images = _images(arguments.data / "seg_drive/test")
    small, large = _hippocampus(arguments.data, arguments.work), _drawn(arguments.work)
    names = (
        f"hippocampus, {_VOLUMES} volumes of about 35 x 50 x 36",
        f"a drawn volume of {' x '.join(map(str, _DRAWN))}",
    )
    volumes = {
        f"{name}, {method}": _protected(source, method, tile, classes, arguments.work)
        for name, source, tile, classes in zip(
            names, (small, large), (_SMALL_TILE, _LARGE_TILE), (3, 2), strict=True
        )
        for method in _METHODS
    }
    report.write(
        "segmentation_cost",
        "What protecting images with masks costs",
        [*_image_sections(images), *_volume_sections(volumes)],
        {"images_s": images, "volumes": volumes},
    )


# --- images: one pass, and what else there is -------------------------------------------------------------------


def _images(folder: Path) -> dict[str, list[float]]:
    """Return processor seconds per crop, by way and round."""
    crops = _crops(folder)
    method, settings = get_segmentation("umed-plus"), SegmentationSettings()
    torch.manual_seed(0)
    nets = {part: Generator(3, central_difference=part == "contour") for part in method.generators}
    sessions = {
        part: open_generator(
            to_onnx(folded(net), (3, _SIDE, _SIDE)), threads=1, memory_budget_bytes=_MEMORY_BYTES
        )
        for part, net in nets.items()
    }
    tiles, batch = Tiles((_SIDE, _SIDE), HALO, ALIGNMENT), keyed(crops)

    def at_the_site() -> None:
        said = {part: tiles.answered(crops.images, s.perturbation) for part, s in sessions.items()}
        method.perturb(batch, {part: np.clip(a, -1, 1) for part, a in said.items()}, settings)

    few, drawn = crops.select(np.arange(_EM_CROPS)), get_segmentation("grating")
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "gratings, drawn, as a site does": (_CROPS, lambda: drawn.perturb(batch, None, settings)),
        _BESIDE: (_CROPS, at_the_site),
        "one pass, torch eager": (
            _CROPS,
            lambda: method.perturb(batch, answers(nets, crops.images), settings),
        ),
        "EM by PGD, torch (8 rounds of 5 steps, surrogate trained beside)": (
            _EM_CROPS,
            lambda: error_minimised(few, settings.epsilon, foreground_only=True, seed=0),
        ),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_ROUNDS):
        for way, (count, work) in ways.items():
            taken[way].append(_seconds(work) / count)
    return taken


def _crops(folder: Path) -> Patches:
    """Return the middles of retinal images with their vessels."""
    images, labels = [], []
    for file in sorted((folder / "image").glob("*.png"))[:_CROPS]:
        image = np.asarray(Image.open(file).convert("RGB"), np.float32) / np.float32(255)
        vessel = np.asarray(Image.open(next((folder / "vessel").glob(f"{file.stem}*"))).convert("L")) > 127
        top, left = ((length - _SIDE) // 2 for length in vessel.shape)
        where = np.s_[top : top + _SIDE, left : left + _SIDE]
        images.append(image[where].transpose(2, 0, 1))
        labels.append(vessel[where].astype(np.int64))
    return Patches(np.stack(images), np.stack(labels), 2)


def _seconds(work: Callable[[], Any]) -> float:
    """Return the processor time of a piece of work."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _image_sections(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    least = float(np.median(seconds[_BESIDE]))
    rows = [
        [way, report.spread([1 / one for one in taken], 2), f"{np.median(taken) / least:.3g} x"]
        for way, taken in seconds.items()
    ]
    text = (
        f"Colour crops of {_SIDE} x {_SIDE} pixels, two generators (contour, texture), with band, texture bound, clip"
        f" and gate; without reading and writing. Median (range) of {_ROUNDS} rounds."
    )
    return [
        "## Images",
        text,
        report.markdown_table(["way", "images/s of one core", f"time beside: {_BESIDE}"], rows),
    ]


# --- volumes: the whole job -------------------------------------------------------------------------------------


def _hippocampus(data: Path, work: Path) -> Path:
    source = work / "hippocampus"
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
        for file in sorted((data / "nii_hippocampus_a" / folder).glob("*.nii.gz"))[:_VOLUMES]:
            shutil.copyfile(file, source / folder / file.name)
    return source


def _drawn(work: Path) -> Path:
    source, rng = work / "drawn", np.random.default_rng(0)
    voxels = rng.normal(40, 120, _DRAWN).astype(np.int16)
    labels = np.zeros(_DRAWN, np.uint8)
    labels[60:180, 80:200, 20:100] = 1
    for folder, values in (("images", voxels), ("labels", labels)):
        (source / folder).mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), source / folder / "drawn.nii.gz")
    return source


_CHILD = """
import json, resource, sys
from medveil.agent.cli import main
code = main()
used = resource.getrusage(resource.RUSAGE_SELF)
# Of this program alone; ru_maxrss would be that of the process it was started from, where that was larger.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
said = {"code": code, "cpu_s": used.ru_utime + used.ru_stime, "peak_kib": int(peak.split()[1])}
print(json.dumps(said), file=sys.stderr)
"""


def _protected(
    source: Path, method: str, tile: tuple[int, ...], classes: int, work: Path
) -> dict[str, float]:
    """Run the whole command in a process of its own; return volumes, slices, seconds and peak memory."""
    out = work / f"{source.name}-{method}"
    bundle = _bundle(work / f"{source.name}-{method}.medveil", method, tile, classes=classes)
    command = [sys.executable, "-c", _CHILD, "protect", str(source), "--out", str(out)]
    done = subprocess.run(
        [*command, "--bundle", str(bundle), "--threads", "1", "--format", "json"],
        env=os.environ | {"MEDVEIL_HOME": str(work / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    summary, used = json.loads(done.stdout), json.loads(done.stderr.strip().splitlines()[-1])
    assert summary["verified"] == summary["images"] > 0, summary
    return {
        "volumes": len(list((source / "images").iterdir())),
        "slices": summary["images"],
        "cpu_s": used["cpu_s"],
        "peak_bytes": 1024 * used["peak_kib"],
    }


def _volume_sections(volumes: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows: list[Sequence[str]] = [
        [
            name,
            f"{60 * one['volumes'] / one['cpu_s']:.3g}",
            f"{one['slices'] / one['cpu_s']:.3g}",
            f"{one['peak_bytes'] / 2**20:.0f} MiB",
        ]
        for name, one in volumes.items()
    ]
    text = (
        "By `medveil-agent protect`, one process from start to end: read, budget, write, read back, sealed. "
        f"{' and '.join(_METHODS[:2])} in slabs of tiles, {' x '.join(map(str, _SMALL_TILE))} voxels for the small "
        f"volumes, {' x '.join(map(str, _LARGE_TILE))} for the large one; grating slice by slice."
    )
    return [
        "## Volumes",
        text,
        report.markdown_table(["source", "volumes/min of one core", "slices/s", "peak memory"], rows),
    ]


def _bundle(path: Path, method: str, tile: tuple[int, ...], *, classes: int) -> Path:
    """Write a bundle of VoxShield with an untrained generator, or of gratings."""
    torch.manual_seed(0)
    generated = bool(get_segmentation(method).generators)
    graphs = {"roi": to_onnx(Generator(1, dimensions=3), (1, *tile))} if generated else {}
    statement = GraphStatement(
        name="roi",
        role="generator",
        architecture="unet",
        parameters=1,
        hold_out=None,
        training=MemberTraining(seed=0, epochs=1, attempts=1),
    )
    names = ("background", *(f"structure {number}" for number in range(1, classes)))
    draft = ManifestDraft(
        task="segmentation",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        tool_version="bench",
        seed=0,
        taxonomy=Taxonomy(classes=tuple(TaxonomyClass(name=n, stored_value=v) for v, n in enumerate(names))),
        input=InputContract(
            channels=1,
            slices=tile[0] if get_segmentation(method).across_slices else None,
            rows=tile[1],
            columns=tile[2],
            channel_meaning="grey",
        ),
        recipe=RecipeSettings(method=method, objective="label", epsilon_255=4.0, mask_ratio=1.0),
        segmentation=SegmentationContract(
            generators=(GeneratorUse(part="roi", graph="roi"),) if generated else (),
            band_radius=0,
            texture_bound=False,
            target="labels" if generated else None,
            halo=HALO if generated else 0,
            alignment=ALIGNMENT if generated else 1,
        ),
        training_data=TrainingData(
            name="none",
            source_statement="random weights",
            sha256="00" * 32,
            train_counts=(0,) * classes,
            hold_out_counts=(0,) * classes,
        ),
        graphs=(statement,) if generated else (),
    )
    write_bundle(path, draft, graphs, {}, Ed25519PrivateKey.from_private_bytes(bytes(32)))
    return path


if __name__ == "__main__":
    main()
