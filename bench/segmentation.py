"""Segmentation across hospitals: what do victims learn from releases protected by UMed, and from its baselines?

    python bench/segmentation.py --data FOLDER --work /tmp/bench --sets drive --seeds 0 --minutes 60

Three sites hold the images that victims train on; a public source holds others. Generators are trained either on the
sites' own images (the paper's setting) or on the public ones and applied, frozen, to images they never saw (the
federated setting). Victims are scored on clean test images, except where they transform every image: then the test
images are transformed alike.

Every finished piece is a file in the work folder; killed or out of time, the same command goes on. The table holds
what is finished. ``--pictures`` draws a sheet of one protection for the sets whose licence lets us show them, and
then writes the table with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import report
from cohort import kept
from medveil.models.audit.segmentation_victims import (
    SegmentationVictimSettings,
    pretrained,
    train_segmentation_victim,
)
from medveil.models.methods.segmentation import SegmentationSettings
from medveil.models.quality import fidelity
from medveil.models.training.segmentation import PLANS, GeneratorPlan, GeneratorTraining, protect_patches
from medveil.models.training.segmentation_check import roi_psnr_db
from medveil.models.training.segmentation_drawn import DRAWN_PLANS
from medveil.models.training.segmentation_em import error_minimised
from segmentation_cohort import (
    COHORTS,
    SITES,
    VOLUME_COHORTS,
    SegmentationCohort,
    difficulty,
    planes_of,
)
from segmentation_pictures import FACTOR, Row, caption_of, draw, licence
from segmentation_transforms import TRANSFORMS

Images = npt.NDArray[np.float32]

# 48 pixels a side: a band of 2 pixels is to them what 3 and more are to the paper's images.
_FAITHFUL = SegmentationSettings(band_radius=1)
_WIDE = SegmentationSettings(band_radius=2)
_ITERATIONS = 400
_VOLUMES_AT_ONCE = 4  # of 32 voxels a side: eight times the pixels of 16 images
_DRAWN_HERE = "drawn by this benchmark, no patient"
_QUICK = 3  # steps and iterations of a smoke run


@dataclass(frozen=True)
class Protection:
    """One way to protect: generators by a plan, error-minimising noise, or a drawn pattern.

    Finished pieces are kept under its name: whose plan changes gets another name, or another work folder.
    ``elsewhere``: the generators are trained on the public images only.
    """

    name: str
    plan: GeneratorPlan | None = None
    elsewhere: bool = False
    pattern: str = ""
    em: str = ""
    settings: SegmentationSettings = _WIDE


def _plan(name: str, settings: SegmentationSettings, **changes: Any) -> GeneratorPlan:
    return replace(PLANS[name], settings=settings, **{"iterations": _ITERATIONS, **changes})


_PLUS = _plan("umed-plus", _WIDE)
_TARGETED = PLANS["umed-targeted"]
_VOXSHIELD = PLANS["voxshield"]


def _targeted(
    name: str, *, elsewhere: bool = False, changes: dict[str, Any] | None = None, **settings: Any
) -> Protection:
    changed = replace(_TARGETED.settings, **settings)
    plan = replace(_TARGETED, settings=changed, **(changes or {}))
    return Protection(name, plan, elsewhere=elsewhere, settings=changed)


CLEAN = Protection("clean")
_EM_EIGHT = replace(_WIDE, epsilon=8 / 255)
PROTECTIONS = {
    p.name: p
    for p in (
        CLEAN,
        Protection("umed 4/255", _plan("umed", _FAITHFUL), settings=_FAITHFUL),
        Protection("umed-plus 4/255", _PLUS),
        _targeted("umed-targeted 8/255"),
        _targeted("umed-targeted 8/255, generators from elsewhere", elsewhere=True),
        _targeted("umed-targeted 8/255, hardened", changes={"hardened": True}),
        _targeted("umed-targeted 8/255, towards foreground", changes={"target": "foreground"}),
        _targeted("umed-targeted 8/255, band 2", band_radius=2),
        _targeted("umed-targeted 6/255", epsilon=6 / 255),
        _targeted("umed-targeted 4/255", epsilon=4 / 255),
        _targeted(
            "umed-targeted 4/255, UMed's band and texture bound",
            epsilon=4 / 255,
            band_radius=1,
            texture_bound=True,
        ),
        _targeted("umed-targeted 16/255", epsilon=16 / 255),
        Protection("umed-plus 4/255, not hardened", replace(_PLUS, hardened=False)),
        Protection("umed-plus 4/255, 1:1", replace(_PLUS, surrogate_every=2)),
        Protection("umed-plus 4/255, instance-norm surrogate", replace(_PLUS, surrogates=("unet-instance",))),
        Protection(
            "umed-plus 4/255, both surrogates", replace(_PLUS, surrogates=("unet-batch", "unet-instance"))
        ),
        Protection(
            "umed-plus 8/255",
            replace(_PLUS, settings=replace(_WIDE, epsilon=8 / 255)),
            settings=replace(_WIDE, epsilon=8 / 255),
        ),
        Protection("voxshield 4/255", _VOXSHIELD, settings=_VOXSHIELD.settings),
        Protection(
            "voxshield 16/255",
            replace(_VOXSHIELD, settings=replace(_VOXSHIELD.settings, epsilon=16 / 255)),
            settings=replace(_VOXSHIELD.settings, epsilon=16 / 255),
        ),
        *(
            Protection(
                f"{name} {epsilon}/255",
                pattern=name,
                settings=replace(DRAWN_PLANS[name].budgets[0], epsilon=epsilon / 255),
            )
            for name, budgets in (
                ("grating", (3, 4, 8)),
                ("grating-coarse", (8,)),
                ("grating-volume", (4, 8)),
            )
            for epsilon in budgets
        ),
        Protection("EM 4/255, full", em="full"),
        Protection("EM 8/255, full", em="full", settings=_EM_EIGHT),
        Protection("EM 4/255, foreground", em="roi"),
        Protection("LSP 4/255, inside and outside", pattern="seg-lsp"),
        Protection("AR 4/255, inside and outside", pattern="seg-ar"),
        Protection("random 4/255, foreground", pattern="roi-random"),
        Protection("constant 4/255, foreground", pattern="roi-constant"),
    )
}


@dataclass(frozen=True)
class Attack:
    """One row: who trains, on how much of the release, after which countermeasure.

    ``holds``: "all" of the release; "one site open": one of the three sites unprotected; "open site alone".
    "public": no attacker but a reader, trained on public clean images and tested on the release: what is it still
    good for? ``sliced``: volumes are taken apart into planes, and so is the test.
    """

    victim: str
    holds: str = "all"
    transform: str = ""
    augmentation: str = "plain"
    adversarial_255: float = 0.0
    pretrained: bool = False
    sliced: bool = False

    @property
    def label(self) -> str:
        """What the table calls it."""
        parts = [
            self.victim,
            *([] if self.holds == "all" else [_READS if self.holds == "public" else self.holds]),
            *([self.transform] if self.transform else []),
            *(["strong augmentation"] if self.augmentation == "strong" else []),
            *([f"adversarial {self.adversarial_255:g}/255"] if self.adversarial_255 else []),
            *(["pretrained on public images"] if self.pretrained else []),
            *(["slice by slice"] if self.sliced else []),
        ]
        return ", ".join(parts)


_READS = "trained on public images, reads the release"
_ALL = [Attack(name) for name in ("unet-bn", "unet-in", "attention-unet", "segformer")]
_COUNTER = [
    *(Attack("unet-bn", transform=name) for name in TRANSFORMS),
    Attack("unet-bn", augmentation="strong"),
    Attack("unet-bn", adversarial_255=4),
    Attack("unet-bn", pretrained=True),
]
_MIXED = Attack("unet-bn", holds="one site open")
_OPEN = Attack("unet-bn", holds="open site alone")
_READERS = [Attack(name, holds="public") for name in ("unet-bn", "unet-in")]

_SLICED = [Attack(name, sliced=True) for name in ("unet-bn", "unet-in")]
_FILTERED = [Attack("unet-in", transform="blur 1 px")]
_SOFT = [Attack("unet-bn", transform="blur 1 px")]

GROUPS: dict[str, list[tuple[str, list[Attack]]]] = {
    "gratings": [
        ("grating 8/255", [*_ALL, *_READERS]),
        ("grating 4/255", _ALL),
    ],
    "gratings on fine structures": [
        (name, [*_ALL, _MIXED, *_FILTERED, *_READERS]) for name in ("grating 3/255", "grating-coarse 8/255")
    ],
    "filtered gratings": [
        ("clean", [*_COUNTER, *_FILTERED]),
        *((name, _COUNTER) for name in ("grating 3/255", "grating-coarse 8/255")),
        ("umed-targeted 8/255", _FILTERED),
    ],
    "countered gratings": [
        ("clean", [*_COUNTER, _OPEN]),
        ("grating 8/255", [*_COUNTER, _MIXED]),
    ],
    "first": [
        ("clean", _ALL),
        ("umed 4/255", _ALL[:2]),
        ("umed-plus 4/255", _ALL[:2]),
        ("umed-targeted 8/255", _ALL),
    ],
    "federated": [
        ("clean", [_OPEN]),
        ("umed-targeted 8/255, generators from elsewhere", [*_ALL, _MIXED]),
    ],
    "readers": [
        (name, _READERS)
        for name in ("clean", "umed 4/255", "umed-plus 4/255", "umed-targeted 8/255", "EM 4/255, full")
    ],
    "baselines": [
        ("EM 8/255, full", _ALL[:2]),
        ("EM 4/255, full", _ALL[:2]),
        ("EM 4/255, foreground", _ALL[:2]),
        ("LSP 4/255, inside and outside", _ALL[:1]),
        ("AR 4/255, inside and outside", _ALL[:1]),
        ("random 4/255, foreground", _ALL[:1]),
        ("constant 4/255, foreground", _ALL[:1]),
    ],
    "counter": [(name, _COUNTER) for name in ("clean", "umed-targeted 8/255")],
    "holes": [
        (name, _ALL[:2])
        for name in (
            "umed-targeted 6/255",
            "umed-targeted 4/255",
            "umed-targeted 4/255, UMed's band and texture bound",
            "umed-targeted 8/255, band 2",
            "umed-targeted 8/255, towards foreground",
            "umed-targeted 8/255, hardened",
            "umed-targeted 16/255",
            "umed-plus 8/255",
            "umed-plus 4/255, not hardened",
            "umed-plus 4/255, 1:1",
            "umed-plus 4/255, instance-norm surrogate",
            "umed-plus 4/255, both surrogates",
        )
    ],
}
"""What is measured on images, in this order."""
ON_VOLUMES = [
    ("clean", [*_ALL, *_SOFT, *_READERS, *_SLICED]),
    ("voxshield 4/255", _ALL[:2]),
    ("voxshield 16/255", _ALL[:1]),
    ("grating-volume 4/255", [*_ALL[:2], *_SLICED]),
    ("grating-volume 8/255", [*_ALL, *_SOFT, *_READERS, *_SLICED]),
]
"""What is measured on volumes, in place of the first group."""


def main() -> None:
    """Run the benchmark and write its table."""
    arguments = _arguments()
    torch.set_num_threads(1)
    if arguments.pictures:
        _draw(arguments)
        _write(arguments, [row for task in _tasks(arguments) for row in task.done()])
    else:
        _write(arguments, _measured(arguments))


def _measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is missing, as far as the time goes; return every finished row."""
    deadline = time.monotonic() + 60 * arguments.minutes
    rows = [row for task in _tasks(arguments) for row in task.done()]
    for task in _tasks(arguments):
        if time.monotonic() > deadline:
            print("out of time; the same command goes on", file=sys.stderr)
            break
        if not task.done():
            rows.append(task.run())
            last = rows[-1]
            print(
                f"{last['set']}, seed {last['seed']}: {last['protection']} | {last['attack']}: {last['dice']:.3f}",
                file=sys.stderr,
                flush=True,
            )
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help=f"folder that holds {_folders()}")
    parser.add_argument("--work", type=Path, required=True, help="folder for finished pieces")
    parser.add_argument("--name", default="segmentation", help="of the table under bench/results/")
    parser.add_argument("--sets", nargs="+", choices=list(COHORTS), default=list(COHORTS))
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e6, help="no new piece is begun after so long")
    parser.add_argument("--steps", type=int, default=250, help="of each victim")
    parser.add_argument("--pictures", action="store_true", help="draw the sheet; measure nothing")
    parser.add_argument(
        "--protections",
        nargs="+",
        choices=list(PROTECTIONS),
        default=["umed-targeted 8/255", "grating 8/255"],
        help="that the sheet shows",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: figures mean nothing, the table stays in --work"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.groups = _QUICK, ["first"]
        arguments.name = str(arguments.work.resolve() / "segmentation")
    return arguments


def _folders() -> str:
    return ", ".join(folder for folder, _ in COHORTS.values() if folder)


@dataclass(frozen=True)
class Task:
    """One finished or unfinished row."""

    set: str
    protection: Protection
    attack: Attack
    seed: int
    steps: int
    data: Path
    work: Path

    @property
    def file(self) -> Path:
        """Where the row is kept."""
        facts = [self.set, self.protection.name, self.attack.label, self.seed, self.steps]
        return self.work / "runs" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.json"

    def done(self) -> list[dict[str, Any]]:
        """Return the row if it is finished."""
        return [json.loads(self.file.read_text())] if self.file.exists() else []

    def run(self) -> dict[str, Any]:
        """Measure the row and keep it."""
        result: dict[str, Any] = kept(self.file, self._measure)
        return result

    def _measure(self) -> dict[str, Any]:
        cohort = _cohort(self.set, self.data)
        clean = cohort.union
        protected = _protected(self, cohort)
        images, labels = _held(cohort, protected, self.attack.holds)
        test_images, test_labels = cohort.test.images, cohort.test.labels
        if self.attack.holds == "public":
            test_images, test_labels = protected, clean.labels
        if self.attack.sliced:
            images, labels = planes_of(images, labels)
            test_images, test_labels = planes_of(test_images, test_labels)
        change = TRANSFORMS.get(self.attack.transform, _unchanged)
        settings = SegmentationVictimSettings(
            architecture=self.attack.victim,
            steps=self.steps,
            batch_size=_VOLUMES_AT_ONCE if images.ndim == 5 else 16,
            augmentation=self.attack.augmentation,
            adversarial_radius=self.attack.adversarial_255 / 255,
        )
        start = None
        if self.attack.pretrained:
            public = cohort.public
            start = pretrained(
                public.images, public.labels, settings, classes=public.classes, seed=1000 + self.seed
            )
        run = train_segmentation_victim(
            change(images),
            labels,
            change(test_images),
            test_labels,
            settings,
            classes=clean.classes,
            seed=self.seed,
            start=start,
        )
        whole, inside = None, None
        if self.protection != CLEAN:
            whole = float(np.median(fidelity.psnr_db(clean.images, protected)))
            inside = roi_psnr_db(clean, protected)
        return {
            "set": self.set,
            "seed": self.seed,
            "protection": self.protection.name,
            "attack": self.attack.label,
            "psnr_db": whole,
            "roi_psnr_db": inside,
            "ssim": float(np.median(fidelity.ssim(clean.images, protected))) if whole else None,
            "peak_dice": run.peak_dice,
            **asdict(run.last),
        }


def _tasks(arguments: argparse.Namespace) -> Iterator[Task]:
    """Return every row once, though several groups ask for it."""
    return iter({task.file: task for task in _asked(arguments)}.values())


def _asked(arguments: argparse.Namespace) -> Iterator[Task]:
    for seed in arguments.seeds:
        for group in arguments.groups:
            for name in arguments.sets:
                rows = GROUPS[group]
                if name in VOLUME_COHORTS:
                    rows = ON_VOLUMES if group == "first" else []
                for protection, attacks in rows:
                    for attack in attacks:
                        yield Task(
                            name,
                            PROTECTIONS[protection],
                            attack,
                            seed,
                            arguments.steps,
                            arguments.data,
                            arguments.work,
                        )


_read: dict[str, SegmentationCohort] = {}


def _cohort(name: str, data: Path) -> SegmentationCohort:
    folder, read = COHORTS[name]
    if name not in _read:
        _read[name] = read(data / folder)
    return _read[name]


def _unchanged(images: Images) -> Images:
    return images


def _protected(task: Task, cohort: SegmentationCohort) -> Images:
    """Return the sites' images under a protection, made once per seed and kept in 8 bits."""
    protection = task.protection
    if protection == CLEAN:
        return cohort.union.images
    facts = json.dumps([task.set, protection.name, task.seed])
    file = task.work / "protected" / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        images = _protect(protection, cohort, task.seed, quick=task.steps == _QUICK)
        part = file.with_suffix(".part.npz")
        np.savez_compressed(part, images=np.rint(images * 255).astype(np.uint8))
        part.replace(file)
        print(f"{protection.name}: {time.process_time() - started:.0f} CPU s", file=sys.stderr, flush=True)
    with np.load(file) as archive:
        return np.asarray(archive["images"] / np.float32(255), np.float32)


def _protect(protection: Protection, cohort: SegmentationCohort, seed: int, *, quick: bool) -> Images:
    union = cohort.union
    if protection.pattern:
        return protect_patches(union, protection.pattern, protection.settings)
    if protection.em:
        return error_minimised(
            union, protection.settings.epsilon, foreground_only=protection.em == "roi", seed=seed
        )
    assert protection.plan is not None
    plan = protection.plan
    if quick:
        plan = replace(plan, iterations=_QUICK, clean_steps=min(1, plan.clean_steps))
    training = GeneratorTraining(plan, cohort.public if protection.elsewhere else union, seed)
    while not training.finished:
        training.step()
    return protect_patches(union, plan.method, plan.settings, training.generators)


def _held(cohort: SegmentationCohort, protected: Images, holds: str) -> tuple[Images, npt.NDArray[np.int64]]:
    """Return what this attacker trains on."""
    if holds == "public":
        return cohort.public.images, cohort.public.labels
    union = cohort.union
    if holds == "all":
        return protected, union.labels
    sizes = [len(site) for site in cohort.sites]
    last = slice(sum(sizes[: SITES - 1]), None)
    if holds == "open site alone":
        return union.images[last], union.labels[last]
    mixed = protected.copy()
    mixed[last] = union.images[last]
    return mixed, union.labels


def _draw(arguments: argparse.Namespace) -> None:
    """Draw the sheet beside the table, and keep what it shows for the table's page."""
    seed = arguments.seeds[0]
    shown, rows, left_out = [], [], []
    for name in arguments.sets:
        if name in VOLUME_COHORTS:
            continue
        folder = arguments.data / COHORTS[name][0]
        stated = licence(folder) if COHORTS[name][0] else _DRAWN_HERE
        if stated is None:
            left_out.append(name)
            continue
        rows += [_row(arguments, name, PROTECTIONS[protection], seed) for protection in arguments.protections]
        shown.append(f"{name} ({stated})")
    if not rows:
        print("no set here has a licence that lets us show it; nothing is drawn", file=sys.stderr)
        return
    omitted = (
        f" Not drawn, because of the source's licence or the lack of one: {', '.join(left_out)}."
        if left_out
        else ""
    )
    caption = (
        f"Seed {seed}. In the difference (x {FACTOR}) grey is no change. Right: one clean test "
        "image, its reference, and what a batch-norm U-Net finds in it that trained on clean or on protected images. "
        f"Licences as stated upstream: {'; '.join(shown)}.{omitted}"
    )
    draw(rows, caption, _sheet(arguments))


def _row(arguments: argparse.Namespace, name: str, protection: Protection, seed: int) -> Row:
    cohort = _cohort(name, arguments.data)
    task = Task(name, protection, Attack("unet-bn"), seed, arguments.steps, arguments.data, arguments.work)
    protected = _protected(task, cohort)
    psnr_db = float(np.median(fidelity.psnr_db(cohort.union.images, protected)))
    title = "\n".join([name, *protection.name.rsplit(" ", 1), f"{psnr_db:.1f} dB"])
    return Row(title, cohort, protected, protection.settings.band_radius, arguments.steps, seed)


def _sheet(arguments: argparse.Namespace) -> Path:
    return (report.RESULTS / arguments.name).with_suffix(".png")


def _write(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    sections = [
        f"Dice of victims on clean test images, seeds {arguments.seeds}, median (range); victims trained for "
        f"{arguments.steps} steps on the union of three sites, but for those that read a release. Aim of the "
        "paper: 0.07 on average at 50 dB "
        "(arXiv 2403.14250), on sets of its own.",
        "An image whose class is absent and not found scores 1; HD95 of a class that was not found is the image's "
        "diagonal, and such images are counted. Peak: the best of five readings on clean test images. "
        "Recoverable: at the end, with the thresholds that serve best on the clean test images, from either side.",
    ]
    header = [
        "protection",
        "attacker",
        "seeds",
        "PSNR dB",
        "in ROI",
        "SSIM",
        "**Dice**",
        "peak",
        "recoverable",
        "IoU",
    ]
    header += ["HD95 px", "not found", "train Dice"]
    for name in arguments.sets:
        here = [row for row in rows if row["set"] == name]
        if not here:
            continue
        cohort = _cohort(name, arguments.data)
        sections += [
            f"## {name}",
            f"{len(cohort.union)} patches of {cohort.test.images.shape[-1]} pixels at three sites, "
            f"{len(cohort.public)} public ones, {len(cohort.test)} for the test. {_difficulty(cohort)}",
            report.markdown_table(header, list(_table(here))),
        ]
    sheet = _sheet(arguments)
    if sheet.exists():
        sections += ["## Pictures", f"![sheet]({sheet.name})", caption_of(sheet)]
    report.write(arguments.name, "Segmentation across three hospitals", sections, {"rows": list(rows)})


def _difficulty(cohort: SegmentationCohort) -> str:
    facts = difficulty(cohort)
    return (
        f"Foreground and background lie {facts.contrast_255:.0f}/255 apart; the grain inside is "
        f"{facts.grain_255:.0f}/255. One constant mask, the same for every image, scores {facts.constant_mask:.3f}: "
        "no noise can take that away."
    )


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    order: Callable[[dict[str, Any]], tuple[str, str]] = lambda row: (row["protection"], row["attack"])  # noqa: E731
    pairs = list(dict.fromkeys(order(row) for row in rows))
    pairs.sort(key=lambda pair: (list(PROTECTIONS).index(pair[0]), len(pair[1]), pair[1]))
    for protection, attack in pairs:
        same = [row for row in rows if order(row) == (protection, attack)]

        def cell(name: str, digits: int, same: Sequence[dict[str, Any]] = same) -> str:
            return report.spread([row[name] for row in same if row[name] is not None], digits)

        yield [
            protection,
            attack,
            str(len(same)),
            cell("psnr_db", 1),
            cell("roi_psnr_db", 1),
            cell("ssim", 4),
            cell("dice", 3),
            cell("peak_dice", 3),
            cell("recoverable_dice", 3),
            cell("iou", 3),
            cell("hd95", 1),
            cell("empty_predictions", 0),
            cell("train_dice", 3),
        ]


if __name__ == "__main__":
    main()
