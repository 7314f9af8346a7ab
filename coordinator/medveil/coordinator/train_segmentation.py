"""``medveil-coordinator train --task segmentation``: public images with label maps in, one signed bundle out.

read -> divide by image -> cut patches -> generators from several seeds, the best kept -> export -> victims -> sign.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medveil.models.autodiff.admission import admit
from medveil.models.bundle import (
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
from medveil.models.methods.umed import CONTOUR
from medveil.models.nets.segmentation import ALIGNMENT, HALO, folded
from medveil.models.training import Reporter, TrainingState, parameters, state_folder
from medveil.models.training.segmentation import PLANS, GeneratorPlan
from medveil.models.training.segmentation_check import CHECK_VICTIMS, check_segmentation
from medveil.models.training.segmentation_seeds import (
    TrainedGenerators,
    best_generators,
    seconds_per_iteration,
)

__all__ = ["DEFAULT_SEGMENTATION", "SegmentationPlan", "SegmentationRequest", "train_segmentation"]

# Of the images: what the generators learn from, what victims are given protected, and (the rest) the clean test.
_LEARN_SHARE, _PROTECT_SHARE = 0.6, 0.25
_FEWEST_IMAGES = 6
# Streams of the request's seed, so that no two draws share their randomness.
_SPLIT_STREAM, _PATCH_STREAM, _SEED_STREAM, _VICTIM_STREAM = 1, 2, 3, 4
# The band's radius is 3 pixels at the images of the paper, of which only "2-D medical" is known; on small ones it is
# scaled down (measured at 64 pixels: 1 for UMed, 2 as the wider band of UMed-plus).
_SMALL_SIDE = 128
_SMALL_BAND = {"umed": 1, "umed-plus": 2, "voxshield": 0}
# The victims pool three times by two, and need something left to pool.
_BLOCK, _SMALLEST_PATCH = 8, 16
# A site runs tiles of this side; larger ones waste less on their halo, smaller ones fit small images.
_TILE, _SMALL_TILE = 256, 128
# What generators and their proxy victims get of the time; the rest is for the final victims and the export.
_GENERATORS_SHARE = 0.6
# Below this many iterations generators have hardly left their first noise (measured: 400 do).
_FEWEST_ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class SegmentationPlan:
    """A whole training.

    Attributes:
        generators: of one method; fewer iterations are done where the time binds.
        patch: rows and columns of a patch.
        patches: number of patches for the generators; victims get half, the test a quarter of it.
        attempts: seeds of the generators.
        victim_steps: optimiser steps of each victim.
    """

    generators: GeneratorPlan
    patch: int = 64
    patches: int = 320
    attempts: int = 3
    victim_steps: int = 250


DEFAULT_SEGMENTATION = SegmentationPlan(generators=PLANS["umed-plus"])


@dataclass(frozen=True, kw_only=True)
class SegmentationRequest:
    """What a coordinator asks for.

    Attributes:
        data: public images with label maps (see `medveil.models.datasets.masked`).
        out: the bundle to write.
        created: the time that the manifest states.
        method: "umed" or "umed-plus".
        seed: everything random follows from it.
        minutes: time for all of it; None: as long as the plan takes.
        threads: of torch.
        patch: rows and columns of a training patch; None: 64, or what the images have room for.
        class_names: names for the mask values in ascending order, background first; None: the values.
        name: of the data, for the training-data statement.
        source_statement: where the data comes from and under which licence.
    """

    data: Path
    out: Path
    created: datetime
    method: str = "umed-plus"
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
    plan = _fitted(plan or _default(request), data)
    parts = _divided(data, plan, request.seed)
    state = TrainingState(state_folder(request.out), _identity(request, data, plan))
    with state.locked():
        seconds = seconds_per_iteration(plan.generators, parts.learn)
        planned = state.epochs() or _affordable(plan, seconds, request.minutes)
        state.keep_epochs(planned)
        generators = replace(
            plan.generators, iterations=planned["iterations"], clean_steps=planned["clean_steps"]
        )
        total_s = seconds * generators.all_iterations * plan.attempts / _GENERATORS_SHARE
        told = reporter(total_s)
        seeds = np.random.SeedSequence((request.seed, _SEED_STREAM)).generate_state(plan.attempts).tolist()
        victims = [replace(victim, steps=plan.victim_steps) for victim in CHECK_VICTIMS]
        best = best_generators(
            generators,
            parts.learn,
            parts.protect,
            parts.test,
            replace(victims[0], steps=max(1, plan.victim_steps // 2)),
            seeds=seeds,
            state=state,
            reporter=told,
            seconds=seconds,
        )
        told.stage("export to ONNX")
        contract = _input(data)
        graphs = _export(best, contract.shape)
        told.stage("victims on clean and on protected images")
        check = check_segmentation(
            parts.protect,
            best.images,
            parts.test,
            victims,
            epsilon_255=255 * generators.settings.epsilon,
            attempts=best.attempts,
            seed=int(np.random.SeedSequence((request.seed, _VICTIM_STREAM)).generate_state(1)[0]),
        )
        told.advance((1 - _GENERATORS_SHARE) * total_s)
        draft = _draft(request, data, parts, generators, best, contract, check)
        manifest = write_bundle(request.out, draft, graphs, {}, signing_key)
        state.remove()
    return manifest


def _default(request: SegmentationRequest) -> SegmentationPlan:
    if request.method not in ("umed", "umed-plus"):
        raise ConfigurationError("method", "Segmentation bundles are trained for umed or umed-plus.")
    plan = replace(DEFAULT_SEGMENTATION, generators=PLANS[request.method])
    return plan if request.patch is None else replace(plan, patch=request.patch)


def _fitted(plan: SegmentationPlan, data: MaskedSet) -> SegmentationPlan:
    """Return the plan with a patch that small images fill, and a band that fits them."""
    side = int(np.median([min(label.shape[-2:]) for label in data.labels]))
    patch = max(_SMALLEST_PATCH, min(plan.patch, side) // _BLOCK * _BLOCK)
    generators = plan.generators
    if side < _SMALL_SIDE:
        settings = replace(generators.settings, band_radius=_SMALL_BAND[generators.method])
        generators = replace(generators, settings=settings)
    return replace(plan, patch=patch, generators=generators)


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
        return cut_patches(part, plan.patch, math.ceil(wanted / len(index)), rng)

    return _Parts(
        cut(order[:learn], plan.patches),
        cut(order[learn : learn + protect], plan.patches // 2),
        cut(order[learn + protect :], plan.patches // 4),
    )


def _affordable(plan: SegmentationPlan, seconds: float, minutes: float | None) -> dict[str, int]:
    """Return the generators' iterations and clean steps: the plan's own, or the same share of both."""
    wanted = {"iterations": plan.generators.iterations, "clean_steps": plan.generators.clean_steps}
    if minutes is None:
        return wanted
    affordable = _GENERATORS_SHARE * 60 * minutes / (seconds * plan.attempts)
    if affordable < _FEWEST_ITERATIONS:
        raise ConfigurationError("minutes", "The time is too short for this data; allow more --minutes.")
    share = min(1.0, affordable / plan.generators.all_iterations)
    return {name: int(count * share) for name, count in wanted.items()}


def _identity(request: SegmentationRequest, data: MaskedSet, plan: SegmentationPlan) -> str:
    """Return what a continued run must agree in with the one that began."""
    facts = [data.digest, request.seed, request.minutes, repr(plan), torch.__version__, version("medveil")]
    return hashlib.sha256(json.dumps([str(fact) for fact in facts]).encode()).hexdigest()


def _input(data: MaskedSet) -> InputContract:
    largest = max(max(label.shape[-2:]) for label in data.labels)
    tile = _SMALL_TILE if largest <= _SMALL_TILE else _TILE
    colour = data.channels == 3
    return InputContract(
        channels=3 if colour else 1,
        rows=tile,
        columns=tile,
        channel_meaning="rgb" if colour else "grey",
    )


def _export(best: TrainedGenerators, shape: tuple[int, ...]) -> Mapping[str, bytes]:
    """Return the graphs by name; what a site would refuse to admit never gets into a bundle."""
    graphs = {}
    for part, net in best.generators.items():
        graphs[part] = to_onnx(folded(copy.deepcopy(net)), shape)
        admit(graphs[part], role="generator")
    return graphs


def _draft(
    request: SegmentationRequest,
    data: MaskedSet,
    parts: _Parts,
    generators: GeneratorPlan,
    best: TrainedGenerators,
    contract: InputContract,
    check: SegmentationCheck,
) -> ManifestDraft:
    classes = len(data.classes)
    settings = generators.settings
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
            method=generators.method,
            objective="label",
            epsilon_255=255 * settings.epsilon,
            mask_ratio=1.0,
        ),
        segmentation=SegmentationContract(
            generators=tuple(GeneratorUse(part=part, graph=part) for part in best.generators),  # type: ignore[arg-type]
            band_radius=settings.band_radius,
            texture_bound=settings.texture_bound,
            target=generators.target,
            halo=HALO,
            alignment=ALIGNMENT,
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
        graphs=tuple(
            GraphStatement(
                name=part,
                role="generator",
                architecture="unet, central differences" if part == CONTOUR else "unet",
                parameters=parameters(net),
                hold_out=None,
                training=MemberTraining(
                    seed=best.seed,
                    epochs=max(1, generators.all_iterations * generators.batch_size // len(parts.learn)),
                    attempts=best.attempts,
                    augmentation=("random views",) if generators.hardened else (),
                ),
            )
            for part, net in best.generators.items()
        ),
        segmentation_check=check,
    )


def _counts(part: Patches, classes: int) -> tuple[int, ...]:
    """Return, per class, the patches that hold it."""
    return tuple(int((part.labels == c).any(axis=(1, 2)).sum()) for c in range(classes))
