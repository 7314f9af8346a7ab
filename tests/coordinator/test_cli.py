from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from medveil.coordinator import cli
from medveil.models.cli_support import run_command
from medveil.models.errors import ExitCode


def coordinator(*arguments: object) -> int:
    return run_command(cli.app, "medveil-coordinator", [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDVEIL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.train
def test_bad_input_ends_with_one_sentence_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "b"
    for task, source, code in (
        ("classification", empty, "no-images"),
        ("classification", tmp_path / "nothing", "data-missing"),
        ("segmentation", empty, "data-format"),
        ("segmentation", tmp_path / "nothing", "data-missing"),
    ):
        assert (
            coordinator("train", source, "--out", out, "--task", task, "--format", "json") == ExitCode.INPUT
        )
        assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert coordinator("train", empty) == ExitCode.CONFIGURATION
    assert coordinator("train", empty, "--out", out, "--minutes", "0") == ExitCode.CONFIGURATION
    assert coordinator("train", empty, "--out", out, "--task", "detection") == ExitCode.CONFIGURATION
    both = ("--task", "segmentation", "--generator")
    assert coordinator("train", empty, "--out", out, *both) == ExitCode.CONFIGURATION


@pytest.mark.train
@pytest.mark.parametrize("effective", [True, False])
def test_the_key_is_made_once_and_the_command_says_when_the_noise_did_not_work(
    effective: bool,
    home: Path,
    tmp_path: Path,
    shapes_npz: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    from medveil.coordinator import train as training
    from medveil.models.audit.victims import VictimSettings
    from medveil.models.bundle import RecipeSettings
    from medveil.models.training import Member, Plan

    plan = Plan(
        members=(Member(name="mlp", architecture="mlp", epochs=6, batch_size=16),),
        recipe=RecipeSettings(steps=2, warmup_steps=1),
        strengthening=(),
        victims=(VictimSettings(architecture="mlp"),),
        victim_steps=1,
    )
    check_noise = training.check_noise

    def as_told(*arguments: object, **options: object) -> object:
        recipe, check = check_noise(*arguments, **options)
        return recipe, check.model_copy(update={"effective": effective})

    monkeypatch.setenv("COLUMNS", "200")  # a narrow table breaks the fingerprint over two lines
    monkeypatch.setattr(training, "check_noise", as_told)
    monkeypatch.setattr(training, "train", functools.partial(training.train, plan=plan))
    data, out = shapes_npz(160), tmp_path / "b.bundle"
    assert coordinator("train", data, "--out", out, "--seed", "1") == ExitCode.OK
    first = capsys.readouterr()
    assert "New signing key" in first.err
    assert ("not shown to protect" in first.err) is not effective
    assert "ed25519:" in first.out
    assert coordinator("train", data, "--out", out, "--seed", "1", "--format", "json") == ExitCode.OK
    second = capsys.readouterr()
    assert "New signing key" not in second.err
    assert json.loads(second.out)["signer"] in first.out
    assert (home / "coordinator-signing-key.pub").is_file()


def test_without_torch_the_screen_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m == "medveil.coordinator.train" or m.startswith("torch")]:
        monkeypatch.delitem(sys.modules, name)
    import medveil.coordinator as package

    monkeypatch.delattr(package, "train", raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=_no_torch), *sys.meta_path])
    assert coordinator("train", tmp_path, "--out", tmp_path / "b") == ExitCode.CONFIGURATION
    assert "[train]" in capsys.readouterr().err


def _no_torch(name: str, *_: object) -> None:
    if name == "torch":
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
