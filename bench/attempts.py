"""What moves the victims that the default recipe leaves alone? Every idea that was tried, what held and what didn't.

    python bench/attempts.py --data pneumoniamnist.npz --work /tmp/attempts

The images and surrogates are those of ``bench/methods.py``. Each idea is measured within the budget of the default
recipe (36 dB) and, as an upper bound on what it could ever do, on all pixels (30 dB). First, the reason: how many
images a *white-box* attack of the same size turns on each victim's own weights. One seed screens; what looks better
than the default is repeated under three (surrogates, noise and victims all change). Finished pieces are kept in the
work folder, so the benchmark can be killed and continued, and ``--report`` writes the table of what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.fft import dctn, idctn
from torch import nn

import cohort
import methods as side_by_side
import report
from medveil.models import methods
from medveil.models.audit import architectures
from medveil.models.audit.victims import VictimSettings, train_victim
from medveil.models.methods import Batch, EnsembleOracle, FloatArray, GradientOracle, Hardening, SalmSettings
from medveil.models.methods.lsp import LspSettings
from medveil.models.methods.projection import stored_steps
from medveil.models.nets.classifier import logits
from medveil.models.quality import classification as metrics
from medveil.models.quality import fidelity
from medveil.models.training import Examples, Member, TorchOracle, fit

EPSILON = side_by_side.EPSILON
MASK = 0.25
"""The default recipe's: 36 dB at 8/255."""
ADVERSARIAL_255 = 4.0
"""Radius of the adversarially trained victim, in 1/255 (as in ``bench/classification.py``)."""
CLEAN_SHARE = 0.2
COSINES = 7
"""A smooth gradient keeps 7 x 7 of 28 x 28 cosines: structures of four pixels and more (our choice: LSP's patch)."""
BUDGETS_255 = (8.0, 16.0, 12.0)
"""Budgets at which an MLP is attacked from an MLP, on all pixels: where would it begin to work?"""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Of ridge regressions, by which a linear attacker looks at everything, or at what varies most only."""
LINEAR_BUDGETS = ((8.0, 0.25), (4.0, 1.0), (8.0, 1.0), (10.0, 1.0), (12.0, 1.0), (16.0, 1.0))
"""Epsilon in 1/255 and mask: the default's PSNR in two ways, all pixels, and what would be too visible."""
SAME_ENERGY_255 = (4.0, 6.0, 11.0)
"""Epsilons in whole stored steps; masks give the default's PSNR (mask times epsilon squared is the same)."""
WHITE_BOX_IMAGES = 500
WHITE_BOX_STEPS = 20

CLEAN = "clean"
CNN = ("resnet", "vgg")
PLAIN = ("mobilenet", "convnext", "mlp", "vit")
CONVOLUTIONAL = (*PLAIN, "inception")
"""For ideas that could serve against convolutional victims."""
ALL = (*CONVOLUTIONAL, "mixed", "hardened")


# --- Surrogates, seen smoothly ------------------------------------------------------------------------------


class SmoothOracle:
    """An oracle whose gradients hold low frequencies only: cosines above `COSINES` per axis are cut (DCT-II)."""

    def __init__(self, oracle: GradientOracle) -> None:
        self._oracle = oracle

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self._oracle.input_shape)

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self._oracle.classes

    def loss_and_gradient(self, images: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the losses, and the gradients without their high frequencies."""
        losses, gradient = self._oracle.loss_and_gradient(images, targets)
        return losses, smooth(gradient)


def smooth(images: FloatArray) -> FloatArray:
    """Return ``(N, C, H, W)`` without the cosines above `COSINES` per axis."""
    cosines = dctn(images, axes=(2, 3), norm="ortho")
    cosines[:, :, COSINES:] = 0
    cosines[:, :, :, COSINES:] = 0
    return np.asarray(idctn(cosines, axes=(2, 3), norm="ortho"), np.float32)


# --- Ideas --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surrogate:
    """One member of an ensemble: architecture, and the radius of its adversarial training in 1/255."""

    architecture: str
    adversarial_255: float = 0.0


@dataclass(frozen=True)
class Idea:
    """One way to make noise.

    Attributes:
        letter: of the section it belongs to.
        label: in the table; also its name on the command line.
        ensemble: who is asked; empty for no noise.
        settings: of SALM's frozen form; the seed is set per run.
        smooth: gradients without high frequencies.
        patches: root mean square of linearly separable patches (LSP) that are added, fraction of [0, 1].
        swap: no gradients at all: each image moves towards the other class's mean, all of epsilon, smoothly.
        against: names of the victims that it is measured on. Adversarial training takes as long as all others.
    """

    letter: str
    label: str
    ensemble: tuple[Surrogate, ...]
    settings: SalmSettings = field(default_factory=SalmSettings)
    smooth: bool = False
    patches: float = 0.0
    swap: bool = False
    against: tuple[str, ...] = PLAIN


@dataclass(frozen=True)
class Victim:
    """An attacker: what they train, and how. ``mixed``: `CLEAN_SHARE` of their images are clean originals."""

    name: str
    label: str
    settings: VictimSettings
    mixed: bool = False


def victims(epochs: float) -> tuple[Victim, ...]:
    """Return the attackers, the quickest first; `epochs` scales all of their epochs."""

    def settings(architecture: str, plain: int, adversarial_255: float = 0.0) -> VictimSettings:
        return VictimSettings(
            architecture=architecture,
            epochs=max(1, round(epochs * plain)),
            adversarial_radius=adversarial_255 / 255,
            adversarial_steps=3,
        )

    return (
        Victim("mlp", "MLP", settings("mlp", 20)),
        Victim("mobilenet", "MobileNet", settings("mobilenet", 10)),
        Victim("inception", "Inception", settings("inception", 10)),
        Victim("vit", "ViT", settings("vit", 20)),
        Victim("convnext", "ConvNeXt", settings("convnext", 20)),
        Victim("mixed", "MobileNet, 20 % clean", settings("mobilenet", 10), mixed=True),
        Victim("hardened", "MobileNet, adversarial 4/255", settings("mobilenet", 10, ADVERSARIAL_255)),
    )


@dataclass(frozen=True)
class Scale:
    """How much of everything: the benchmark proper, or a smoke run."""

    base: side_by_side.Scale
    steps: int = 10
    victim_epochs: float = 1.0
    screened: int | None = None


FULL = Scale(side_by_side.FULL)
QUICK = Scale(side_by_side.QUICK, steps=1, victim_epochs=0.05, screened=4)


def ideas(scale: Scale) -> tuple[Idea, ...]:
    """Return what is screened, what is made quickest first."""
    cnn = tuple(Surrogate(name) for name in CNN)
    mlp, vit = Surrogate("mlp"), Surrogate("vit")
    robust = Surrogate("resnet", ADVERSARIAL_255)
    step = min(2.0, 2 / scale.steps)
    default = SalmSettings(mask_ratio=MASK, steps=scale.steps, step_size=step)
    full = replace(default, mask_ratio=1.0)
    adversary = Hardening(adversary_radius=ADVERSARIAL_255 / 255, adversary_steps=2)
    views = Hardening(blur_sigmas=(1.0,), shifts=((2, 2), (-2, -2)), scales=(0.5,))
    # The energy that 36 dB leave, shared half and half: half the pixels, and patches of 36 + 3 dB.
    half = replace(default, mask_ratio=MASK / 2)
    patches = float(10 ** (-39 / 20))
    found = (
        Idea("0", CLEAN, (), against=ALL),
        *(
            Idea(
                "g",
                f"mlp, all pixels, {e:g}/255",
                (mlp,),
                replace(full, epsilon=e / 255),
                against=("mlp",),
            )
            for e in BUDGETS_255
        ),
        Idea("a", "mlp + vit", (mlp, vit), default),
        Idea("a", "mlp + vit, all pixels", (mlp, vit), full),
        Idea("e", "smooth, mlp + vit", (mlp, vit), default, smooth=True),
        Idea("e", "smooth, mlp + vit, all pixels", (mlp, vit), full, smooth=True),
        Idea("d", "towards the other class's mean, all pixels", (), full, swap=True),
        Idea("0", "default: resnet + vgg", cnn, default, against=ALL),
        Idea("a", "resnet + vgg + mlp + vit", (*cnn, mlp, vit), default),
        Idea("e", "smooth, resnet + vgg + mlp + vit", (*cnn, mlp, vit), default, smooth=True),
        Idea("d", "half flip noise, half patches", cnn, half, patches=patches),
        Idea("f", "default, towards no class", cnn, replace(default, target="uniform")),
        Idea("f", "default, a wrong class at random", cnn, replace(default, target="random")),
        Idea("b", "hardened resnet", (robust,), default),
        Idea("b", "hardened resnet, all pixels", (robust,), full, against=ALL),
        Idea("b", "resnet + vgg + hardened resnet", (*cnn, robust), default, against=CONVOLUTIONAL),
        Idea(
            "b",
            "resnet + vgg + hardened resnet + mlp + vit, all pixels",
            (*cnn, robust, mlp, vit),
            full,
            against=ALL,
        ),
        Idea(
            "e",
            "smooth, hardened resnet + mlp + vit, all pixels",
            (robust, mlp, vit),
            full,
            smooth=True,
            against=ALL,
        ),
        Idea(
            "c",
            "resnet + vgg + hardened resnet through blur, shift, resize",
            (*cnn, robust),
            replace(default, hardening=views),
            against=CONVOLUTIONAL,
        ),
        Idea(
            "c",
            "default through blur, shift, resize",
            cnn,
            replace(default, hardening=views),
            against=CONVOLUTIONAL,
        ),
        *(
            Idea(
                "h",
                f"default, {e:g}/255 on {100 * share:.0f} % of the pixels",
                cnn,
                replace(default, mask_ratio=share, epsilon=e / 255),
                against=("mobilenet", "inception"),
            )
            for e in SAME_ENERGY_255
            for share in [MASK * (255 * EPSILON / e) ** 2]
        ),
        Idea(
            "c",
            "hardened resnet, adversarial steps, all pixels",
            (robust,),
            replace(full, hardening=adversary),
            against=("mobilenet", "hardened"),
        ),
    )
    return found[: scale.screened]


CONFIRMED = ("default: resnet + vgg",)
"""Repeated under three seeds: the default and what looked better in the screen."""

SECTIONS = {
    "0": "What there is to beat",
    "a": "Ensembles with an MLP and a ViT",
    "b": "Adversarially trained surrogates",
    "c": "Transforms and an adversary in the loop",
    "d": "Linear patterns",
    "e": "Smooth noise",
    "f": "Targets",
    "h": "The same energy on more or fewer pixels",
    "g": "From an MLP against an MLP: the budget that it takes",
}


# --- One idea, one seed -------------------------------------------------------------------------------------


def trained(work: Path, scale: Scale, wanted: Surrogate, public: Examples, seed: int) -> nn.Module:
    """Return a surrogate trained on the public images; kept in the work folder."""
    if not wanted.adversarial_255:
        return side_by_side.surrogate_net(work, scale.base, wanted.architecture, public, seed)
    member = Member(
        name=wanted.architecture,
        architecture=wanted.architecture,
        epochs=scale.base.surrogate_epochs,
        adversarial_255=wanted.adversarial_255,
    )
    return _kept_net(work, member, fit.new_net(wanted.architecture, public, seed), public, seed)


def _kept_net(work: Path, member: Member, net: nn.Module, public: Examples, seed: int) -> nn.Module:
    file = work / "surrogates" / f"{side_by_side.digest(repr(member), str(seed), public.images)}.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
    else:
        optimiser = fit.new_optimiser(
            net, "vit" if member.architecture == "convnext" else member.architecture
        )
        for epoch in range(member.epochs):
            fit.train_epoch(net, optimiser, public, member, epoch=epoch, epochs=member.epochs, seed=seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        torch.save(net.state_dict(), part)
        part.replace(file)
    return net.eval()


def perturb(idea: Idea, data: side_by_side.Data, work: Path, scale: Scale, seed: int) -> FloatArray:
    """Return an idea's noise for the sites' images."""
    batch = _batch(data.private)
    settings = replace(idea.settings, seed=seed)
    if idea.swap:
        return _towards_other_mean(batch, data.public, settings.epsilon)
    delta = np.zeros_like(batch.images)
    if idea.ensemble:
        nets = [trained(work, scale, member, data.public, seed) for member in idea.ensemble]
        oracle: GradientOracle = _ask(nets, data.public)
        delta = methods.get("salm").perturb(batch, SmoothOracle(oracle) if idea.smooth else oracle, settings)
    if idea.patches:
        patches = LspSettings(patch=28 // COSINES, rms=idea.patches, seed=seed)
        delta = delta + methods.get("lsp").perturb(batch, None, patches)
    return delta


def _towards_other_mean(batch: Batch, public: Examples, epsilon: float) -> FloatArray:
    """Return one smooth pattern per class: all of epsilon, towards the mean of the next class's public images."""
    means = np.stack([public.images[public.labels == k].mean(axis=0) for k in range(public.classes)])
    towards = smooth(np.roll(means, -1, axis=0) - means)
    return np.asarray(epsilon * np.sign(towards)[batch.labels], np.float32)


class Bench:
    """The images, and the pieces that are kept in the work folder."""

    def __init__(self, arguments: argparse.Namespace, scale: Scale) -> None:
        self._work: Path = arguments.work
        self._only_kept: bool = arguments.report
        self._scale = scale
        self.data = side_by_side.Data.of(arguments.data, scale.base.images)

    def _kept(self, file: Path, compute: Callable[[], Any]) -> Any:
        """Return a finished piece, made now if it isn't there; None if only finished ones are wanted."""
        return None if self._only_kept and not file.exists() else cohort.kept(file, compute)

    def noise(self, idea: Idea, seed: int) -> tuple[dict[str, Any], FloatArray] | None:
        """Return an idea's figures and the images with its noise."""
        before, epsilon = self.data.private.images, idea.settings.epsilon
        made_by = (idea.ensemble, idea.settings, idea.smooth, idea.patches, idea.swap)
        epochs = self._scale.base.surrogate_epochs
        name = side_by_side.digest(repr((*made_by, epochs)), str(seed), before)
        array = self._work / "noise" / f"{name}.npy"

        def make() -> dict[str, Any]:
            delta = perturb(idea, self.data, self._work, self._scale, seed)
            np.save(array, delta)
            psnr = float(np.median(fidelity.psnr_db(before, stored_steps(before, delta, epsilon))))
            return {"psnr_db": psnr if np.isfinite(psnr) else None}

        array.parent.mkdir(exist_ok=True)
        facts = self._kept(array.with_suffix(".json"), make)
        return None if facts is None else (facts, stored_steps(before, np.load(array), epsilon))

    def victim(
        self, victim: Victim, idea: Idea, images: FloatArray, seed: int
    ) -> list[dict[str, float]] | None:
        """Return a victim's scores, epoch by epoch."""
        before, labels = self.data.private.images, self.data.private.labels
        held = images
        if victim.mixed:
            clean = np.random.default_rng((cohort.SPLIT_SEED, seed)).random(len(before)) < CLEAN_SHARE
            if idea.label == CLEAN:  # what stands beside a mix is the clean part alone
                held, labels = before[clean], labels[clean]
            else:
                held = np.where(clean[:, None, None, None], before, images)
        key = side_by_side.digest(repr(victim.settings), str(seed), held)
        scores: list[dict[str, float]] | None = self._kept(
            self._work / "victims" / f"{key}.json", lambda: _scores(victim, self.data, held, labels, seed)
        )
        return scores

    def white_box(self, seed: int) -> list[dict[str, Any]]:
        """Return, per victim trained on clean public images, how many images its own gradients turn."""
        index = np.arange(min(WHITE_BOX_IMAGES, len(self.data.private)))
        attacked = self.data.private.select(index)
        found = []
        for victim in victims(self._scale.victim_epochs):
            if victim.mixed:
                continue
            key = side_by_side.digest("white box", repr(victim.settings), str(seed), attacked.images)
            turned = self._kept(
                self._work / "whitebox" / f"{key}.json",
                lambda v=victim: _turned(v.settings, attacked, self.data.public, self._work, seed),
            )
            if turned is not None:
                found.append({"victim": victim.label, **turned})
        return found


def _scores(
    victim: Victim, data: side_by_side.Data, held: FloatArray, labels: np.ndarray, seed: int
) -> list[dict[str, float]]:
    classes = data.private.classes
    run = train_victim(
        held, labels, data.test.images, data.test.labels, victim.settings, classes=classes, seed=seed
    )
    return [scores.as_dict() for scores in run.history]


def _batch(examples: Examples) -> Batch:
    return Batch(
        examples.images,
        examples.labels,
        tuple(hashlib.sha256(image.tobytes()).digest() for image in examples.images),
    )


def _ask(nets: Sequence[nn.Module], public: Examples) -> EnsembleOracle:
    return EnsembleOracle([TorchOracle(net, public.images.shape[1:], public.classes) for net in nets])


# --- The reason ---------------------------------------------------------------------------------------------


def _turned(
    wanted: VictimSettings, attacked: Examples, public: Examples, work: Path, seed: int
) -> dict[str, float]:
    """Return what a victim has right, and the share of that which PGD on its own weights turns.

    Where the strongest attack of this size fails, the classes lie further apart than the budget, for this victim's
    eyes: no noise of this size can hide them.
    """
    net = _clean_victim(work, wanted, public, seed)
    settings = SalmSettings(mask_ratio=1.0, steps=WHITE_BOX_STEPS, step_size=2 / WHITE_BOX_STEPS)
    delta = methods.get("salm").perturb(_batch(attacked), _ask([net], public), settings)
    images = stored_steps(attacked.images, delta, EPSILON)
    before = logits(net, attacked.images).argmax(1) == attacked.labels
    after = logits(net, images).argmax(1) == attacked.labels
    return {
        "right_clean": float(before.mean()),
        "turned": float((before & ~after).sum() / max(1, before.sum())),
    }


def _clean_victim(work: Path, wanted: VictimSettings, public: Examples, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = architectures.build(
            wanted.architecture,
            channels=public.images.shape[1],
            size=public.images.shape[2],
            classes=public.classes,
        )
    member = Member(
        name=f"victim-{wanted.architecture}",
        architecture=wanted.architecture,
        epochs=wanted.epochs,
        adversarial_255=255 * wanted.adversarial_radius,
    )
    return _kept_net(work, member, net, public, seed)


def linear_attackers(data: side_by_side.Data) -> list[dict[str, Any]]:
    """Return what ridge regressions learn from noise that was made against a ridge regression on public images.

    The closed form of what an MLP begins with, for two classes: a large penalty keeps only directions in which images
    vary a lot (low frequencies), as early stopping or a blur do. Every image moves the same way, against its class.
    """
    public, private = _Ridge(data.public), data.private
    away = np.where(private.labels == 1, -1, 1)[:, None].astype(np.float32)
    test, pixels = _flat(data.test), _flat(private)

    def learned(images: FloatArray) -> dict[str, float]:
        ridge = _Ridge(replace(private, images=images))
        return {f"{p:g}": metrics.auc(test @ ridge.weights(p), data.test.labels == 1) for p in PENALTIES}

    found = [{"noise": "none", "epsilon_255": 0.0, "mask": 0.0, "auc": learned(pixels)}]
    for penalty in PENALTIES[1:]:
        weights = public.weights(penalty)
        largest = np.argsort(-np.abs(weights), kind="stable")
        for epsilon_255, mask in LINEAR_BUDGETS:
            inside = np.zeros_like(weights)
            inside[largest[: round(mask * len(weights))]] = epsilon_255 / 255
            moved = np.clip(pixels + away * np.float32(inside * np.sign(weights)), 0, 1)
            found.append(
                {
                    "noise": f"against penalty {penalty:g}",
                    "epsilon_255": epsilon_255,
                    "mask": mask,
                    "auc": learned(moved),
                }
            )
    return found


class _Ridge:
    """Ridge regressions of a class (0 or 1) on pixels, for any penalty from one decomposition."""

    def __init__(self, examples: Examples) -> None:
        images = _flat(examples).astype(np.float64)
        images -= images.mean(axis=0)
        labels = examples.labels - examples.labels.mean()
        self._variances, self._directions = np.linalg.eigh(images.T @ images / len(images))
        self._along = self._directions.T @ (images.T @ labels / len(images))

    def weights(self, penalty: float) -> npt.NDArray[np.float64]:
        """Return one weight per pixel; the penalty is per image, in squares of the [0, 1] range."""
        return np.asarray(self._directions @ (self._along / (self._variances + penalty)))


def _flat(examples: Examples) -> FloatArray:
    return examples.images.reshape(len(examples.images), -1)


def apart(data: side_by_side.Data) -> dict[str, float]:
    """Return how far the class means of the sites' images lie apart, for two classes, in 1/255."""
    images, labels = data.private.images, data.private.labels
    means = [images[labels == k].mean(axis=0) for k in range(data.private.classes)]
    gap = 255 * np.abs(means[1] - means[0])
    return {"median_255": float(np.median(gap)), "beyond_budget": float((gap > 2 * 255 * EPSILON).mean())}


# --- The table ----------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is asked for and write the table of all that was measured."""
    arguments = _arguments()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    scale = QUICK if arguments.quick else FULL
    bench = Bench(arguments, scale)
    screened = ideas(scale)
    wanted = [(idea, arguments.seeds[0]) for idea in screened]
    wanted += [(idea, s) for s in arguments.seeds[1:] for idea in screened if idea.label in arguments.confirm]
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for victim in victims(scale.victim_epochs):
        for idea, seed in wanted:
            made = bench.noise(idea, seed) if victim.name in idea.against else None
            scores = None if made is None else bench.victim(victim, idea, made[1], seed)
            if made is None or scores is None:
                continue
            run = runs.setdefault(
                (idea.label, seed), {"label": idea.label, "seed": seed, **made[0], "victims": {}}
            )
            run["victims"][victim.name] = scores
            _say(f"{victim.label}, {idea.label}, seed {seed}: {scores[-1]['recoverable_auc']:.3f}")
    reasons = [row | {"seed": seed} for seed in arguments.seeds for row in bench.white_box(seed)]
    two = bench.data.private.classes == 2
    linear = linear_attackers(bench.data) if two else []
    _write(arguments, scale, screened, list(runs.values()), reasons, linear, apart(bench.data))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = cohort.new_parser(__doc__)
    parser.add_argument(
        "--confirm",
        nargs="*",
        default=list(CONFIRMED),
        help="labels that run under all the seeds; the first seed screens everything",
    )
    parser.add_argument("--report", action="store_true", help="make nothing new: the table of what is there")
    return parser.parse_args()


_SHARES = ("right_clean", "turned")


def _row(idea: Idea, runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    psnr = [run["psnr_db"] for run in runs if run["psnr_db"] is not None]
    cells = [idea.label, str(len(runs)), report.spread(psnr, 1)]
    for name in names:
        histories = [run["victims"][name] for run in runs if name in run["victims"]]
        last = [history[-1]["recoverable_auc"] for history in histories]
        peak = [max(scores["recoverable_auc"] for scores in history) for history in histories]
        turned = (
            ", turned" if histories and np.median([history[-1]["auc"] for history in histories]) < 0.5 else ""
        )
        cells.append(f"{report.spread(last)}{turned} [{report.spread(peak)}]" if histories else "-")
    return cells


def _write(
    arguments: argparse.Namespace,
    scale: Scale,
    screened: Sequence[Idea],
    runs: Sequence[dict[str, Any]],
    reasons: Sequence[dict[str, Any]],
    linear: Sequence[dict[str, Any]],
    gap: dict[str, float],
) -> None:
    attackers = victims(scale.victim_epochs)
    header = ["noise", "seeds", "PSNR dB", *(victim.label for victim in attackers)]
    sections = [
        f"At most {scale.base.images} images of the three sites, surrogates from the public third, epsilon 8/255, "
        f"mask {MASK:g} unless the row says otherwise. Figures: recoverable AUC after the last epoch [best epoch]; "
        "0.50 is chance; turned: the victim answers the wrong way round. Over several seeds median (range). For "
        "clean images the mixed column is the clean part alone. Adversarial training with 3 steps.",
    ]
    measured = {(run["label"], name) for run in runs for name in run["victims"]}
    open_ideas = [
        idea.label for idea in screened if not {(idea.label, name) for name in idea.against} <= measured
    ]
    if open_ideas:
        sections.append(f"Not measured yet, or not against every victim: {'; '.join(open_ideas)}.")
    for letter, title in SECTIONS.items():
        rows = [
            _row(idea, found, [victim.name for victim in attackers])
            for idea in screened
            if idea.letter == letter and (found := [run for run in runs if run["label"] == idea.label])
        ]
        if rows:
            sections += [f"## {title}", report.markdown_table(header, rows)]
    turned = [
        [label, *(report.spread([r[key] for r in reasons if r["victim"] == label]) for key in _SHARES)]
        for label in dict.fromkeys(row["victim"] for row in reasons)
    ]
    linear_rows = [
        [
            row["noise"],
            f"{row['epsilon_255']:g}/255",
            f"{row['mask']:g}",
            *(f"{a:.2f}" for a in row["auc"].values()),
        ]
        for row in linear
    ]
    sections += [
        "## Why: linear attackers",
        "Ridge regressions, in closed form: AUC on clean test images, below 0.50 is turned round. The penalty says "
        "what an attacker looks at: a large one leaves what varies most from image to image, the low frequencies.",
        report.markdown_table(
            ["noise", "epsilon", "mask", *(f"attacker's penalty {p:g}" for p in PENALTIES)], linear_rows
        ),
        f"The mean images of the classes lie {gap['median_255']:.0f}/255 apart (median over the pixels); at "
        f"{100 * gap['beyond_budget']:.0f} % of the pixels further than the 16/255 that noise on both can close.",
    ]
    if turned:
        sections += [
            "## Why: a white-box attack on the victim itself, 8/255 on all pixels",
            report.markdown_table(
                ["victim, trained on clean public images", "right before", "turned"], turned
            ),
        ]
    name = str(arguments.work.resolve() / "attempts") if arguments.quick else "attempts"
    figures = {"runs": list(runs), "white_box": list(reasons), "linear": list(linear), "class_means": gap}
    report.write(name, "What was tried beyond the default recipe", sections, figures)


if __name__ == "__main__":
    main()
