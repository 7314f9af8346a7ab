from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medveil.models.bundle import generate_key, load_key, open_bundle, save_key
from medveil.models.errors import BusyError, ConfigurationError, InputError

torch = pytest.importorskip("torch")
from medveil.coordinator.train import TrainRequest, train  # noqa: E402 (needs torch)
from medveil.models.audit.victims import VictimSettings  # noqa: E402
from medveil.models.bundle import RecipeSettings  # noqa: E402
from medveil.models.training import DEFAULT_PLAN, Member, Plan, state_folder  # noqa: E402

pytestmark = pytest.mark.train

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
SMALL = Plan(
    members=(
        Member(name="mlp", architecture="mlp", epochs=6, batch_size=16),
        Member(name="vgg", architecture="vgg", epochs=6, batch_size=16),
    ),
    recipe=RecipeSettings(steps=4, warmup_steps=2),
    strengthening=(),
    victims=(VictimSettings(architecture="mobilenet", batch_size=16),),
    victim_steps=8,
)

# What a killed process runs: the same small plan, from the command line's own function.
PROGRAM = """
import sys
from pathlib import Path
from medveil.coordinator.train import train
from medveil.models.bundle import load_key
import test_train_module as t
data, out, key = map(Path, sys.argv[1:])
train(t.request(data, out), load_key(key), t.Silent, t.SMALL)
"""


class Silent:
    """A reporter that adds up what it is told."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.left_s = seconds
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def advance(self, seconds: float) -> None:
        self.left_s -= seconds


def request(data: Path, out: Path, **changes: Any) -> TrainRequest:
    return replace(TrainRequest(data=data, out=out, created=NOON, name="shapes", seed=3), **changes)


def test_a_trained_bundle_says_what_was_done_and_every_part_is_there(
    shapes_npz: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out" / "shapes.bundle"
    reporters: list[Silent] = []

    def reporter(seconds: float) -> Silent:
        reporters.append(Silent(seconds))
        return reporters[-1]

    manifest = train(request(shapes_npz(160), out), generate_key(), reporter, SMALL)
    bundle = open_bundle(out, trusted=None)
    assert bundle.manifest == manifest
    assert [g.name for g in manifest.graphs] == ["mlp", "vgg"]
    for graph in manifest.graphs:
        assert graph.hold_out is not None
        assert graph.hold_out.auc > 0.9
        assert graph.training.epochs == 6
        assert bundle.golden(graph.name) is not None
        assert len(bundle.graph(graph.name)) == graph.size_bytes
    assert manifest.recipe.label_permutation == (1, 0)
    assert manifest.taxonomy.names == ("0", "1")
    assert manifest.input.shape == (1, 16, 16)
    assert sum(manifest.training_data.train_counts) == 112
    assert sum(manifest.training_data.hold_out_counts) == 48
    assert manifest.created == NOON
    check = manifest.proxy_check
    assert check is not None
    assert check.images == 24
    assert check.victims[0].architecture == "mobilenet"
    assert abs(reporters[0].left_s) < 1e-6
    assert not state_folder(out).exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes of work, many more on a busy machine
def test_the_same_request_gives_the_same_file_also_after_kill_9(
    shapes_npz: Callable[..., Path], tmp_path: Path
) -> None:
    data, key = shapes_npz(160), tmp_path / "key.pem"
    save_key(key, generate_key())
    straight, killed = tmp_path / "straight.bundle", tmp_path / "killed.bundle"
    train(request(data, straight), load_key(key), Silent, SMALL)
    (tmp_path / "test_train_module.py").write_text(Path(__file__).read_text())
    command = [sys.executable, "-c", PROGRAM, str(data), str(killed), str(key)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for waited_for in ("mlp.partial.pt", "vgg.partial.pt"):
        process = subprocess.Popen(command, env=environment)
        _wait_for(state_folder(killed) / waited_for, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert not killed.exists()
    assert not (state_folder(killed) / "mlp.partial.pt").exists()
    subprocess.run(command, env=environment, check=True, timeout=1500)
    assert killed.read_bytes() == straight.read_bytes()


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_second_process_is_told_to_wait(shapes_npz: Callable[..., Path], tmp_path: Path) -> None:
    from medveil.models.training import TrainingState

    out = tmp_path / "b"
    with TrainingState(state_folder(out), "any").locked(), pytest.raises(BusyError):
        train(request(shapes_npz(), out), generate_key(), Silent, SMALL)


def test_another_training_does_not_continue_a_killed_one(
    shapes_npz: Callable[..., Path], tmp_path: Path
) -> None:
    from medveil.models.training import TrainingState

    out = tmp_path / "b"
    state = TrainingState(state_folder(out), "of other data")
    with state.locked():
        state.keep_epochs({"mlp": 6, "vgg": 6})
    with pytest.raises(ConfigurationError) as caught:
        train(request(shapes_npz(), out), generate_key(), Silent, SMALL)
    assert caught.value.code == "other-training"


def test_splits_that_come_with_the_data_stay_what_they_are(
    shapes_npz: Callable[..., Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    from medveil.coordinator import train as module

    data = shapes_npz(
        64,
        test_images=rng.integers(0, 255, (40, 16, 16), dtype=np.uint8),
        test_labels=np.arange(40) % 2,
    )
    _, parts = module._load(request(data, tmp_path / "b"))
    assert len(parts.train) == 64
    assert (len(parts.protected), len(parts.test)) == (20, 20)
    seen = {image.tobytes() for part in (parts.train, parts.protected, parts.test) for image in part.images}
    assert len(seen) == 104


def test_data_that_teaches_nothing_is_refused_by_name(
    shapes_npz: Callable[..., Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    flat = np.full((160, 16, 16), 7, np.uint8)
    cases = {
        "one-class": {"train_labels": np.zeros(160, np.uint8)},
        "no-variation": {"train_images": flat},
        "labels-mismatch": {"train_labels": np.zeros(3, np.uint8)},
        "too-few-images": {"train_labels": (np.arange(160) < 9).astype(np.uint8)},
        "degenerate-surrogate": {"train_images": rng.integers(0, 255, (160, 16, 16), dtype=np.uint8)},
    }
    for number, (code, replaced) in enumerate(cases.items()):
        out = tmp_path / f"{number}.bundle"
        with pytest.raises(InputError) as caught:
            train(request(shapes_npz(160, **replaced), out), generate_key(), Silent, SMALL)
        assert caught.value.code == code
        assert not out.exists()


def test_a_time_that_is_too_short_is_refused_before_any_training(
    shapes_npz: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "b"
    with pytest.raises(ConfigurationError) as caught:
        train(request(shapes_npz(), out, minutes=1e-6), generate_key(), Silent, SMALL)
    assert caught.value.code == "minutes"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes of work, many more on a busy machine
def test_the_command_trains_the_default_plan_and_prints_json(
    shapes_npz: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "b.bundle"
    command = [
        sys.executable, "-c", "import sys; from medveil.coordinator.cli import main; sys.exit(main())",
        "train", str(shapes_npz(400)), "--out", str(out), "--classes", "left, right", "--format", "json",
    ]  # fmt: skip
    environment = os.environ | {"MEDVEIL_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert list(facts["classes"]) == ["left", "right"]
    assert len(facts["graphs"]) == len(DEFAULT_PLAN.members)
    assert facts["proxy_check"]["effective"] is ("not shown to protect" not in done.stderr)
    assert open_bundle(out, trusted=None).signer == facts["signer"]
    assert (tmp_path / "home" / "coordinator-signing-key.pub").exists()
