"""Let a bundle's surrogates learn a little from the site's own images before they make its noise. Off by default.

The coordinator's surrogates know public images. Where a site's images look different, a short fine-tuning in
onnxruntime brings them closer, and the weights stay at the site. Measured on three sites of unlike looks
(``bench/adaptation.py``), surrogates became as accurate there as on public images, and the sites together were
protected no better: every site then makes its noise with surrogates of its own.

It happens once per release. The adapted surrogates lie in the private folder and their digest in the ledger, among
the settings that a rerun must share: what is continued is continued with the same bits, whatever the source holds by
then.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Unpack

import numpy as np
import numpy.typing as npt

from medveil.agent.crash_note import CrashNote, crash_note
from medveil.agent.engine import TrainingSettings, open_oracle, open_trainable
from medveil.agent.formats import reading_formats
from medveil.agent.imageio import Item, read_label_table, scan
from medveil.agent.labelling import Labeller, labels_file
from medveil.agent.ledger import Ledger
from medveil.agent.perturb import Perturber, seen
from medveil.agent.preparation import EngineOptions, Prepared
from medveil.agent.workspace import Workspace, open_workspace
from medveil.models.autodiff.selfcheck import GoldenVector
from medveil.models.disk import write_atomically
from medveil.models.errors import ConfigurationError, ImageError, StorageError
from medveil.models.methods.oracle import FloatArray

__all__ = ["AdaptationSettings", "adapt", "with_adapted_surrogates"]

Labels = npt.NDArray[np.int64]

_FILE: Final = "surrogates.npz"
_META: Final = "adapted_sha256"
_MOST_IMAGES: Final = 400
"""Drawn from the source; our choice: 100 steps of 32 see each of them eight times."""
_DRAW_SEED: Final = 0


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """How far surrogates may move.

    Attributes:
        steps: of stochastic gradient descent.
        batch_size: images per step, every class as likely as any other.
        learning_rate: bundles carry graphs with batch norms folded into their convolutions, which large steps throw
            off balance: at 0.01 one of three sites ended with surrogates worse than before (measured).
        seed: of the draw of batches.
    """

    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 0.003
    seed: int = 0


def adapt(
    graphs: Sequence[tuple[str, bytes, GoldenVector | None]],
    images: FloatArray,
    labels: Labels,
    settings: AdaptationSettings,
    **options: Unpack[EngineOptions],
) -> list[bytes]:
    """Let each surrogate learn from the site's images and return the graphs with their new weights.

    The same images, settings and machine give the same bytes, however many threads there are.

    Args:
        graphs: name, received bytes and golden vector of each surrogate, as `open_oracle` takes them.
        images: ``(N, C, rows, columns)`` float32 in [0, 1], clean, of the surrogates' size.
        labels: ``(N,)`` class index of the bundle's taxonomy.
        settings: how far.
        options: what the sessions may use.

    Raises:
        ConfigurationError: ``adaptation-images``: fewer than one batch, or one class only.
        AdmissionError, SelfTestError: as `open_trainable`; ``non-finite`` when training diverged.
    """
    members = {int(index): np.flatnonzero(labels == index) for index in np.unique(labels)}
    if len(labels) < settings.batch_size or len(members) < 2:
        raise ConfigurationError(
            "adaptation-images",
            f"Local adaptation needs at least {settings.batch_size} labelled images of two classes; switch it off "
            "in the policy.",
        )
    training = TrainingSettings(learning_rate=settings.learning_rate)
    adapted = []
    for number, (name, data, golden) in enumerate(graphs):
        surrogate = open_trainable(name, data, golden, training=training, **options)
        targets = np.eye(surrogate.classes, dtype=np.float32)[labels]
        rng = np.random.default_rng((settings.seed, number))
        for _ in range(settings.steps):
            classes = rng.choice(list(members), settings.batch_size)
            batch = np.array([rng.choice(members[index]) for index in classes])
            surrogate.train_step(images[batch], targets[batch])
        adapted.append(surrogate.trained().model.SerializeToString(deterministic=True))
    return adapted


def with_adapted_surrogates(
    prepared: Prepared,
    source: Path,
    release: Path,
    private: Path | None,
    named_labels: Path | None,
    options: EngineOptions,
) -> Prepared:
    """Return a call with surrogates that know the source's images: made now, or those that this release began with.

    Args:
        prepared: the call with the bundle's own surrogates.
        source: the site's images.
        release: the release folder.
        private: the private folder; None puts it beside the release.
        named_labels: labels file of the call.
        options: what the sessions may use.

    Raises:
        ConfigurationError: ``adaptation``: this kind of noise asks no surrogates; ``adaptation-images``.
        StorageError: ``adapted-changed``: what the release began with is gone; or as `open_workspace`.
        MedveilError: as `open_workspace` and `adapt`.
    """
    perturber = prepared.perturber
    if not isinstance(perturber, Perturber) or perturber.oracle is None:
        raise ConfigurationError(
            "adaptation", "This noise asks no surrogates: switch local_adaptation off in the policy."
        )
    with open_workspace(source, release, private) as (workspace, ledger):
        data = _kept(workspace, ledger)
        bundle, names = prepared.bundle, [entry.name for entry in prepared.bundle.manifest.surrogates]
        if data is None:
            shape = perturber.oracle.input_shape
            with crash_note(workspace, ledger) as note:
                images, labels = _sample(
                    prepared, source, labels_file(source, named_labels), shape, workspace, note
                )
            received = [(name, bundle.graph(name), bundle.golden(name)) for name in names]
            data = _packed(adapt(received, images, labels, AdaptationSettings(), **options))
            _keep(data, workspace, ledger)
    graphs = [(name, graph, None) for name, graph in zip(names, _unpacked(data), strict=True)]
    own = replace(perturber, oracle=open_oracle(graphs, **options))
    return replace(prepared, perturber=own, adapted_sha256=hashlib.sha256(data).hexdigest())


# The site's images
# ------------------------------------------------------------------------------------------------


def _sample(
    prepared: Prepared,
    source: Path,
    table: Path | None,
    shape: tuple[int, ...],
    workspace: Workspace,
    note: CrashNote,
) -> tuple[FloatArray, Labels]:
    """Return labelled images of the source, drawn at random, as the surrogates see them."""
    policy = prepared.policy
    formats = {format_.name: format_ for format_ in reading_formats(policy.windows)}
    listing = scan(source, tuple(formats.values()), labels_file=table)
    labeller = Labeller(prepared.taxonomy, None if table is None else read_label_table(table))
    images, labels = [], []
    for item, numbers in _drawn([item for item in listing.items if policy.allows_format(item.format)]):
        try:
            with note.frames(formats[item.format], item, workspace.scratch) as frames:
                for number in numbers:
                    image = frames[number]
                    labels.append(labeller.class_of(item, image))
                    images.append(seen(image, image.pixels, shape))
        except ImageError:  # `protect` will quarantine it and say why
            del labels[len(images) :]
    return np.array(images, np.float32).reshape(-1, *shape), np.array(labels, np.int64)


def _drawn(items: Sequence[Item]) -> Iterator[tuple[Item, list[int]]]:
    """Yield what was drawn, file by file: the file and its frames."""
    frames = [(place, number) for place, item in enumerate(items) for number in range(item.frames)]
    chosen: dict[int, list[int]] = defaultdict(list)
    for index in sorted(np.random.default_rng(_DRAW_SEED).permutation(len(frames))[:_MOST_IMAGES]):
        place, number = frames[index]
        chosen[place].append(number)
    for place, numbers in chosen.items():
        yield items[place], numbers


# What is kept
# ------------------------------------------------------------------------------------------------


def _packed(graphs: Sequence[bytes]) -> bytes:
    file = io.BytesIO()
    np.savez(file, *(np.frombuffer(graph, np.uint8) for graph in graphs))
    return file.getvalue()


def _unpacked(data: bytes) -> list[bytes]:
    with np.load(io.BytesIO(data), allow_pickle=False) as graphs:
        return [graphs[f"arr_{number}"].tobytes() for number in range(len(graphs.files))]


def _keep(data: bytes, workspace: Workspace, ledger: Ledger) -> None:
    write_atomically(workspace.private / _FILE, data, mode=0o600)
    with ledger.transaction():
        ledger.set_meta(_META, hashlib.sha256(data).hexdigest())


def _kept(workspace: Workspace, ledger: Ledger) -> bytes | None:
    """Return what this release began with; None: it has not begun."""
    digest, path = ledger.meta(_META), workspace.private / _FILE
    if digest is None:
        return None
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise StorageError(
            "adapted-changed",
            "The surrogates that this release began with are gone or changed; begin a new release in another folder.",
        )
    return data
