"""Surrogates that learn from the site's images first: the same again after a kill, kept, and off by default."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.adaptation import AdaptationSettings, adapt
from medveil.agent.engine import open_oracle
from medveil.models.bundle import open_bundle
from medveil.models.errors import ConfigurationError

SIDE = 12
ON_CPU: dict[str, Any] = {"device": "cpu", "memory_budget_bytes": 2**28}


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images whose upper or lower half is brighter, by class."""
    labels = np.arange(count) % 2
    images = rng.integers(60, 160, (count, SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        image[: SIDE // 2] += 40 * label
        image[SIDE // 2 :] += 40 * (1 - label)
    return images.astype(np.uint8), labels


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "source"
    add(folder, 64, rng)
    return folder


def add(folder: Path, count: int, rng: np.random.Generator, prefix: str = "") -> None:
    for number, (image, label) in enumerate(zip(*draw(rng, count), strict=True)):
        target = folder / ("PNEUMONIA" if label else "NORMAL") / f"{prefix}{number:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        PillowImage.fromarray(image).save(target)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text("local_adaptation = true\n")
    return path


@pytest.fixture
def protect(bundle: Any, source: Path, tmp_path: Path, policy: Path) -> Callable[..., tuple[Any, ...]]:
    """Return the words of a call with local adaptation."""

    def words(out: str = "out") -> tuple[Any, ...]:
        call = ("protect", source, "--out", tmp_path / out, "--bundle", bundle.path, "--policy", policy)
        return (*call, "--format", "json")

    return words


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def graphs_of(bundle: Any) -> list[Any]:
    opened = open_bundle(bundle.path, trusted=None)
    return [
        (entry.name, opened.graph(entry.name), opened.golden(entry.name))
        for entry in opened.manifest.surrogates
    ]


def test_surrogates_learn_the_sites_images_to_the_same_bytes_on_any_number_of_threads(
    bundle: Any, rng: np.random.Generator
) -> None:
    images, labels = draw(rng, 64)
    clean = (images[:, None] / np.float32(255)).astype(np.float32)
    before = graphs_of(bundle)
    once, again = (
        adapt(before, clean, labels, AdaptationSettings(steps=30), threads=threads, **ON_CPU)
        for threads in (1, 2)
    )
    assert once == again
    after = [(name, graph, None) for (name, _, _), graph in zip(before, once, strict=True)]
    targets = np.eye(2, dtype=np.float32)[labels]
    losses = [
        open_oracle(graphs, threads=1, **ON_CPU).loss_and_gradient(clean, targets)[0].mean()
        for graphs in (before, after)
    ]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("labels", [np.arange(8) % 2, np.zeros(64, np.int64)])
def test_too_few_images_or_one_class_teach_nothing(bundle: Any, labels: np.ndarray) -> None:
    images = np.zeros((len(labels), 1, SIDE, SIDE), np.float32)
    with pytest.raises(ConfigurationError, match="adaptation-images"):
        adapt(graphs_of(bundle), images, labels, AdaptationSettings(), threads=1, **ON_CPU)


def test_it_is_off_by_default_and_changes_the_noise_when_it_is_on(
    agent: Any, protect: Any, tmp_path: Path, bundle: Any, source: Path
) -> None:
    adapted = agent(*protect())
    plain = agent("protect", source, "--out", tmp_path / "plain", "--bundle", bundle.path, "--format", "json")
    assert (adapted.json["verified"], plain.json["verified"]) == (64, 64)
    assert adapted.json["surrogates"] == "adapted to this site's images"
    assert plain.json["surrogates"] == "the bundle's"
    assert tree(tmp_path / "out") != tree(tmp_path / "plain")
    assert not list(tmp_path.glob("plain.private/surrogates*"))


def has_adapted(ledger: Path) -> bool:
    try:
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as rows:
            return rows.execute("SELECT 1 FROM meta WHERE key = 'adapted_sha256'").fetchone() is not None
    except sqlite3.Error:
        return False


def test_a_release_goes_on_with_the_surrogates_that_it_began_with(
    agent: Any, start_agent: Any, protect: Any, source: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    assert agent(*protect("whole")).code == 0
    process = start_agent(*protect("out"))
    while not has_adapted(tmp_path / "out.private/ledger.sqlite"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = (tmp_path / "out.private/surrogates.npz").read_bytes()
    add(source, 12, rng, "later")  # what it would draw now is something else
    done = agent(*protect("out"))
    assert (done.code, done.json["verified"]) == (0, 76)
    assert (tmp_path / "out.private/surrogates.npz").read_bytes() == kept
    whole, out = tree(tmp_path / "whole"), tree(tmp_path / "out")
    assert {name: out[name] for name in whole} == whole


def test_a_release_whose_surrogates_were_changed_does_not_go_on(
    agent: Any, protect: Any, tmp_path: Path
) -> None:
    assert agent(*protect()).code == 0
    path = tmp_path / "out.private/surrogates.npz"
    path.write_bytes(path.read_bytes()[:-1])
    refused = agent(*protect())
    assert (refused.code, refused.json["error"]["code"]) == (6, "adapted-changed")
