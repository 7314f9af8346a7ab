"""A noise generator beside the optimiser it is distilled from: images per second, and what victims learn.

    python bench/generator.py --data pneumoniamnist.npz --work /tmp/methods

Both make noise for the images of ``bench/methods.py`` from the same surrogates, under the same budget and mask: the
optimiser with 8 warm-up and 10 projected steps per image, the generator in one pass. Both run as at a site, in
onnxruntime on one thread, and the optimiser in torch eager too. Finished pieces are kept in the work folder (it may
be the one of ``bench/methods.py``: surrogates are shared).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cohort
import methods as side_by_side
import report
from medveil.agent.engine import OnnxGenerator, OnnxOracle, Resources
from medveil.models import methods
from medveil.models.autodiff.sandbox import admit_in_child
from medveil.models.export import to_onnx
from medveil.models.methods import Batch, EnsembleOracle, FloatArray, SalmSettings
from medveil.models.methods.generated import from_perturbation
from medveil.models.methods.projection import stored_steps
from medveil.models.methods.targets import objective_for
from medveil.models.quality import fidelity
from medveil.models.training import TorchOracle, fit
from medveil.models.training.generator import GeneratorSettings, generator_to_onnx, train_generator

RECIPE = SalmSettings(mask_ratio=side_by_side.MASK, steps=10, step_size=0.2)
"""PGD-10 as in the REM family, after SALM's 8 warm-up steps."""
ROUNDS = 5
"""Times every candidate is timed, in turns, so that a busy machine is busy for all of them."""


@dataclass(frozen=True)
class Scale:
    """How much of everything: the benchmark proper, or a smoke run.

    Attributes:
        base: shared with ``bench/methods.py``.
        generators: what is compared, by name in the table.
        timed_images: per timing.
    """

    base: side_by_side.Scale
    generators: tuple[tuple[str, GeneratorSettings], ...]
    timed_images: int


FULL = Scale(
    side_by_side.FULL,
    (
        ("generator, amortised", GeneratorSettings()),
        ("generator, amortised + imitation", GeneratorSettings(imitation=1.0)),
    ),
    timed_images=256,
)
QUICK = Scale(
    side_by_side.QUICK, (("generator, amortised", GeneratorSettings(epochs=1, width=4)),), timed_images=16
)

Protect = Callable[[Batch], FloatArray]


class Candidates:
    """Everything that makes noise under one seed, opened as a site would; a trained generator is kept."""

    def __init__(self, data: side_by_side.Data, work: Path, scale: Scale, seed: int) -> None:
        self._data, self._work, self._scale, self._seed = data, work, scale, seed
        self._shape = data.public.images.shape[1:]
        self._nets = [
            side_by_side.surrogate_net(work, scale.base, name, data.public, seed)
            for name in scale.base.ensemble
        ]
        self._resources = Resources("cpu", 1, 1 << 30)
        members = [
            OnnxOracle("surrogate", admit_in_child(to_onnx(net, self._shape)), self._resources)
            for net in self._nets
        ]
        self._site = EnsembleOracle(members)
        self._eager = EnsembleOracle(
            [TorchOracle(net, self._shape, data.public.classes) for net in self._nets]
        )

    def optimiser(self, batch: Batch) -> FloatArray:
        """PGD on ONNX gradient graphs."""
        return methods.get("salm").perturb(batch, self._site, RECIPE)

    def optimiser_in_torch(self, batch: Batch) -> FloatArray:
        """The same in torch eager."""
        return methods.get("salm").perturb(batch, self._eager, RECIPE)

    def generator(self, settings: GeneratorSettings) -> tuple[Protect, float]:
        """Return a generator as the site runs it, and the seconds that its training took."""
        public = self._data.public
        names = repr((settings, RECIPE, self._scale.base))
        file = (
            self._work / "generators" / f"{side_by_side.digest(names, str(self._seed), public.images)}.onnx"
        )

        def train() -> dict[str, float]:
            started = time.perf_counter()
            teacher = self.optimiser(_batch(public)) if settings.imitation else None
            net = train_generator(self._nets, public, RECIPE, settings, seed=self._seed, teacher=teacher)
            seconds = time.perf_counter() - started
            file.write_bytes(generator_to_onnx(net, self._shape, public.classes))
            return {"seconds": seconds}

        seconds = float(cohort.kept(file.with_suffix(".json"), train)["seconds"])
        session = OnnxGenerator(admit_in_child(file.read_bytes(), role="generator"), self._resources)

        def protect(batch: Batch) -> FloatArray:
            aims = objective_for("permuted", batch, public.classes, RECIPE).targets
            return from_perturbation(batch, session.perturbation(batch.images, aims), RECIPE)

        return protect, seconds


def _batch(examples: fit.Examples) -> Batch:
    keys = tuple(hashlib.sha256(image.tobytes()).digest() for image in examples.images)
    return Batch(examples.images, examples.labels, keys)


def measure(arguments: argparse.Namespace, scale: Scale, seed: int) -> dict[str, Any]:
    """Return protection and speed of every candidate under one seed."""
    data = side_by_side.Data.of(arguments.data, scale.base.images)
    candidates = Candidates(data, arguments.work, scale, seed)
    protect: dict[str, Protect] = {"PGD-10, site engine": candidates.optimiser}
    training_s = {}
    for name, settings in scale.generators:
        protect[name], training_s[name] = candidates.generator(settings)
        _say(f"seed {seed}: {name} trained in {training_s[name]:.0f} s")
    batch = _batch(data.private)
    found = {}
    for name, make in [("clean", lambda b: np.zeros_like(b.images)), *protect.items()]:
        images = stored_steps(data.private.images, make(batch), side_by_side.EPSILON)
        found[name] = _protection(images, data, arguments.work, scale.base, seed)
        _say(f"seed {seed}: {name} measured")
    timed = protect | {"PGD-10, torch eager": candidates.optimiser_in_torch}
    return {
        "seed": seed,
        "protection": found,
        "training_s": training_s,
        "images_per_s": _speeds(timed, batch, scale),
    }


def _protection(
    images: FloatArray, data: side_by_side.Data, work: Path, scale: side_by_side.Scale, seed: int
) -> dict[str, Any]:
    """Return figures of one release; victims' runs are kept by the images they trained on."""
    before = data.private.images
    psnr = float(np.median(fidelity.psnr_db(before, images)))
    key = side_by_side.digest(repr(scale), str(seed), images)
    names = [name for _, name in side_by_side.VICTIMS]
    return {
        "psnr_db": psnr if np.isfinite(psnr) else None,
        "changed_share": float(np.mean(fidelity.changed_share(before, images))),
        "largest_change_255": float(255 * np.max(fidelity.max_change(before, images))),
        "victims": cohort.kept(
            work / "victims" / f"{key}.json",
            lambda: {name: side_by_side.victim(name, data, images, scale, seed) for name in names},
        ),
    }


def _speeds(candidates: dict[str, Protect], batch: Batch, scale: Scale) -> dict[str, list[float]]:
    """Return images per second of every candidate, once per round, taking turns."""
    batch = batch.select(np.arange(min(scale.timed_images, len(batch))))
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    for make in candidates.values():
        make(batch.select(np.arange(2)))  # sessions and torch pay for their start here
    for _ in range(ROUNDS):
        for name, make in candidates.items():
            started = time.perf_counter()
            make(batch)
            speeds[name].append(len(batch) / (time.perf_counter() - started))
    return speeds


def main() -> None:
    """Run the benchmark and write its table."""
    arguments = _arguments()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    scale = QUICK if arguments.quick else FULL
    _write(arguments, scale, [measure(arguments, scale, seed) for seed in arguments.seeds])


def _arguments() -> argparse.Namespace:
    return cohort.new_parser(__doc__).parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(arguments: argparse.Namespace, scale: Scale, runs: Sequence[dict[str, Any]]) -> None:
    speeds = {
        name: [speed for run in runs for speed in run["images_per_s"][name]]
        for name in runs[0]["images_per_s"]
    }
    reference = np.median(speeds["PGD-10, site engine"])
    speed_rows = [
        [
            name,
            report.spread(values, 0),
            f"{np.median(values) / reference:.1f}x",
            report.spread([run["training_s"][name] for run in runs], 0)
            if name in runs[0]["training_s"]
            else "-",
        ]
        for name, values in speeds.items()
    ]
    noise_rows, victim_rows = [], []
    for name in runs[0]["protection"]:
        found = [run["protection"][name] for run in runs]
        psnr = [f["psnr_db"] for f in found if f["psnr_db"] is not None]
        changed = f"{100 * np.mean([f['changed_share'] for f in found]):.0f} %"
        largest = f"{max(f['largest_change_255'] for f in found):.0f}/255"
        noise_rows.append([name, report.spread(psnr, 1), changed, largest])
        for title, victim in side_by_side.VICTIMS:
            cells = [report.spread([pick(f["victims"][victim]) for f in found]) for _, pick in cohort.COLUMNS]
            victim_rows.append([name, title, *cells])
    sections = [
        f"Surrogates: {' + '.join(scale.base.ensemble)}, trained on the public third; at most {scale.base.images} "
        f"images of the three sites protected; epsilon 8/255, mask {RECIPE.mask_ratio:g}; seeds {arguments.seeds} "
        "(surrogates, generator and victims): median (range).",
        f"## Images per second, one thread, {ROUNDS} turns per seed with {scale.timed_images} images each",
        report.markdown_table(["noise by", "images/s", "of PGD-10", "training, s"], speed_rows),
        "PGD-10 includes its 8 warm-up steps for the mask; the generator includes its masking in NumPy. Training is "
        "paid once, by the coordinator.",
        "## What it looks like",
        report.markdown_table(
            ["noise by", "PSNR dB, median", "pixels changed", "largest change"], noise_rows
        ),
        "## What victims learn",
        report.markdown_table(["noise by", "victim", *(name for name, _ in cohort.COLUMNS)], victim_rows),
    ]
    name = str(arguments.work.resolve() / "generator") if arguments.quick else "generator"
    report.write(name, "A distilled noise generator beside its optimiser", sections, {"runs": list(runs)})


if __name__ == "__main__":
    main()
