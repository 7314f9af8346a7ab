from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from medveil.models.bundle.manifest import RecipeSettings  # noqa: E402 (needs torch)
from medveil.models.errors import BusyError, ConfigurationError, InputError, StorageError  # noqa: E402
from medveil.models.training import (  # noqa: E402
    Member,
    Plan,
    TrainingState,
    fit,
    plan_epochs,
    train_ensemble,
)

pytestmark = pytest.mark.train

MEMBERS = (
    Member(name="first", architecture="mlp", epochs=6, batch_size=16),
    Member(name="second", architecture="vgg", epochs=6, batch_size=16),
)
PLAN = Plan(members=MEMBERS, recipe=RecipeSettings(), strengthening=(), victims=(), attempts=2)
EPOCHS = {m.name: m.epochs for m in MEMBERS}
SECONDS = {m.name: 1.0 for m in MEMBERS}


def state_of(folder: Path, identity: str = "one") -> TrainingState:
    state = TrainingState(folder, identity)
    with state.locked():
        state.keep_epochs(EPOCHS)
    return state


def run(data: Any, hold_out: Any, state: TrainingState, reporter: Any, plan: Plan = PLAN) -> Any:
    return train_ensemble(
        plan, data, hold_out, seed=5, epochs=EPOCHS, seconds_per_epoch=SECONDS, state=state, reporter=reporter
    )


def flat(surrogate: Any) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in surrogate.net.state_dict().values()])


def test_an_interrupted_ensemble_ends_as_an_uninterrupted_one(
    examples: Callable[..., Any], silent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, hold_out = examples(160), examples(64, seed=1)
    straight = run(data, hold_out, state_of(tmp_path / "a"), silent)

    class Killed(BaseException):
        pass

    trained: list[tuple[str, int]] = []
    train_epoch = fit.train_epoch

    def until_killed(net: Any, optimiser: Any, data: Any, member: Member, **options: Any) -> float:
        if len(trained) in (4, 9):
            trained.append(("killed", 0))
            raise Killed
        trained.append((member.name, options["epoch"]))
        return train_epoch(net, optimiser, data, member, **options)

    monkeypatch.setattr(fit, "train_epoch", until_killed)
    for _ in range(2):
        with pytest.raises(Killed):
            run(data, hold_out, state_of(tmp_path / "b"), silent)
    resumed = run(data, hold_out, state_of(tmp_path / "b"), silent)
    assert [entry for entry in trained if entry[0] != "killed"] == [
        (m.name, epoch) for m in MEMBERS for epoch in range(6)
    ]
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(flat(one), flat(other))
        assert one.hold_out == other.hold_out
        assert (one.seed, one.attempts, one.epochs) == (other.seed, other.attempts, other.epochs)
        assert one.hold_out.auc > 0.9


def test_finished_members_are_not_trained_again(
    examples: Callable[..., Any], silent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, hold_out = examples(160), examples(64, seed=1)
    first = run(data, hold_out, state_of(tmp_path / "a"), silent)
    monkeypatch.setattr(fit, "train_epoch", lambda *_, **__: pytest.fail("trained again"))
    again = run(data, hold_out, state_of(tmp_path / "a"), silent)
    assert all(torch.equal(flat(one), flat(other)) for one, other in zip(first, again, strict=True))


def test_what_learns_nothing_is_tried_with_other_seeds_and_then_refused_by_name(
    examples: Callable[..., Any], silent: Any, tmp_path: Path
) -> None:
    data, hold_out = examples(64), examples(64, seed=1)
    shuffled = fit.Examples(data.images, data.labels[torch.randperm(64).numpy() * 0], 2)
    one_class = fit.Examples(data.images, shuffled.labels, 2)
    with pytest.raises(InputError, match="first") as caught:
        run(one_class, hold_out, state_of(tmp_path / "a"), silent)
    assert caught.value.code == "degenerate-surrogate"
    assert "2 seeds" in caught.value.public


def test_a_diverged_seed_is_followed_by_another(
    examples: Callable[..., Any], silent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, hold_out = examples(160), examples(64, seed=1)
    train_epoch, seeds = fit.train_epoch, []

    def first_seed_diverges(*args: Any, **options: Any) -> float:
        if not seeds or options["seed"] == seeds[0]:
            seeds.append(options["seed"])
            raise fit.Diverged
        return train_epoch(*args, **options)

    monkeypatch.setattr(fit, "train_epoch", first_seed_diverges)
    plan = replace(PLAN, members=MEMBERS[:1])
    (surrogate,) = run(data, hold_out, state_of(tmp_path / "a"), silent, plan)
    assert surrogate.attempts == 2
    assert surrogate.seed != seeds[0]


def test_epochs_shrink_with_the_time_and_never_grow() -> None:
    seconds = {"first": 1.0, "second": 3.0}
    assert plan_epochs(MEMBERS, seconds, None) == EPOCHS
    assert plan_epochs(MEMBERS, seconds, 1000) == EPOCHS
    half = plan_epochs(MEMBERS, seconds, 12)
    assert sum(seconds[name] * epochs for name, epochs in half.items()) <= 12
    assert min(half.values()) >= 2
    with pytest.raises(ConfigurationError) as caught:
        plan_epochs(MEMBERS, seconds, 1)
    assert caught.value.code == "minutes"


def test_another_training_may_not_continue_here(tmp_path: Path) -> None:
    state_of(tmp_path / "a")
    assert TrainingState(tmp_path / "a", "one").epochs() == EPOCHS
    with pytest.raises(ConfigurationError) as caught:
        TrainingState(tmp_path / "a", "two").epochs()
    assert caught.value.code == "other-training"
    (tmp_path / "a" / "plan.json").write_text("{ half")
    with pytest.raises(ConfigurationError):
        TrainingState(tmp_path / "a", "one").epochs()


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    with TrainingState(tmp_path / "a", "one").locked():
        with pytest.raises(BusyError) as caught, TrainingState(tmp_path / "a", "one").locked():
            pass
        assert caught.value.code == "training"
    with TrainingState(tmp_path / "a", "one").locked():
        pass


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(StorageError), TrainingState(tmp_path / "a file" / "x", "one").locked():
        pass
