"""The use case behind ``medveil-coordinator train``: a public labelled set in, one signed bundle out.

read -> hold images out -> train the ensemble -> export and self-check -> try the noise on victims -> sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medveil.models.autodiff.admission import admit
from medveil.models.autodiff.selfcheck import GoldenVector
from medveil.models.bundle import (
    GraphStatement,
    InputContract,
    Manifest,
    ManifestDraft,
    MemberTraining,
    ProxyCheck,
    RecipeSettings,
    Taxonomy,
    TaxonomyClass,
    TrainingData,
    write_bundle,
)
from medveil.models.datasets import LabelledSet, load_labelled, split_names, stratified_split
from medveil.models.errors import InputError
from medveil.models.export import golden_vector, to_onnx
from medveil.models.methods import EnsembleOracle
from medveil.models.methods.targets import permutation_for
from medveil.models.training import (
    DEFAULT_PLAN,
    Examples,
    Plan,
    Reporter,
    Surrogate,
    TorchOracle,
    TrainingState,
    check_noise,
    parameters,
    plan_epochs,
    seconds_per_epoch,
    state_folder,
    train_ensemble,
    training_identity,
)
from medveil.models.training.generator import GeneratorSettings, generator_to_onnx, train_generator

__all__ = ["TrainRequest", "train"]

_TRAIN = "train"
# Held out when the data does not come divided: half of it to protect and train victims on, half to test on.
_HOLD_OUT_SHARE = 0.3
_TEST_SHARE = 0.5
# Fewer of a class than this in any part, and a score on it says nothing.
_FEWEST_PER_CLASS = 8
# What members and export get of the time; the rest is for noise and victims (measured on 4,700 images of 28 pixels).
_MEMBERS_SHARE = 0.6
_EXPORT_SHARE = 0.1
_GOLDEN_IMAGES = 4
_GENERATOR = "generator"
# Streams of the request's seed, so that no two draws share their randomness.
_HOLD_OUT_STREAM = 1
_GOLDEN_STREAM = 2


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What a coordinator asks for.

    Attributes:
        data: labelled public images (see `medveil.models.datasets`).
        out: the bundle to write.
        created: the time that the manifest states; the same request with the same time gives the same bytes.
        task: only classification has surrogates so far.
        seed: everything random follows from it.
        minutes: time for all of it; None: as long as the plan takes.
        threads: of torch.
        size: rows and columns of the surrogates' input; None: the images' own, at most 64.
        class_names: names for the stored label values in ascending order; None: what the data says.
        name: of the data, for the training-data statement.
        source_statement: where the data comes from and under which licence.
        generator: distil a noise generator into the bundle, too; None: no. Its time comes on top of `minutes`.
    """

    data: Path
    out: Path
    created: datetime
    task: Literal["classification"] = "classification"
    seed: int = 0
    minutes: float | None = None
    threads: int = 1
    size: int | None = None
    class_names: tuple[str, ...] | None = None
    name: str = ""
    source_statement: str = ""
    generator: GeneratorSettings | None = None


@dataclass(frozen=True, eq=False)
class _Parts:
    """Public images by what they are for; no image is in two parts."""

    train: Examples
    protected: Examples
    test: Examples


def train(
    request: TrainRequest,
    signing_key: Ed25519PrivateKey,
    reporter: Callable[[float], Reporter],
    plan: Plan = DEFAULT_PLAN,
) -> Manifest:
    """Train, export, check, sign and write one bundle.

    Killed at any moment, the same request continues: finished members are not trained again.

    Args:
        request: what is asked for.
        signing_key: the coordinator's key.
        reporter: given the estimated seconds of all work, returns who is told about it.
        plan: ensemble and recipe.

    Returns:
        The manifest of the bundle.

    Raises:
        InputError: the data cannot be used, or a surrogate learns nothing from it.
        ConfigurationError: "minutes" (too short), "other-training", "architecture", "size".
        BusyError: another process trains for the same bundle.
        StorageError: the disk refused.
    """
    started = perf_counter()
    torch.set_num_threads(request.threads)
    data, parts = _load(request)
    plan = replace(plan, recipe=_with_permutation(plan.recipe, len(data.classes)))
    identity = training_identity(data.digest, request.seed, request.minutes, repr(plan))
    state = TrainingState(state_folder(request.out), identity)
    with state.locked():
        per_epoch_s = {member.name: seconds_per_epoch(member, parts.train) for member in plan.members}
        limit_s = None if request.minutes is None else 60 * request.minutes
        epochs = state.epochs()
        if epochs is None:
            epochs = plan_epochs(
                plan.members, per_epoch_s, None if limit_s is None else _MEMBERS_SHARE * limit_s
            )
            state.keep_epochs(epochs)
        total_s = sum(per_epoch_s[name] * count for name, count in epochs.items()) / _MEMBERS_SHARE
        told = reporter(total_s)
        surrogates = train_ensemble(
            plan,
            parts.train,
            _joined(parts.protected, parts.test),
            seed=request.seed,
            epochs=epochs,
            seconds_per_epoch=per_epoch_s,
            state=state,
            reporter=told,
        )
        shape = parts.train.images.shape[1:]
        told.stage("export to ONNX")
        graphs, golden = _export(surrogates, parts.test, seed=request.seed)
        told.advance(_EXPORT_SHARE * total_s)
        oracle = EnsembleOracle([TorchOracle(s.net, shape, parts.train.classes) for s in surrogates])
        recipe, check = check_noise(
            plan,
            plan.recipe,
            oracle,
            parts.protected,
            parts.test,
            seed=request.seed,
            limit_s=None if limit_s is None else max(0.0, limit_s - (perf_counter() - started)),
            reporter=told,
        )
        statements = [_statement(surrogate) for surrogate in surrogates]
        if request.generator is not None:
            told.stage("noise generator")
            graphs[_GENERATOR], distilled = _distil(
                request.generator, surrogates, parts.train, recipe, request.seed
            )
            statements.append(distilled)
        draft = _draft(request, data, parts, statements, recipe, check)
        told.advance((1 - _MEMBERS_SHARE - _EXPORT_SHARE) * total_s)
        manifest = write_bundle(request.out, draft, graphs, golden, signing_key)
        state.remove()
    return manifest


def _load(request: TrainRequest) -> tuple[LabelledSet, _Parts]:
    """Read the data and divide it; splits that come with it stay what they are."""

    def load(split: str, size: int | None, channels: int | None) -> LabelledSet:
        return load_labelled(
            request.data, split=split, size=size, channels=channels, class_names=request.class_names
        )

    splits = split_names(request.data)
    if _TRAIN not in splits:
        raise InputError("split-missing", "The data needs a split called train.")
    data = load(_TRAIN, request.size, None)
    classes = len(data.classes)
    if classes < 2:
        raise InputError("one-class", "The data holds one class only; surrogates need two to tell apart.")
    if np.ptp(data.images, axis=0).max() == 0:
        raise InputError("no-variation", "All images are the same; there is nothing to learn.")
    rng = np.random.default_rng((request.seed, _HOLD_OUT_STREAM))
    everything = Examples(data.images, data.labels, classes)
    others = [load(s, data.images.shape[2], data.images.shape[1]) for s in splits if s != _TRAIN]
    if others:
        if any(other.classes != data.classes for other in others):
            raise InputError("classes-differ", "The splits do not hold the same classes.")
        learned = everything
        rest = Examples(
            np.concatenate([other.images for other in others]),
            np.concatenate([other.labels for other in others]),
            classes,
        )
    else:
        kept, held_out = stratified_split(data.labels, _HOLD_OUT_SHARE, rng)
        learned, rest = everything.select(kept), everything.select(held_out)
    protected, test = stratified_split(rest.labels, _TEST_SHARE, rng)
    parts = _Parts(learned, rest.select(protected), rest.select(test))
    for part in (parts.train, parts.protected, parts.test):
        if np.bincount(part.labels, minlength=classes).min() < _FEWEST_PER_CLASS:
            raise InputError(
                "too-few-images",
                f"Every class needs at least {_FEWEST_PER_CLASS} images to learn from and twice as many to hold out.",
            )
    return data, parts


def _joined(first: Examples, second: Examples) -> Examples:
    return Examples(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.labels, second.labels]),
        first.classes,
    )


def _with_permutation(recipe: RecipeSettings, classes: int) -> RecipeSettings:
    """Write the label permutation out: every site must push each class towards the same other one."""
    permutation = permutation_for(recipe.label_permutation, classes)
    return recipe.model_copy(update={"label_permutation": tuple(permutation.tolist())})


def _export(
    surrogates: tuple[Surrogate, ...], public: Examples, *, seed: int
) -> tuple[dict[str, bytes], Mapping[str, GoldenVector]]:
    """Return graphs and golden vectors by name; what a site would refuse to admit never gets into a bundle."""
    rng = np.random.default_rng((seed, _GOLDEN_STREAM))
    images = public.images[np.sort(rng.permutation(len(public))[:_GOLDEN_IMAGES])]
    graphs: dict[str, bytes] = {}
    golden: dict[str, GoldenVector] = {}
    for surrogate in surrogates:
        name = surrogate.member.name
        graphs[name] = to_onnx(surrogate.net, images.shape[1:])
        admit(graphs[name])
        golden[name] = golden_vector(surrogate.net, images, public.classes, rng=rng)
    return graphs, golden


def _distil(
    settings: GeneratorSettings,
    surrogates: tuple[Surrogate, ...],
    public: Examples,
    recipe: RecipeSettings,
    seed: int,
) -> tuple[bytes, GraphStatement]:
    """Return a generator that does in one pass what the recipe's optimiser does, and what the manifest says of it."""
    nets = [surrogate.net for surrogate in surrogates]
    shape = public.images.shape[1:]
    net = train_generator(nets, public, recipe.method_settings(), settings, seed=seed)
    graph = generator_to_onnx(net, shape, public.classes)
    admit(graph, role="generator")
    return graph, GraphStatement(
        name=_GENERATOR,
        role="generator",
        architecture="u-net",
        parameters=parameters(net),
        hold_out=None,
        training=MemberTraining(seed=seed, epochs=settings.epochs, attempts=1),
    )


def _draft(
    request: TrainRequest,
    data: LabelledSet,
    parts: _Parts,
    graphs: Sequence[GraphStatement],
    recipe: RecipeSettings,
    check: ProxyCheck,
) -> ManifestDraft:
    channels, rows, columns = data.images.shape[1:]
    classes = len(data.classes)
    return ManifestDraft(
        task=request.task,
        created=request.created,
        tool_version=version("medveil"),
        seed=request.seed,
        taxonomy=Taxonomy(
            classes=tuple(
                TaxonomyClass(name=name, stored_value=value)
                for name, value in zip(data.classes, data.stored_values, strict=True)
            )
        ),
        input=InputContract(
            channels=3 if channels == 3 else 1,
            rows=rows,
            columns=columns,
            channel_meaning="rgb" if channels == 3 else "grey",
        ),
        recipe=recipe,
        training_data=TrainingData(
            name=request.name or "unnamed public data",
            source_statement=request.source_statement,
            sha256=data.digest,
            train_counts=_counts(parts.train, classes),
            hold_out_counts=_counts(_joined(parts.protected, parts.test), classes),
        ),
        graphs=tuple(graphs),
        proxy_check=check,
    )


def _counts(part: Examples, classes: int) -> tuple[int, ...]:
    return tuple(np.bincount(part.labels, minlength=classes).tolist())


def _statement(surrogate: Surrogate) -> GraphStatement:
    member = surrogate.member
    return GraphStatement(
        name=member.name,
        role="surrogate",
        architecture=member.architecture,
        parameters=parameters(surrogate.net),
        hold_out=surrogate.hold_out,
        training=MemberTraining(
            seed=surrogate.seed,
            epochs=surrogate.epochs,
            attempts=surrogate.attempts,
            augmentation=member.augmentation.words,
            label_smoothing=member.label_smoothing,
            adversarial_255=member.adversarial_255,
            adversarial_steps=member.adversarial_steps if member.adversarial_255 else 0,
        ),
    )
