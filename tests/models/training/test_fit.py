from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from medveil.models.training import fit  # noqa: E402 (needs torch)
from medveil.models.training.plan import Augmentation, Member  # noqa: E402

pytestmark = pytest.mark.train

MEMBER = Member(name="m", architecture="resnet", batch_size=16)
Draw = Callable[..., Any]


def weights_after(member: Member, data: Any, *, seed: int = 3, epochs: int = 2) -> torch.Tensor:
    net = fit.new_net(member.architecture, data, seed)
    optimiser = fit.new_optimiser(net, member.architecture)
    for epoch in range(epochs):
        fit.train_epoch(net, optimiser, data, member, epoch=epoch, epochs=epochs, seed=seed)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(examples: Draw) -> None:
    data = examples(64)
    first = weights_after(MEMBER, data)
    torch.rand(7)  # the global generator has no say
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(first, weights_after(MEMBER, data))
    assert not torch.equal(first, weights_after(MEMBER, data, seed=4))


def test_training_leaves_the_global_generator_alone(examples: Draw) -> None:
    before = torch.random.get_rng_state()
    weights_after(MEMBER, examples(64), epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "change",
    [
        {"augmentation": Augmentation()},
        {"augmentation": Augmentation(shift=2, flip=True, blur_sigma=1.0, noise=0.1)},
        {"adversarial_255": 2.0},
        {"label_smoothing": 0.1},
        {"architecture": "mlp"},
    ],
)
def test_every_training_option_learns_and_changes_the_result(
    examples: Draw, change: dict[str, object]
) -> None:
    data = examples(96)
    member = replace(MEMBER, **change)  # type: ignore[arg-type]
    net = fit.new_net(member.architecture, data, 0)
    optimiser = fit.new_optimiser(net, member.architecture)
    losses = [fit.train_epoch(net, optimiser, data, member, epoch=e, epochs=6, seed=0) for e in range(6)]
    assert losses[-1] < losses[0]
    assert not torch.equal(weights_after(member, data), weights_after(MEMBER, data))


def test_a_loss_that_is_no_number_stops_the_run(examples: Draw) -> None:
    data = examples(32)
    net = fit.new_net("mlp", data, 0)
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    with pytest.raises(fit.Diverged):
        fit.train_epoch(net, fit.new_optimiser(net, "mlp"), data, MEMBER, epoch=0, epochs=1, seed=0)
    scores, answered = fit.score(net, data)
    assert (scores.auc, answered) == (0, 0)


@pytest.mark.parametrize("counts", [[90, 10], [50, 50], [97, 2, 1]])
def test_an_epoch_shows_every_class_equally_and_leaves_no_image_of_a_rare_one_out(
    counts: list[int], rng: np.random.Generator
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    order = fit.balanced_order(labels, rng)
    shown = np.bincount(labels[order])
    assert shown.max() == shown.min()
    assert abs(len(order) - len(labels)) < len(counts)
    for rare in np.flatnonzero(np.array(counts) <= shown[0]):
        assert set(np.flatnonzero(labels == rare)) <= set(order)


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [fit.learning_rate(1.0, step, 100) for step in range(100)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(1.0)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.01


def test_an_epochs_time_grows_with_the_data(examples: Draw) -> None:
    small = fit.seconds_per_epoch(replace(MEMBER, architecture="vgg"), examples(64))
    large = fit.seconds_per_epoch(replace(MEMBER, architecture="vgg"), examples(1024))
    assert large > 2 * small
