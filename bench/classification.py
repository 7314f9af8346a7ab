"""Classification across hospitals: what do victims learn from the union of three protected releases?

    python bench/classification.py --data pneumoniamnist.npz --work /tmp/bench

1. A coordinator trains surrogates on the "public" third of the training split: ``medveil-coordinator train``.
2. Three disjoint sites protect the rest, each with the bundle only: ``medveil-agent protect``, once per mask size.
3. Victims that the bundle doesn't contain train on the union of the three releases and are scored on clean images.

Every victim's run is kept in the work folder, so the benchmark can be killed and continued.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import report
from cohort import COLUMNS, SITES, SPLIT_SEED, deal, new_parser, planes
from medveil.models.quality import fidelity

CLEAN_SHARE = 0.2
"""Share of clean images in the mixed release, and of the clean-part-alone row beside it."""
ADVERSARIAL_RADIUS = 4 / 255
ADVERSARIAL_MASKS = (1.0, 0.3, 0.2)
"""Where adversarial training is measured: it takes as long as ten other victims."""
BIN = Path(sys.executable).parent
_PLACES = {"release", "private", "contact_sheet"}
"""Of a site's summary: where things lie on the machine that measured, which is nobody's business."""


@dataclass(frozen=True)
class Victim:
    """One row of the table: an attacker and what they hold.

    ``holds``: "all" of the release; "mixed": CLEAN_SHARE of it replaced by clean originals; "clean part": only those.
    """

    label: str
    architecture: str
    holds: str = "all"
    adversarial_radius: float = 0.0
    epochs: int = 10


VICTIMS = (
    Victim("MobileNet", "mobilenet"),
    Victim("Inception", "inception"),
    Victim("ConvNeXt", "convnext", epochs=20),
    Victim("MLP", "mlp", epochs=20),
    Victim("ViT", "vit", epochs=20),
    Victim("MobileNet, adversarial training 4/255", "mobilenet", adversarial_radius=ADVERSARIAL_RADIUS),
    Victim("MobileNet, 80 % of this + 20 % clean", "mobilenet", "mixed"),
)
CLEAN_PART = Victim("MobileNet, the clean 20 % alone", "mobilenet", "clean part")


def main() -> None:
    """Run the benchmark and write its table."""
    arguments = _arguments()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    stages = _Stages(work, arguments)
    stages.split()
    bundle = stages.bundle()
    releases = {f"mask {mask:g}": stages.release(bundle, mask) for mask in arguments.masks}
    runs = _all_victims(work, ["clean", *releases], arguments)
    _write(arguments, bundle, work, releases, runs)


def _arguments() -> argparse.Namespace:
    parser = new_parser(__doc__, quick=False)
    parser.add_argument(
        "--name", default="classification_federated", help="of the table under bench/results/"
    )
    parser.add_argument("--masks", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.25, 0.2, 0.1])
    parser.add_argument("--minutes", type=float, default=None, help="given to the coordinator's training")
    parser.add_argument("--workers", type=int, default=2, help="victims trained at once, one thread each")
    return parser.parse_args()


class _Stages:
    """Steps 1 and 2, by the real commands; a step whose result is there is not repeated."""

    def __init__(self, work: Path, arguments: argparse.Namespace) -> None:
        self._work = work
        self._arguments = arguments

    def split(self) -> None:
        """Deal the training split out: a third is public, the rest goes to the sites; the test split stays clean."""
        if (self._work / "test.npz").exists():
            return
        dealt = deal(self._arguments.data)
        public, test = dealt.public, dealt.test
        np.savez(self._work / "public.npz", train_images=public.images, train_labels=public.labels)
        for number, site in enumerate(dealt.sites):
            folder = self._work / f"site{number}"
            folder.mkdir(exist_ok=True)
            np.savez(folder / "images.npz", train_images=site.images, train_labels=site.labels)
        np.savez(self._work / "test.npz", images=test.images, labels=test.labels)

    def bundle(self) -> Path:
        """Train the surrogates on the public third."""
        target = self._work / "public.medveil"
        if not target.exists():
            minutes = [] if self._arguments.minutes is None else ["--minutes", str(self._arguments.minutes)]
            command = ["medveil-coordinator", "train", self._work / "public.npz", "--task", "classification"]
            self._run([*command, "--out", target, "--seed", "0", *minutes])
        return target

    def release(self, bundle: Path, mask: float) -> dict[str, Any]:
        """Let every site protect its images at one mask size; return the sites' own summaries."""
        summaries = []
        for number in range(SITES):
            out = self._work / f"mask{mask:g}" / f"site{number}"
            out.parent.mkdir(exist_ok=True)
            kept = out.with_suffix(".json")
            if not kept.exists():
                command = ["medveil-agent", "protect", self._work / f"site{number}", "--out", out]
                options = ["--bundle", bundle, "--mask", str(mask), "--format", "json"]
                kept.write_text(self._run([*command, *options]))
            summary = json.loads(kept.read_text())
            summaries.append({key: summary[key] for key in summary.keys() - _PLACES})
        return {"sites": summaries}

    def _run(self, command: Sequence[str | Path]) -> str:
        program, *rest = command
        environment = os.environ | {"MEDVEIL_HOME": str(self._work / "home"), "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        done = subprocess.run(
            [str(BIN / program), *map(str, rest)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        print(f"{program} {rest[0]}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        return done.stdout


def _union(work: Path, condition: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored images and labels of all sites under one condition."""
    folder = work if condition == "clean" else work / condition.replace(" ", "")
    images, labels = [], []
    for number in range(SITES):
        with np.load(folder / f"site{number}" / "images.npz") as site:
            images.append(site["train_images"])
            labels.append(site["train_labels"])
    return np.concatenate(images), np.concatenate(labels)


def _held(work: Path, condition: str, victim: Victim, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what this attacker trains on."""
    images, labels = _union(work, condition)
    if victim.holds == "all":
        return images, labels
    chosen = np.random.default_rng((SPLIT_SEED, seed)).random(len(images)) < CLEAN_SHARE
    clean, _ = _union(work, "clean")
    if victim.holds == "clean part":
        return clean[chosen], labels[chosen]
    return np.where(chosen.reshape(-1, *[1] * (images.ndim - 1)), clean, images), labels


def _one_victim(work: Path, condition: str, victim: Victim, seed: int) -> dict[str, Any]:
    """Train one victim, unless its run is kept in the work folder; return its scores per epoch."""
    import torch

    from medveil.models.audit.victims import VictimSettings, train_victim

    torch.set_num_threads(1)
    images, labels = _held(work, condition, victim, seed)
    data = hashlib.sha256(images.tobytes()).hexdigest()
    key = hashlib.sha256(json.dumps([asdict(victim), seed, data], sort_keys=True).encode()).hexdigest()[:24]
    kept = work / "runs" / f"{key}.json"
    if not kept.exists():
        with np.load(work / "test.npz") as test:
            tests = planes(test["images"]), test["labels"].reshape(-1).astype(np.int64)
        settings = VictimSettings(
            architecture=victim.architecture,
            epochs=victim.epochs,
            adversarial_radius=victim.adversarial_radius,
        )
        y = labels.reshape(-1).astype(np.int64)
        run = train_victim(planes(images), y, *tests, settings, classes=int(y.max()) + 1, seed=seed)
        kept.parent.mkdir(exist_ok=True)
        part = kept.with_suffix(".part")
        part.write_text(json.dumps([scores.as_dict() for scores in run.history]))
        part.replace(kept)
    return {
        "condition": condition,
        "victim": victim.label,
        "seed": seed,
        "epochs": json.loads(kept.read_text()),
    }


def _all_victims(
    work: Path, conditions: Sequence[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    adversarial = {"clean", *(f"mask {mask:g}" for mask in ADVERSARIAL_MASKS)}
    tasks = [
        (condition, victim, seed)
        for seed in arguments.seeds
        for condition in conditions
        for victim in ([*VICTIMS[:-1], CLEAN_PART] if condition == "clean" else VICTIMS)
        if not victim.adversarial_radius or condition in adversarial
    ]
    tasks.sort(key=lambda task: task[1].adversarial_radius)  # what takes longest comes last
    results = []
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_one_victim, work, *task) for task in tasks]
        for number, done in enumerate(as_completed(waiting), start=1):
            results.append(done.result())
            last = results[-1]
            print(f"{number}/{len(tasks)} {last['condition']}, {last['victim']}", file=sys.stderr, flush=True)
    return results


def _rows(conditions: Sequence[str], runs: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for condition in conditions:
        for victim in (*VICTIMS, CLEAN_PART):
            histories = [
                r["epochs"] for r in runs if r["condition"] == condition and r["victim"] == victim.label
            ]
            if histories:
                cells = [report.spread([pick(history) for history in histories]) for _, pick in COLUMNS]
                yield [condition, victim.label, *cells]


def _quality(work: Path, conditions: Sequence[str]) -> list[list[str]]:
    clean = planes(_union(work, "clean")[0])
    rows = []
    for condition in conditions:
        protected = planes(_union(work, condition)[0])
        rows.append(
            [
                condition,
                f"{np.median(fidelity.psnr_db(clean, protected)):.1f}",
                f"{np.min(fidelity.psnr_db(clean, protected)):.1f}",
                f"{np.median(fidelity.ssim(clean, protected)):.3f}",
                f"{100 * np.mean(fidelity.changed_share(clean, protected)):.0f} %",
                f"{255 * np.max(fidelity.max_change(clean, protected)):.0f}/255",
            ]
        )
    return rows


def _write(
    arguments: argparse.Namespace,
    bundle: Path,
    work: Path,
    releases: dict[str, Any],
    runs: Sequence[dict[str, Any]],
) -> None:
    inspected = subprocess.run(
        [str(BIN / "medveil"), "bundle", "inspect", str(bundle), "--format", "json"],
        check=True,
        capture_output=True,
        text=True,
    )
    conditions = ["clean", *releases]
    with np.load(work / "public.npz") as public, np.load(work / "test.npz") as test:
        sizes = f"{len(public['train_images'])} public images, {len(test['images'])} clean test images"
    protected = sum(site["verified"] for site in next(iter(releases.values()))["sites"])
    sections = [
        f"Surrogates trained on {sizes}; three sites protected {protected} images between them, each with the signed "
        f"bundle only. Victims trained on the union, seeds {arguments.seeds}: median (range).",
        "Recoverable: the best over label permutations and after calibration on 50 clean labelled images; 0.50 is "
        "chance. Peak: the best epoch, for an attacker who can stop early on clean images.",
        "## What it looks like",
        report.markdown_table(
            ["release", "PSNR dB, median", "lowest", "SSIM", "pixels changed", "largest change"],
            _quality(work, list(releases)),
        ),
        "## What victims learn",
        report.markdown_table(
            ["release", "victim", *(name for name, _ in COLUMNS)], list(_rows(conditions, runs))
        ),
    ]
    data = {"releases": releases, "runs": list(runs), "bundle": json.loads(inspected.stdout)}
    report.write(arguments.name, "Classification across three hospitals", sections, data)


if __name__ == "__main__":
    main()
