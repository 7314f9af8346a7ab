from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medveil.models.autodiff.selfcheck import GoldenVector
from medveil.models.bundle import (
    GraphStatement,
    InputContract,
    ManifestDraft,
    MemberTraining,
    RecipeSettings,
    Scores,
    Taxonomy,
    TaxonomyClass,
    TrainingData,
    write_bundle,
)


@pytest.fixture(scope="session")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="session")
def draft() -> ManifestDraft:
    scores = Scores(accuracy=0.9, balanced_accuracy=0.88, auc=0.95)
    return ManifestDraft(
        task="classification",
        created=datetime(2026, 11, 21, 12, 0, tzinfo=UTC),
        tool_version="0.1.0",
        seed=7,
        taxonomy=Taxonomy(
            classes=(
                TaxonomyClass(name="normal", stored_value=0),
                TaxonomyClass(name="opaque", stored_value=1),
            )
        ),
        input=InputContract(channels=1, rows=2, columns=2, channel_meaning="grey"),
        recipe=RecipeSettings(label_permutation=(1, 0)),
        training_data=TrainingData(
            name="shapes",
            source_statement="Drawn by a program.",
            sha256="0" * 64,
            train_counts=(3, 4),
            hold_out_counts=(1, 1),
        ),
        graphs=tuple(
            GraphStatement(
                name=name,
                role="surrogate",
                architecture="mlp",
                parameters=10,
                hold_out=scores,
                training=MemberTraining(seed=1, epochs=2, attempts=1),
            )
            for name in ("first", "second")
        ),
    )


@pytest.fixture(scope="session")
def golden() -> GoldenVector:
    images = np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 1, 2, 2)
    return GoldenVector(
        images=images,
        targets=np.eye(2, dtype=np.float32),
        losses=np.array([0.5, 0.25], np.float32),
        gradients=images - np.float32(0.5),
        rtol=1e-3,
    )


@pytest.fixture
def packed(
    tmp_path: Path, key: Ed25519PrivateKey, draft: ManifestDraft, golden: GoldenVector
) -> Callable[[], Path]:
    """Write a small bundle and return its path; the same bytes every time."""

    def pack() -> Path:
        path = tmp_path / "small.bundle"
        write_bundle(path, draft, {"first": b"one graph", "second": b"other"}, {"first": golden}, key)
        return path

    return pack


@pytest.fixture
def bundle_file(packed: Callable[[], Path]) -> Path:
    return packed()
