"""``medveil-coordinator train --task segmentation``: public images with label maps in, one signed bundle out.

read -> divide by image -> cut patches -> generators from several seeds, the best kept -> export -> victims -> sign.

Images are given to UMed or one of its successors; VoxShield's generator looks across the slices of a volume.
Gratings, for images and for volumes, are drawn: nothing is trained or exported for them, and the gentlest one that
holds is kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medveil.models.audit.segmentation_victims import SegmentationVictimSettings
from medveil.models.autodiff.admission import admit
from medveil.models.bundle import (
    GoldenAnswers,
    GraphStatement,
    InputContract,
    Manifest,
    ManifestDraft,
    MemberTraining,
    RecipeSettings,
    Taxonomy,
    TaxonomyClass,
    TrainingData,
    write_bundle,
)
from medveil.models.bundle.manifest import GeneratorUse, SegmentationCheck, SegmentationContract
from medveil.models.datasets.masked import MaskedSet, Patches, cut_patches, load_masked
from medveil.models.errors import ConfigurationError, InputError
from medveil.models.export import to_onnx
from medveil.models.methods.segmentation import get_segmentation
from medveil.models.methods.umed import CONTOUR
from medveil.models.nets.segmentation import ALIGNMENT, HALO, folded
from medveil.models.training import Reporter, TrainingState, parameters, state_folder, training_identity
from medveil.models.training.segmentation import PLANS, GeneratorPlan, protect_patches
from medveil.models.training.segmentation_check import (
    CHECK_VICTIMS,
    check_segmentation,
    seconds_per_victim_step,
)
from medveil.models.training.segmentation_drawn import DRAWN_PLANS, DrawnPlan, gentlest_that_holds
from medveil.models.training.segmentation_golden import golden_answers
from medveil.models.training.segmentation_seeds import ChosenNoise, best_generators, seconds_per_iteration

__all__ = [
    "DEFAULT_SEGMENTATION",
    "DEFAULT_VOLUMES",
    "METHODS",
    "SegmentationPlan",
    "SegmentationRequest",
    "train_segmentation",
]

# Of the images: what the generators learn from, what victims are given protected, and (the rest) the clean test.
_LEARN_SHARE, _PROTECT_SHARE = 0.6, 0.25
_FEWEST_IMAGES = 6
# Streams of the request's seed, so that no two draws share their randomness.
_SPLIT_STREAM, _PATCH_STREAM, _SEED_STREAM, _VICTIM_STREAM = 1, 2, 3, 4
# The band's radius is 3 pixels at the images of the paper, of which only "2-D medical" is known; on small ones it is
# scaled down (measured at 64 pixels: 1 for UMed, 2 as the wider band of UMed-plus). UMed-targeted's was measured on
# patches of 48, and stays.
_SMALL_SIDE = 128
_SMALL_BAND = {"umed": 1, "umed-plus": 2}
# The victims pool three times by two, and need something left to pool.
_BLOCK, _SMALLEST_PATCH = 8, 16
# A site runs tiles of this side; larger ones waste less on their halo, smaller ones fit small images. In a volume a
# tile's slices multiply, and a site's memory holds them.
_TILE, _SMALL_TILE = 256, 128
_VOLUME_TILE, _SMALL_VOLUME_TILE = (64, 128, 128), (64, 64, 64)
_VICTIM_SEEDS = 3  # the campaign's rule: no word on one seed
_IMAGES_METHOD, _VOLUMES_METHOD = "umed-targeted", "grating-volume"
METHODS = (*PLANS, *DRAWN_PLANS)
"""What segmentation bundles are made for."""
# Below this many iterations generators have hardly left their first noise (measured: 400 do).
_FEWEST_ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class SegmentationPlan:
    """A whole training.

    Attributes:
        noise: how generators are trained, with fewer iterations where the time binds; or which budgets of drawn noise
            are tried.
        patch: rows and columns of a patch.
        depth: slices of a patch, where the generators look across slices; None: patches are planes.
        patches: number of patches for the generators; victims get half, the test a quarter of it.
        attempts: seeds of the generators.
        victim_steps: optimiser steps of each victim.
        victim_batch: patches per step.
    """

    noise: GeneratorPlan | DrawnPlan
    patch: int = 64
    depth: int | None = None
    patches: int = 320
    attempts: int = 3
    victim_steps: int = 250
    victim_batch: int = 16


DEFAULT_SEGMENTATION = SegmentationPlan(noise=PLANS[_IMAGES_METHOD])
# A third of the patches, each with eight times the pixels; a quarter of them in a victim's step. After 150 steps some
# clean victims miss a class yet; after 400 none did (bench/segmentation.py).
DEFAULT_VOLUMES = SegmentationPlan(
    noise=DRAWN_PLANS[_VOLUMES_METHOD], patch=32, depth=32, patches=96, victim_steps=400, victim_batch=4
)


@dataclass(frozen=True, kw_only=True)
class SegmentationRequest:
    """What a coordinator asks for.

    Attributes:
        data: public images with label maps (see `medveil.models.datasets.masked`).
        out: the bundle to write.
        created: the time that the manifest states.
        method: one of `METHODS`: "voxshield" and "grating-volume" for volumes, the others for images and for the
            single slices of volumes; None: "umed-targeted" or "grating-volume", as the data asks for.
        seed: everything random follows from it.
        minutes: time for all of it; None: as long as the plan takes.
        threads: of torch.
        patch: rows and columns of a training patch; None: the plan's, or what the images have room for.
        class_names: names for the mask values in ascending order, background first; None: the values.
        name: of the data, for the training-data statement.
        source_statement: where the data comes from and under which licence.
    """

    data: Path
    out: Path
    created: datetime
    method: str | None = None
    seed: int = 0
    minutes: float | None = None
    threads: int = 1
    patch: int | None = None
    class_names: tuple[str, ...] | None = None
    name: str = ""
    source_statement: str = ""


@dataclass(frozen=True, eq=False)
class _Parts:
    """Patches by what they are for; no image is in two parts."""

    learn: Patches
    protect: Patches
    test: Patches


def train_segmentation(
    request: SegmentationRequest,
    signing_key: Ed25519PrivateKey,
    reporter: Callable[[float], Reporter],
    plan: SegmentationPlan | None = None,
) -> Manifest:
    """Train generators, export, check, sign and write one bundle.

    Killed at any moment, the same request continues: finished seeds are not trained again.

    Args:
        request: what is asked for.
        signing_key: the coordinator's key.
        reporter: given the estimated seconds of all work, returns who is told about it.
        plan: patches and generators; None: the method's default.

    Raises:
        InputError: the data cannot be used, or the generators learn nothing from it.
        ConfigurationError: "minutes" (too short), "other-training", "method".
        BusyError: another process trains for the same bundle.
        StorageError: the disk refused.
    """
    torch.set_num_threads(request.threads)
    data = load_masked(request.data, class_names=request.class_names)
    plan = _fitted(plan or _default(request, data), data)
    parts = _divided(data, plan, request.seed)
    identity = training_identity(data.digest, request.seed, request.minutes, repr(plan))
    state = TrainingState(state_folder(request.out), identity)
    with state.locked():
        victims = [
            replace(victim, steps=plan.victim_steps, batch_size=plan.victim_batch) for victim in CHECK_VICTIMS
        ]
        if isinstance(plan.noise, DrawnPlan):
            best, told, check_s = _drawn(request, plan, plan.noise, parts, victims, state, reporter)
        else:
            plan, best, told, check_s = _generated(request, plan, plan.noise, parts, victims, state, reporter)
            told.stage("export to ONNX")
        contract = _input(data, plan)
        graphs = _export(best, contract.shape)
        golden = _golden(best, parts.test, contract.shape)
        told.stage("victims on clean and on protected images")
        check = check_segmentation(
            parts.protect,
            best.images,
            parts.test,
            protect_patches(parts.test, plan.noise.method, best.settings, best.generators),
            victims,
            epsilon_255=255 * best.settings.epsilon,
            attempts=best.attempts,
            seeds=_seeds(request.seed, _VICTIM_STREAM, _VICTIM_SEEDS),
            advance=lambda share: told.advance(share * check_s),
        )
        draft = _draft(request, data, parts, plan.noise, best, contract, check)
        manifest = write_bundle(request.out, draft, graphs, golden, signing_key)
        state.remove()
    return manifest


def _generated(
    request: SegmentationRequest,
    plan: SegmentationPlan,
    noise: GeneratorPlan,
    parts: _Parts,
    victims: Sequence[SegmentationVictimSettings],
    state: TrainingState,
    reporter: Callable[[float], Reporter],
) -> tuple[SegmentationPlan, ChosenNoise, Reporter, float]:
    """Train generators in the time there is; return the plan as it was carried out, and what the check will take."""
    seconds = seconds_per_iteration(noise, parts.learn)
    per_step = [seconds_per_victim_step(parts.protect, settings) for settings in victims]
    check_s = _check_seconds(plan, per_step)
    victims_s = check_s + plan.victim_steps * plan.attempts * per_step[0] / 2
    planned = state.epochs() or _affordable(plan, noise, seconds, victims_s, request.minutes)
    state.keep_epochs(planned)
    noise = replace(noise, iterations=planned["iterations"], clean_steps=planned["clean_steps"])
    told = reporter(seconds * noise.all_iterations * plan.attempts + victims_s)
    best = best_generators(
        noise,
        parts.learn,
        parts.protect,
        parts.test,
        replace(victims[0], steps=max(1, plan.victim_steps // 2)),
        seeds=_seeds(request.seed, _SEED_STREAM, plan.attempts),
        state=state,
        reporter=told,
        seconds=seconds,
    )
    return replace(plan, noise=noise), best, told, victims_s


def _drawn(
    request: SegmentationRequest,
    plan: SegmentationPlan,
    noise: DrawnPlan,
    parts: _Parts,
    victims: Sequence[SegmentationVictimSettings],
    state: TrainingState,
    reporter: Callable[[float], Reporter],
) -> tuple[ChosenNoise, Reporter, float]:
    """Find the gentlest drawn noise that holds against the hardest victim, and what the check will take."""
    per_step = [seconds_per_victim_step(parts.protect, settings) for settings in victims]
    check_s, victim_s = _check_seconds(plan, per_step), plan.victim_steps * per_step[-1]
    wanted_s = check_s + victim_s * (1 + len(noise.budgets))
    if request.minutes is not None and 60 * request.minutes < wanted_s:
        raise _too_short(wanted_s)
    told = reporter(wanted_s)
    best = gentlest_that_holds(
        noise,
        parts.protect,
        parts.test,
        victims[-1],
        seed=_seeds(request.seed, _SEED_STREAM, 1)[0],
        state=state,
        reporter=told,
        seconds=victim_s,
    )
    return best, told, check_s


def _default(request: SegmentationRequest, data: MaskedSet) -> SegmentationPlan:
    volumes = _holds_volumes(data)
    method = request.method or (_VOLUMES_METHOD if volumes else _IMAGES_METHOD)
    if method not in METHODS:
        raise ConfigurationError("method", f"Segmentation bundles are made for {', '.join(METHODS)}.")
    across_slices = get_segmentation(method).across_slices
    if across_slices and not volumes:
        raise ConfigurationError(
            "method", f"The method {method} is for volumes (NIfTI); train {_IMAGES_METHOD} on images."
        )
    plan = DEFAULT_VOLUMES if across_slices else DEFAULT_SEGMENTATION
    plan = replace(plan, noise=DRAWN_PLANS[method] if method in DRAWN_PLANS else PLANS[method])
    return plan if request.patch is None else replace(plan, patch=request.patch)


def _holds_volumes(data: MaskedSet) -> bool:
    axes = {label.ndim for label in data.labels}
    if len(axes) > 1:
        raise InputError("data-format", "The data mixes images and volumes; train a bundle for each.")
    return axes == {3}


def _seeds(seed: int, stream: int, count: int) -> list[int]:
    drawn: list[int] = np.random.SeedSequence((seed, stream)).generate_state(count).tolist()
    return drawn


def _fitted(plan: SegmentationPlan, data: MaskedSet) -> SegmentationPlan:
    """Return the plan with a patch that small images fill, and a band that fits them."""
    side = int(np.median([min(label.shape[-2:]) for label in data.labels]))
    plan = replace(plan, patch=_whole_blocks(plan.patch, side, _SMALLEST_PATCH))
    if plan.depth is not None:
        slices = int(np.median([len(label) for label in data.labels]))
        return replace(plan, depth=_whole_blocks(plan.depth, slices, _BLOCK))
    if side >= _SMALL_SIDE or isinstance(plan.noise, DrawnPlan):
        return plan
    settings = plan.noise.settings
    settings = replace(settings, band_radius=_SMALL_BAND.get(plan.noise.method, settings.band_radius))
    return replace(plan, noise=replace(plan.noise, settings=settings))


def _whole_blocks(wanted: int, room: int, least: int) -> int:
    return max(least, min(wanted, room) // _BLOCK * _BLOCK)


def _divided(data: MaskedSet, plan: SegmentationPlan, seed: int) -> _Parts:
    """Deal the images out and cut each part to patches."""
    if len(data) < _FEWEST_IMAGES:
        raise InputError("too-few-images", f"Training needs at least {_FEWEST_IMAGES} images with masks.")
    order = np.random.default_rng((seed, _SPLIT_STREAM)).permutation(len(data)).tolist()
    learn = max(2, round(_LEARN_SHARE * len(order)))
    protect = max(2, round(_PROTECT_SHARE * len(order)))
    rng = np.random.default_rng((seed, _PATCH_STREAM))

    def cut(index: list[int], wanted: int) -> Patches:
        part = replace(
            data,
            images=tuple(data.images[i] for i in index),
            labels=tuple(data.labels[i] for i in index),
        )
        return cut_patches(part, plan.patch, math.ceil(wanted / len(index)), rng, depth=plan.depth)

    return _Parts(
        cut(order[:learn], plan.patches),
        cut(order[learn : learn + protect], plan.patches // 2),
        cut(order[learn + protect :], plan.patches // 4),
    )


def _check_seconds(plan: SegmentationPlan, per_step: Sequence[float]) -> float:
    """Return what the check takes: one victim of each design and seed on either side, the first blurred as well."""
    return plan.victim_steps * 2 * _VICTIM_SEEDS * (sum(per_step) + per_step[0])


def _affordable(
    plan: SegmentationPlan, noise: GeneratorPlan, seconds: float, victims_s: float, minutes: float | None
) -> dict[str, int]:
    """Return the generators' iterations and clean steps: the plan's own, or the same share of both.

    The victims are not cut short for the time: a victim that learned little would seem protected against.
    """
    wanted = {"iterations": noise.iterations, "clean_steps": noise.clean_steps}
    if minutes is None:
        return wanted
    affordable = (60 * minutes - victims_s) / (seconds * plan.attempts)
    if affordable < _FEWEST_ITERATIONS:
        raise _too_short(victims_s + _FEWEST_ITERATIONS * seconds * plan.attempts)
    share = min(1.0, affordable / noise.all_iterations)
    return {name: int(count * share) for name, count in wanted.items()}


def _too_short(least_s: float) -> ConfigurationError:
    return ConfigurationError(
        "minutes",
        f"The time is too short for this data on this machine; allow --minutes {math.ceil(least_s / 60)} at least.",
    )


def _input(data: MaskedSet, plan: SegmentationPlan) -> InputContract:
    """Return the tile that a site runs."""
    largest = max(max(label.shape[-2:]) for label in data.labels)
    slices: int | None = None
    if plan.depth is None:
        rows = columns = _SMALL_TILE if largest <= _SMALL_TILE else _TILE
    else:
        small = largest <= _SMALL_VOLUME_TILE[-1]
        slices, rows, columns = _SMALL_VOLUME_TILE if small else _VOLUME_TILE
    colour = data.channels == 3
    return InputContract(
        channels=3 if colour else 1,
        rows=rows,
        columns=columns,
        slices=slices,
        channel_meaning="rgb" if colour else "grey",
    )


def _export(best: ChosenNoise, shape: tuple[int, ...]) -> Mapping[str, bytes]:
    """Return the graphs by name; what a site would refuse to admit never gets into a bundle."""
    graphs = {}
    for part, net in best.generators.items():
        graphs[part] = to_onnx(folded(copy.deepcopy(net)), shape)
        admit(graphs[part], role="generator")
    return graphs


def _golden(best: ChosenNoise, public: Patches, shape: tuple[int, ...]) -> dict[str, GoldenAnswers]:
    """Return what a site's sessions must answer before they are used, by graph."""
    return {part: golden_answers(net, public.images[0], shape) for part, net in best.generators.items()}


def _draft(
    request: SegmentationRequest,
    data: MaskedSet,
    parts: _Parts,
    noise: GeneratorPlan | DrawnPlan,
    best: ChosenNoise,
    contract: InputContract,
    check: SegmentationCheck,
) -> ManifestDraft:
    classes = len(data.classes)
    settings = best.settings
    return ManifestDraft(
        task="segmentation",
        created=request.created,
        tool_version=version("medveil"),
        seed=request.seed,
        taxonomy=Taxonomy(
            classes=tuple(
                TaxonomyClass(name=name, stored_value=value)
                for name, value in zip(data.classes, data.stored_values, strict=True)
            )
        ),
        input=contract,
        recipe=RecipeSettings(
            method=noise.method,
            objective="label",
            epsilon_255=255 * settings.epsilon,
            mask_ratio=1.0,
        ),
        segmentation=SegmentationContract(
            generators=tuple(GeneratorUse(part=part, graph=part) for part in best.generators),  # type: ignore[arg-type]
            band_radius=settings.band_radius,
            texture_bound=settings.texture_bound,
            target=noise.target if isinstance(noise, GeneratorPlan) else None,
            halo=HALO if best.generators else 0,
            alignment=ALIGNMENT if best.generators else 1,
        ),
        training_data=TrainingData(
            name=request.name or "unnamed public data",
            source_statement=request.source_statement,
            sha256=data.digest,
            train_counts=_counts(parts.learn, classes),
            hold_out_counts=tuple(
                a + b
                for a, b in zip(_counts(parts.protect, classes), _counts(parts.test, classes), strict=True)
            ),
        ),
        graphs=_graphs(noise, best, parts) if isinstance(noise, GeneratorPlan) else (),
        segmentation_check=check,
    )


def _graphs(noise: GeneratorPlan, best: ChosenNoise, parts: _Parts) -> tuple[GraphStatement, ...]:
    return tuple(
        GraphStatement(
            name=part,
            role="generator",
            architecture="unet, central differences" if part == CONTOUR else "unet",
            parameters=parameters(net),
            hold_out=None,
            training=MemberTraining(
                seed=best.seed,
                epochs=max(1, noise.all_iterations * noise.batch_size // len(parts.learn)),
                attempts=best.attempts,
                augmentation=("random views",) if noise.hardened else (),
            ),
        )
        for part, net in best.generators.items()
    )


def _counts(part: Patches, classes: int) -> tuple[int, ...]:
    """Return, per class, the patches that hold it."""
    space = tuple(range(1, part.labels.ndim))
    return tuple(int((part.labels == c).any(axis=space).sum()) for c in range(classes))
