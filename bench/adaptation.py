"""Local adaptation: is a campaign better protected when each site teaches the surrogates its own images first?

    python bench/adaptation.py --data pneumoniamnist.npz --bundle public.medveil --work /tmp/adaptation

Three sites of unequal size and unlike shares of the classes protect their images with one bundle, whose surrogates
were trained on the public third (``bench/classification.py`` leaves it in its work folder). Once all sites' images
look like the public ones, once each site has its own detector curve. Noise comes from the bundle's surrogates as they
are, or from each site's own adapted ones; victims train on the union and are scored on clean images of all looks.
Finished pieces are kept in the work folder.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import cohort
import report
from medveil.agent.adaptation import AdaptationSettings, adapt
from medveil.agent.engine import open_oracle
from medveil.models import methods
from medveil.models.audit.victims import VictimSettings, train_victim
from medveil.models.bundle import Bundle, open_bundle
from medveil.models.methods import Batch, FloatArray, GradientOracle
from medveil.models.methods.projection import stored_steps
from medveil.models.quality import fidelity

SIZES = (500, 300, 200)
"""Images per site; our choice: no two alike, and small enough to be measured in minutes."""
SECOND_CLASS = (0.9, 0.7, 0.4)
"""Share of the second class at each site."""
CURVES = (1.0, 1.8, 0.6)
"""Exponent of each site's detector curve, where they have their own: as it is, darker, brighter."""
LOOKS = {"one look": (1.0, 1.0, 1.0), "a look each": CURVES}
HOW = ("clean", "bundle's surrogates", "adapted surrogates")
VICTIMS = (("MobileNet", "mobilenet"), ("Inception", "inception"))
RESOURCES: dict[str, Any] = {"device": "cpu", "threads": 1, "memory_budget_bytes": 2**30}


@dataclass(frozen=True, eq=False)
class Site:
    """One hospital's clean images ``(N, C, H, W)`` in [0, 1], on the 8-bit grid, and their classes."""

    images: FloatArray
    labels: npt.NDArray[np.int64]


def sites_of(dealt: cohort.Cohort, curves: Sequence[float], scale: float) -> list[Site]:
    """Deal the private images out: sizes, class shares and looks differ."""
    union, rng = dealt.union, np.random.default_rng(cohort.SPLIT_SEED)
    pools = [list(rng.permutation(np.flatnonzero(union.classes == label))) for label in (0, 1)]
    sites = []
    for size, share, curve in zip(SIZES, SECOND_CLASS, curves, strict=True):
        second = round(scale * size * share)
        chosen = [pools[1].pop() for _ in range(second)]
        chosen += [pools[0].pop() for _ in range(round(scale * size) - second)]
        index = np.sort(np.array(chosen))
        sites.append(Site(seen(cohort.planes(union.images[index]), curve), union.classes[index]))
    return sites


def test_of(dealt: cohort.Cohort, curves: Sequence[float]) -> Site:
    """Return the clean test images, each of them seen by one of the sites' detectors."""
    turn = np.arange(len(dealt.test.labels)) % len(curves)
    images = cohort.planes(dealt.test.images)
    parts = [seen(images[turn == number], curve) for number, curve in enumerate(curves)]
    order = np.argsort(turn, kind="stable")
    return Site(np.concatenate(parts), dealt.test.classes[order])


def seen(images: FloatArray, curve: float) -> FloatArray:
    """Return images as a detector of that curve stores them, in 8 bits."""
    return np.asarray(np.rint(255 * images**curve) / np.float32(255), np.float32)


def noisy(site: Site, oracle: GradientOracle, bundle: Bundle) -> FloatArray:
    """Return a site's protected images."""
    recipe = bundle.manifest.recipe
    keys = tuple(hashlib.sha256(image.tobytes()).digest() for image in site.images)
    settings = recipe.method_settings()
    delta = methods.get(recipe.method).perturb(Batch(site.images, site.labels, keys), oracle, settings)
    return stored_steps(site.images, delta, recipe.epsilon_255 / 255)


def right(oracle: GradientOracle, site: Site) -> float:
    """Return the share of images on which the surrogates, together, give the true class less than one bit of loss."""
    targets = np.eye(2, dtype=np.float32)[site.labels]
    return float((oracle.loss_and_gradient(site.images, targets)[0] < np.log(2)).mean())


def measure(arguments: argparse.Namespace, look: str, how: str, seed: int) -> dict[str, Any]:
    """Protect at every site in one way, and return what victims learn of the union."""
    torch.set_num_threads(1)
    bundle = open_bundle(arguments.bundle, trusted=None)
    dealt = cohort.deal(arguments.data)
    sites = sites_of(dealt, LOOKS[look], arguments.scale)
    graphs = [(g.name, bundle.graph(g.name), bundle.golden(g.name)) for g in bundle.manifest.surrogates]
    released, accuracy, seconds = [], [], 0.0
    for site in sites:
        if how == "clean":
            released.append(site.images)
            continue
        started = time.process_time()
        own = graphs
        if how.startswith("adapted"):
            adapted = adapt(graphs, site.images, site.labels, AdaptationSettings(seed=seed), **RESOURCES)
            own = [(name, data, None) for (name, _, _), data in zip(graphs, adapted, strict=True)]
        oracle = open_oracle(own, **RESOURCES)
        seconds += time.process_time() - started
        accuracy.append(right(oracle, site))
        released.append(noisy(site, oracle, bundle))
    clean, union = np.concatenate([site.images for site in sites]), np.concatenate(released)
    labels = np.concatenate([site.labels for site in sites])
    test = test_of(dealt, LOOKS[look])
    psnr = float(np.median(fidelity.psnr_db(clean, union)))
    runs = {}
    for _, name in VICTIMS:
        victim = VictimSettings(architecture=name, epochs=arguments.epochs)
        run = train_victim(union, labels, test.images, test.labels, victim, classes=2, seed=seed)
        runs[name] = [scores.as_dict() for scores in run.history]
    return {
        "psnr_db": psnr if np.isfinite(psnr) else None,
        "surrogates_right": accuracy,
        "opening_cpu_s": seconds,
        "victims": runs,
    }


def main() -> None:
    """Measure, and write the table."""
    arguments = _arguments()
    runs = [(look, how, seed) for seed in arguments.seeds for look in LOOKS for how in HOW]
    _write(arguments, [_kept(arguments, *run) for run in runs])


def _kept(arguments: argparse.Namespace, look: str, how: str, seed: int) -> dict[str, Any]:
    changes = repr(AdaptationSettings()) if how.startswith("adapted") else ""
    parts = (look, how, seed, arguments.scale, arguments.epochs, changes)
    file = arguments.work / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"
    found = cohort.kept(file, lambda: measure(arguments, look, how, seed))
    last = {name: round(run[-1]["recoverable_auc"], 3) for name, run in found["victims"].items()}
    print(f"{seed} {look}, {how}: {last}", file=sys.stderr, flush=True)
    return {"look": look, "how": how, "seed": seed, **found}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="MedMNIST-layout NPZ, two classes")
    parser.add_argument("--bundle", type=Path, required=True, help="trained on the public third of it")
    parser.add_argument("--work", type=Path, required=True, help="folder for finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of the sites' sizes")
    parser.add_argument("--epochs", type=int, default=20, help="of the victims")
    return parser.parse_args()


def _write(arguments: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    rows, noise = [], []
    for look in LOOKS:
        for how in HOW:
            found = [r for r in results if (r["look"], r["how"]) == (look, how)]
            for label, name in VICTIMS:
                runs = [r["victims"][name] for r in found]
                rows.append(
                    [
                        look,
                        how,
                        label,
                        *(report.spread([pick(r) for r in runs]) for _, pick in cohort.COLUMNS),
                    ]
                )
            if how != "clean":
                right_ = [
                    report.spread([r["surrogates_right"][number] for r in found])
                    for number in range(len(SIZES))
                ]
                psnr = report.spread([r["psnr_db"] for r in found], 1)
                noise.append(
                    [look, how, psnr, *right_, report.spread([r["opening_cpu_s"] for r in found], 1)]
                )
    shares = ", ".join(f"{100 * share:.0f} %" for share in SECOND_CLASS)
    sizes = ", ".join(str(round(arguments.scale * size)) for size in SIZES)
    sections = [
        f"Three sites of {sizes} images, of which {shares} of the second class; with a look each, their detector "
        f"curves have the exponents {', '.join(map(str, CURVES))}. Victims train on the union of the three releases; "
        f"seeds {arguments.seeds}: median (range). Recoverable: the best over label permutations and after "
        "calibration on 50 clean labelled images; 0.50 is chance. Adapted: "
        f"{AdaptationSettings().steps} steps at {AdaptationSettings().learning_rate:g} on the site's own images.",
        report.markdown_table(
            ["images", "noise from", "victim", *(name for name, _ in cohort.COLUMNS)], rows
        ),
        "## The surrogates, on the site's own images",
        report.markdown_table(
            [
                "images",
                "noise from",
                "PSNR dB",
                *(f"right at site {n + 1}" for n in range(len(SIZES))),
                "CPU s to open, all sites",
            ],
            noise,
        ),
    ]
    report.write("adaptation", "Local adaptation of the surrogates", sections, {"runs": list(results)})


if __name__ == "__main__":
    main()
