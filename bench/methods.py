"""Methods side by side: what do victims learn from the same images, protected in every way that medveil knows?

    python bench/methods.py --data pneumoniamnist.npz --work /tmp/methods

The images are those of the three sites of ``bench/classification.py`` (a drawn subset, to keep the time). Frozen
methods ask surrogates trained on the public third; co-trained ones train their own on the images themselves.
Surrogates, noise and victims all change with the seed. Finished pieces are kept in the work folder, so the
benchmark can be killed and continued.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import cohort
import report
from medveil.models import methods
from medveil.models.audit.victims import VictimSettings, train_victim
from medveil.models.methods import (
    Batch,
    CoTraining,
    EnsembleOracle,
    FloatArray,
    GradientOracle,
    SalmSettings,
    Settings,
    TrainableOracle,
)
from medveil.models.methods.ar import ArSettings
from medveil.models.methods.base import MaskScore
from medveil.models.methods.em import EmSettings
from medveil.models.methods.em_classwise import ClasswiseSettings
from medveil.models.methods.lsp import LspSettings
from medveil.models.methods.projection import stored_steps
from medveil.models.methods.randomness import generator_for
from medveil.models.methods.rem import RemSettings
from medveil.models.methods.tap import TapSettings
from medveil.models.quality import fidelity
from medveil.models.training import Examples, Member, TorchOracle, TrainableTorchOracle, fit

EPSILON = 8 / 255
MASK = 0.3
"""The mask size at which scores are compared: the smallest that kept its effect in the prototype (DESIGN 4)."""

Asks = Literal["nothing", "one", "ensemble", "training"]


@dataclass(frozen=True)
class Row:
    """One way to protect.

    Attributes:
        label: in the table.
        method: name in the registry; "clean" for no noise, "uniform" for random noise.
        settings: of the method; the seed is set per run.
        asks: what the method asks: one frozen surrogate, the frozen ensemble, or a model that it trains.
    """

    label: str
    method: str
    settings: Settings
    asks: Asks = "nothing"


@dataclass(frozen=True)
class Scale:
    """How much of everything: the benchmark proper, or a smoke run.

    Attributes:
        images: drawn from the three sites' union; also the most public and test images in use.
        surrogate_epochs: of every frozen surrogate.
        victim_epochs: of every victim.
        rounds: turns of model and noise in co-training; class-wise EM makes half as many again.
        steps: of the noise, per turn or in all, each of ``2 / steps`` of epsilon (REM family: 10 of a fifth).
        tap_steps: of TAP.
        ensemble: architectures; the first is also the single surrogate and the co-trained one.
    """

    images: int = 1500
    surrogate_epochs: int = 8
    victim_epochs: int = 10
    rounds: int = 8
    steps: int = 10
    tap_steps: int = 50
    ensemble: tuple[str, ...] = ("resnet", "vgg")


FULL = Scale()
QUICK = Scale(
    80, surrogate_epochs=2, victim_epochs=1, rounds=1, steps=2, tap_steps=3, ensemble=("resnet", "mlp")
)

VICTIMS = (("MobileNet", "mobilenet"), ("Inception", "inception"))
MASK_SCORES: tuple[tuple[MaskScore, str], ...] = (
    ("gradient", "single gradient"),
    ("window", "window of most gradient"),
    ("texture", "texture"),
    ("random", "random"),
    ("lowest", "lowest gradient"),
)
"""Beside the recipe's own score, the accumulated gradient."""


def rows(scale: Scale) -> tuple[list[Row], list[Row]]:
    """Return the methods, and the federated recipe under several masks; its own is in both."""
    training = CoTraining(rounds_min=scale.rounds, rounds_max=scale.rounds)
    classwise = replace(
        training, rounds_min=scale.rounds + scale.rounds // 2, rounds_max=scale.rounds + scale.rounds // 2
    )
    step = min(2.0, 2 / scale.steps)
    frozen = SalmSettings(mask_ratio=MASK, steps=scale.steps, step_size=step)
    # At the authors' size REM costs 55 gradients a step and takes longer than all else together.
    half = max(1, scale.steps // 2)
    rem = RemSettings(
        steps=half, step_size=min(2.0, 2 / half), samples=1, adversary_steps=2, training=training
    )
    table = [
        Row("clean", "clean", Settings()),
        Row("uniform noise", "uniform", Settings()),
        Row("LSP", "lsp", LspSettings()),
        Row("AR", "ar", ArSettings()),
        Row(
            "EM, sample-wise",
            "em",
            EmSettings(steps=scale.steps, step_size=step, training=training),
            "training",
        ),
        Row("EM, class-wise", "em-classwise", ClasswiseSettings(training=classwise), "training"),
        Row("REM", "rem", rem, "training"),
        Row(
            "TAP, one surrogate",
            "tap",
            TapSettings(steps=scale.tap_steps, step_size=2 / scale.tap_steps),
            "one",
        ),
        Row(f"SALM, bi-level, mask {MASK:g}", "salm", replace(frozen, training=training), "training"),
        Row("federated recipe, mask 1", "salm", replace(frozen, mask_ratio=1.0), "ensemble"),
        Row(f"federated recipe, mask {MASK:g}", "salm", frozen, "ensemble"),
    ]
    others = [
        Row(label, "salm", replace(frozen, mask_score=score), "ensemble") for score, label in MASK_SCORES
    ]
    return table, [table[-1], *others]


# --- What is asked ------------------------------------------------------------------------------------------


class Counted:
    """An oracle that counts the image gradients it was asked for (an ensemble's members count one by one)."""

    def __init__(self, oracle: GradientOracle | TrainableOracle) -> None:
        self._oracle: Any = oracle
        self.gradients = 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self._oracle.input_shape)

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return int(self._oracle.classes)

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Count, and ask."""
        self.gradients += len(images)
        losses, gradient = self._oracle.loss_and_gradient(images, targets)
        return losses, gradient

    def train_step(self, images: FloatArray, targets: FloatArray) -> float:
        """Pass on; steps of the model are not counted."""
        return float(self._oracle.train_step(images, targets))


def surrogate_net(work: Path, scale: Scale, architecture: str, public: Examples, seed: int) -> nn.Module:
    """Return a net trained on the public images; kept in the work folder."""
    member = Member(name=architecture, architecture=architecture, epochs=scale.surrogate_epochs)
    net = fit.new_net(architecture, public, seed)
    file = work / "surrogates" / f"{digest(repr(member), str(seed), public.images)}.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
    else:
        optimiser = fit.new_optimiser(net, architecture)
        for epoch in range(member.epochs):
            fit.train_epoch(net, optimiser, public, member, epoch=epoch, epochs=member.epochs, seed=seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")  # two workers may train the same one
        torch.save(net.state_dict(), part)
        part.replace(file)
    return net.eval()


# --- One row, one seed --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """What all rows share: public images, the images to protect, clean test images."""

    public: Examples
    private: Examples
    test: Examples

    @classmethod
    def of(cls, file: Path, limit: int) -> Data:
        """Return at most `limit` images of each part, drawn once and for all."""
        dealt = cohort.deal(file)
        rng = np.random.default_rng(cohort.SPLIT_SEED)
        classes = int(dealt.union.classes.max()) + 1

        def examples(part: cohort.Part) -> Examples:
            index = np.sort(rng.permutation(len(part.labels))[:limit])
            return Examples(cohort.planes(part.images[index]), part.classes[index], classes)

        return cls(examples(dealt.public), examples(dealt.union), examples(dealt.test))


def perturb(row: Row, data: Data, work: Path, scale: Scale, seed: int) -> tuple[FloatArray, int]:
    """Return a row's noise and how many image gradients it asked for."""
    private = data.private
    keys = tuple(hashlib.sha256(image.tobytes()).digest() for image in private.images)
    batch = Batch(private.images, private.labels, keys)
    if row.method == "clean":
        return np.zeros_like(batch.images), 0
    if row.method == "uniform":
        shape = batch.images.shape[1:]
        draws = [generator_for(key, seed, "uniform").uniform(-EPSILON, EPSILON, shape) for key in keys]
        return np.stack(draws).astype(np.float32), 0
    method, settings = methods.get(row.method), replace(row.settings, seed=seed)
    if row.asks == "nothing":
        return method.perturb(batch, None, settings), 0
    if row.asks == "training":
        net = fit.new_net(scale.ensemble[0], private, seed)
        trained = Counted(TrainableTorchOracle(net, batch.images.shape[1:], private.classes))
        return method.protect_set(batch, trained, settings), trained.gradients
    names = scale.ensemble if row.asks == "ensemble" else scale.ensemble[:1]
    shape, public = batch.images.shape[1:], data.public
    nets = [surrogate_net(work, scale, name, public, seed) for name in names]
    members = [Counted(TorchOracle(net, shape, public.classes)) for net in nets]
    delta = method.perturb(batch, EnsembleOracle(members), settings)
    return delta, sum(member.gradients for member in members)


def measure(row: Row, file: Path, work: Path, scale: Scale, seed: int) -> dict[str, Any]:
    """Protect the images in one way under one seed, train the victims, and return the figures (kept, if there)."""
    torch.set_num_threads(1)
    data = Data.of(file, scale.images)
    version = 0 if row.method in ("clean", "uniform") else methods.get(row.method).info.version
    key = digest(
        row.method, str(version), repr(row.settings), row.asks, repr(scale), str(seed), data.private.images
    )

    def compute() -> dict[str, Any]:
        started = time.perf_counter()
        delta, gradients = perturb(row, data, work, scale, seed)
        seconds = time.perf_counter() - started
        images = stored_steps(data.private.images, delta, EPSILON)
        psnr = float(np.median(fidelity.psnr_db(data.private.images, images)))
        return {
            "seconds": seconds,
            "gradients_per_image": gradients / len(images),
            "psnr_db": psnr if np.isfinite(psnr) else None,
            "changed_share": float(np.mean(fidelity.changed_share(data.private.images, images))),
            "largest_change_255": float(255 * np.max(fidelity.max_change(data.private.images, images))),
            "victims": {name: victim(name, data, images, scale, seed) for _, name in VICTIMS},
        }

    return {"seed": seed, **cohort.kept(work / "rows" / f"{key}.json", compute)}


def victim(
    architecture: str, data: Data, images: FloatArray, scale: Scale, seed: int
) -> list[dict[str, float]]:
    """Train one victim on released images and return its scores on clean ones, epoch by epoch."""
    run = train_victim(
        images,
        data.private.labels,
        data.test.images,
        data.test.labels,
        VictimSettings(architecture=architecture, epochs=scale.victim_epochs),
        classes=data.private.classes,
        seed=seed,
    )
    return [scores.as_dict() for scores in run.history]


def digest(*parts: str | FloatArray) -> str:
    """Return a name for what was made of these parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0" if isinstance(part, str) else part.tobytes())
    return digest.hexdigest()[:24]


# --- The table ----------------------------------------------------------------------------------------------


def main() -> None:
    """Run the benchmark and write its table."""
    arguments = _arguments()
    scale = QUICK if arguments.quick else FULL
    table, masks = rows(scale)
    wanted = [(row, seed) for seed in arguments.seeds for row in dict.fromkeys([*table, *masks])]
    results = dict(_measured(wanted, arguments, scale))
    _write(arguments, scale, table, masks, results)


def _arguments() -> argparse.Namespace:
    parser = cohort.new_parser(__doc__)
    parser.add_argument("--workers", type=int, default=1, help="rows worked on at once, one thread each")
    return parser.parse_args()


def _measured(
    wanted: Sequence[tuple[Row, int]], arguments: argparse.Namespace, scale: Scale
) -> Iterator[tuple[tuple[Row, int], dict[str, Any]]]:
    arguments.work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        waiting = {
            pool.submit(measure, row, arguments.data, arguments.work, scale, seed): (row, seed)
            for row, seed in wanted
        }
        for number, done in enumerate(as_completed(waiting), start=1):
            row, seed = waiting[done]
            print(f"{number}/{len(wanted)} {row.label}, seed {seed}", file=sys.stderr, flush=True)
            yield (row, seed), done.result()


def _noise_cells(label: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    psnr = [run["psnr_db"] for run in runs if run["psnr_db"] is not None]
    return [
        label,
        report.spread(psnr, 1),
        f"{100 * np.mean([run['changed_share'] for run in runs]):.0f} %",
        f"{max(run['largest_change_255'] for run in runs):.0f}/255",
        f"{np.mean([run['gradients_per_image'] for run in runs]):.0f}",
        report.spread([run["seconds"] for run in runs], 0),
    ]


def _victim_cells(label: str, runs: Sequence[dict[str, Any]]) -> Iterable[list[str]]:
    for title, name in VICTIMS:
        yield [
            label,
            title,
            *(report.spread([pick(run["victims"][name]) for run in runs]) for _, pick in cohort.COLUMNS),
        ]


def _section(shown: Sequence[Row], arguments: argparse.Namespace, results: dict[Any, Any]) -> list[str]:
    by_row = [(row.label, [results[row, seed] for seed in arguments.seeds]) for row in shown]
    return [
        report.markdown_table(
            [
                "noise",
                "PSNR dB, median",
                "pixels changed",
                "largest change",
                "gradients per image",
                "seconds",
            ],
            [_noise_cells(label, runs) for label, runs in by_row],
        ),
        report.markdown_table(
            ["noise", "victim", *(name for name, _ in cohort.COLUMNS)],
            [cells for label, runs in by_row for cells in _victim_cells(label, runs)],
        ),
    ]


def _write(
    arguments: argparse.Namespace,
    scale: Scale,
    table: Sequence[Row],
    masks: Sequence[Row],
    results: dict[tuple[Row, int], dict[str, Any]],
) -> None:
    data = Data.of(arguments.data, scale.images)
    about = (
        f"The same {len(data.private)} images of the three sites (a drawn subset), epsilon 8/255 in stored integers, "
        f"{len(data.test)} clean test images; seeds {arguments.seeds}: median (range) over surrogates, noise and "
        "victims of another seed each."
    )
    budget = (
        f"Frozen methods ask {' + '.join(scale.ensemble)} (TAP only {scale.ensemble[0]}), trained on "
        f"{len(data.public)} public images for {scale.surrogate_epochs} epochs; co-trained ones a "
        f"{scale.ensemble[0]} on the images themselves, {scale.rounds} rounds. Smaller than "
        f"published, to keep the time: TAP {scale.tap_steps} steps, EM and SALM {scale.steps} steps a round, REM "
        "half as many with one view and 2 steps of attack."
    )
    recoverable = (
        "Recoverable: balanced accuracy and AUC, the best over label permutations and after calibration on 50 clean "
        "labelled images; 0.50 is chance. Peak: the best epoch on clean images. Gradients: of all surrogates."
    )
    sections = [about, budget, recoverable, "## Methods", *_section(table, arguments, results)]
    sections += [
        f"## The federated recipe under other masks of {MASK:g} (its own: accumulated gradient)",
        *_section(masks, arguments, results),
    ]
    figures = {
        group: [
            {"label": row.label, "runs": [results[row, seed] for seed in arguments.seeds]} for row in shown
        ]
        for group, shown in (("methods", table), ("masks", masks))
    }
    # An absolute name takes the table out of bench/results: a smoke run's figures are no result.
    name = str(arguments.work.resolve() / "methods") if arguments.quick else "methods"
    report.write(name, "Methods on the same images", sections, figures)


if __name__ == "__main__":
    main()
