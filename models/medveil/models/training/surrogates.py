"""Train the ensemble: plan the epochs, train member after member, refuse what learned nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import nn

from medveil.models.bundle.manifest import Scores
from medveil.models.errors import ConfigurationError, InputError
from medveil.models.training import fit
from medveil.models.training.fit import Diverged, Examples
from medveil.models.training.plan import Member, Plan
from medveil.models.training.state import TrainingState

__all__ = ["Reporter", "Surrogate", "plan_epochs", "train_ensemble"]

# Fewer epochs than this and batch norm's running statistics are those of the first, wild steps.
FEWEST_EPOCHS = 2
# A surrogate that separates the classes no better than this teaches nothing about them (our choice, far below
# what a weak but honest net reaches on a hard task).
LEAST_AUC = 0.6
LEAST_GAIN = 0.05  # balanced accuracy above chance


class Reporter(Protocol):
    """Who wants to know how far it is."""

    def stage(self, text: str) -> None:
        """A new stage began."""
        ...

    def advance(self, seconds: float) -> None:
        """Work was done that had been estimated to take this long."""
        ...


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A finished member, with what the manifest says about it."""

    member: Member
    net: nn.Module
    seed: int
    attempts: int
    epochs: int
    hold_out: Scores


def plan_epochs(
    members: tuple[Member, ...], seconds_per_epoch: Mapping[str, float], limit_s: float | None
) -> dict[str, int]:
    """Return the epochs of each member: the plan's own, or the same share of them for all when time binds.

    Args:
        members: the ensemble.
        seconds_per_epoch: measured, by member name.
        limit_s: seconds for all members together; None: no limit.

    Raises:
        ConfigurationError: "minutes": not even the fewest epochs fit.
    """
    wanted = {m.name: m.epochs for m in members}
    total_s = sum(seconds_per_epoch[name] * epochs for name, epochs in wanted.items())
    if limit_s is None or total_s <= limit_s:
        return wanted
    share = limit_s / total_s
    planned = {name: max(FEWEST_EPOCHS, int(epochs * share)) for name, epochs in wanted.items()}
    planned = {name: min(epochs, wanted[name]) for name, epochs in planned.items()}
    # What the lower bound takes from some members, the others do not get: a small overrun is no reason to refuse.
    if sum(seconds_per_epoch[name] * epochs for name, epochs in planned.items()) > 2 * limit_s:
        raise ConfigurationError("minutes", "The time is too short for this data; allow more --minutes.")
    return planned


def train_ensemble(
    plan: Plan,
    data: Examples,
    hold_out: Examples,
    *,
    seed: int,
    epochs: Mapping[str, int],
    seconds_per_epoch: Mapping[str, float],
    state: TrainingState,
    reporter: Reporter,
) -> tuple[Surrogate, ...]:
    """Train every member, or take up those that an earlier run finished.

    Args:
        plan: members, and how many seeds each may try.
        data: public images to learn from.
        hold_out: public images to measure quality on.
        seed: of the whole training; each member and attempt derives its own.
        epochs: per member, from `plan_epochs`.
        seconds_per_epoch: per member, for the reporter.
        state: where progress is kept.
        reporter: told of stages and of work done.

    Raises:
        InputError: "degenerate-surrogate": a member learned nothing with any seed.
    """
    finished = []
    for number, member in enumerate(plan.members):
        reporter.stage(f"{member.name} ({number + 1} of {len(plan.members)})")
        finished.append(
            _train_member(
                member,
                data,
                hold_out,
                seeds=[_seed(seed, number, attempt) for attempt in range(plan.attempts)],
                epochs=epochs[member.name],
                state=state,
                on_images=_in_seconds(reporter, seconds_per_epoch[member.name] / len(data)),
            )
        )
    return tuple(finished)


def _in_seconds(reporter: Reporter, seconds_per_image: float) -> Callable[[int], None]:
    return lambda images: reporter.advance(images * seconds_per_image)


def _seed(seed: int, member: int, attempt: int) -> int:
    """Return a seed of its own for each member and attempt."""
    return int(np.random.SeedSequence((seed, member, attempt)).generate_state(1)[0])


def _train_member(
    member: Member,
    data: Examples,
    hold_out: Examples,
    *,
    seeds: list[int],
    epochs: int,
    state: TrainingState,
    on_images: Callable[[int], None],
) -> Surrogate:
    kept = state.load(f"{member.name}.finished")
    if kept is not None:
        net = fit.new_net(member.architecture, data, seeds[0])
        net.load_state_dict(kept["net"])
        on_images(epochs * len(data))
        hold_out_scores, _ = fit.score(net, hold_out)
        return Surrogate(member, net, kept["seed"], kept["attempts"], epochs, hold_out_scores)
    reasons = []
    for attempt, seed in enumerate(seeds):
        trained = _train_attempt(member, data, seed, attempt, epochs, state, on_images)
        if trained is None:
            reasons.append("its loss is not a number")
            continue
        scores, answered = fit.score(trained, hold_out)
        reason = _degenerate(scores, answered, data.classes)
        if reason is None:
            finished = {"net": trained.state_dict(), "seed": seed, "attempts": attempt + 1}
            state.keep(f"{member.name}.finished", finished)
            state.drop(f"{member.name}.partial")
            return Surrogate(member, trained, seed, attempt + 1, epochs, scores)
        reasons.append(reason)
    raise InputError(
        "degenerate-surrogate",
        f"The surrogate {member.name} learns nothing from this data ({reasons[-1]}) with {len(seeds)} seeds; "
        "check the labels, or train on more images.",
    )


def _train_attempt(
    member: Member,
    data: Examples,
    seed: int,
    attempt: int,
    epochs: int,
    state: TrainingState,
    on_images: Callable[[int], None],
) -> nn.Module | None:
    """Return the trained net, from its last finished epoch on; None if the loss left the numbers."""
    net = fit.new_net(member.architecture, data, seed)
    optimiser = fit.new_optimiser(net, member.architecture)
    first = 0
    partial = state.load(f"{member.name}.partial")
    if partial is not None:
        if partial["attempt"] > attempt:  # this attempt ended, badly, before the process was killed
            return None
        if partial["attempt"] == attempt:
            net.load_state_dict(partial["net"])
            optimiser.load_state_dict(partial["optimiser"])
            first = partial["epochs"]
            on_images(first * len(data))
    for epoch in range(first, epochs):
        try:
            fit.train_epoch(
                net, optimiser, data, member, epoch=epoch, epochs=epochs, seed=seed, on_images=on_images
            )
        except Diverged:
            return None
        state.keep(
            f"{member.name}.partial",
            {
                "net": net.state_dict(),
                "optimiser": optimiser.state_dict(),
                "attempt": attempt,
                "epochs": epoch + 1,
            },
        )
    return net


def _degenerate(scores: Scores, answered: int, classes: int) -> str | None:
    """Return why a surrogate is of no use, in words; None if it is of use."""
    if answered == 0:
        return "its answers are not numbers"
    if answered == 1:
        return "it gives every image the same class"
    if scores.auc < LEAST_AUC or scores.balanced_accuracy < 1 / classes + LEAST_GAIN:
        return f"balanced accuracy {scores.balanced_accuracy:.2f}, AUC {scores.auc:.2f}"
    return None


def parameters(net: nn.Module) -> int:
    """Return the number of trainable values."""
    return sum(p.numel() for p in net.parameters())
