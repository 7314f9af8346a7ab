"""A training step in ONNX: the same as torch's, and a gradient of every weight that differences confirm."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from medveil.models.autodiff import build_gradient, build_training_step, fold_parameters
from medveil.models.errors import ConfigurationError

SMALL = """
    a = Conv<pads=[1,1,1,1], strides=[2,1], group=2>(image, k1, c1)
    n = BatchNormalization<momentum=0.9>(a, s, b, m, v)
    r = Relu(n)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    u = ConvTranspose<strides=[2,2]>(p, k2, c2)
    i = InstanceNormalization(u, si, bi)
    q = PRelu(i, slope)
    f = ReduceMean<keepdims=0>(q, space)
    l = LayerNormalization(f, sl, bl)
    h = MatMul(l, w1)
    y = Gemm<transB=1>(h, w2, b2)
"""
WEIGHTS = {
    "k1": (4, 2, 3, 3),
    "c1": (4,),
    "s": (4,),
    "b": (4,),
    "m": (4,),
    "v": np.array([0.5, 1.0, 2.0, 1.5]),
}
WEIGHTS |= {
    "k2": (4, 3, 2, 2),
    "c2": (3,),
    "si": (3,),
    "bi": (3,),
    "slope": (3, 1, 1),
    "sl": (3,),
    "bl": (3,),
}
WEIGHTS |= {"w1": (3, 5), "w2": (4, 5), "b2": (4,), "space": [2, 3]}
TRAINED = WEIGHTS.keys() - {"m", "v", "space"}


@pytest.fixture(scope="module")
def small(tiny):
    return tiny(SMALL, (4, 8, 6), WEIGHTS)


def batch(small, count=6):
    target = np.random.default_rng(2).dirichlet(np.ones(4), count).astype(np.float32)
    return {"image": small.images(count), "target": target}


def test_every_weight_is_trained_and_every_statistic_followed(small):
    training = build_training_step(small.model())
    assert set(training.parameters) == TRAINED
    assert set(training.statistics) == {"m", "v"}
    onnx.checker.check_model(training.model, full_check=True)


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_the_update_of_a_weight_follows_the_slope_of_the_loss(name, small, run):
    training = build_training_step(small.model(), momentum=0.0)
    state = training.initial_state()
    rate = np.array(1.0, np.float32)
    after = training.next_state(run(training.model, learning_rate=rate, **batch(small), **state))
    ours = training.inputs[name]
    gradient = (state[ours] - after[ours]).astype(np.float64)
    direction = np.random.default_rng(5).normal(size=gradient.shape)
    step, losses = 4e-3, []
    for sign in (1, -1):
        moved = state | {ours: (state[ours] + sign * step * direction).astype(np.float32)}
        losses.append(float(run(training.model, learning_rate=rate, **batch(small), **moved)["loss"]))
    slope = (losses[0] - losses[1]) / (2 * step)
    scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
    assert abs(slope - (gradient * direction).sum()) < 0.01 * scale + 1e-4


def test_momentum_and_weight_decay_follow_their_formula(small, run):
    plain, heavy = (
        build_training_step(small.model(), momentum=m, weight_decay=d) for m, d in ((0, 0), (0.9, 0.1))
    )
    rate = np.array(0.5, np.float32)
    state = heavy.initial_state()
    rng = np.random.default_rng(3)
    state |= {
        n: rng.normal(size=a.shape).astype(np.float32) for n, a in state.items() if n.startswith("momentum/")
    }
    kept = {name: array for name, array in state.items() if name in plain.initial_state()}
    with_it = heavy.next_state(run(heavy.model, learning_rate=rate, **batch(small), **state))
    without = plain.next_state(run(plain.model, learning_rate=rate, **batch(small), **kept))
    for ours in (heavy.inputs[name] for name in TRAINED):
        gradient = (state[ours] - without[ours]) / 0.5
        velocity = 0.9 * state[f"momentum/{ours}"] + gradient + 0.1 * state[ours]
        np.testing.assert_allclose(with_it[f"momentum/{ours}"], velocity, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(with_it[ours], state[ours] - 0.5 * velocity, rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss_and_folding_carries_it_over(small, run):
    training = build_training_step(small.model())
    state, losses = training.initial_state(), []
    for _ in range(60):
        outputs = run(training.model, learning_rate=np.array(0.02, np.float32), **batch(small), **state)
        state = training.next_state(outputs)
        losses.append(float(outputs["loss"]))
    assert losses[-1] < losses[0] - 0.2
    trained = fold_parameters(small.model(), training.weights(state))
    before, after = (
        run(build_gradient(model), **batch(small))["loss"].mean() for model in (small.model(), trained)
    )
    assert after < before


def test_folding_back_what_was_there_changes_nothing(small):
    training = build_training_step(small.model())
    folded = fold_parameters(small.model(), training.weights(training.initial_state()))
    for tensor, same in zip(small.model().graph.initializer, folded.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), numpy_helper.to_array(same))


def test_only_the_chosen_weights_are_trained(small):
    training = build_training_step(small.model(), parameters=["w2", "b2"])
    assert set(training.parameters) == {"w2", "b2"}


def test_settings_that_make_no_sense_are_refused(small):
    cases = [
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1e-3}, "weight-decay"),
        ({"parameters": ["ghost"]}, "parameters"),
        ({"parameters": ["m"]}, "parameters"),
    ]
    for settings, code in cases:
        with pytest.raises(ConfigurationError) as refusal:
            build_training_step(small.model(), **settings)
        assert refusal.value.code == code
    with pytest.raises(ConfigurationError):
        fold_parameters(small.model(), {"w2": np.zeros((4, 4), np.float32)})


@pytest.mark.train
@pytest.mark.parametrize(
    ("factory", "settings", "shape", "loss"),
    [
        ("resnet18", {"width": 8}, (3, 16, 16), "cross_entropy"),
        ("densenet", {"growth": 4, "depths": (2, 2)}, (3, 16, 16), "cross_entropy"),
        ("vit", {"size": 16, "width": 24, "depth": 2}, (3, 16, 16), "cross_entropy"),
        ("unet", {"width": 4, "depth": 2, "classes": 3}, (1, 16, 16), "cross_entropy_dice"),
    ],
)
def test_three_steps_are_those_of_torch(factory, settings, shape, loss, networks, export, run, distance):
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    module = getattr(networks, factory)(**settings).eval()
    training = build_training_step(export(module, shape, optimize=False), loss=loss, weight_decay=1e-4)
    assert set(training.parameters) == set(dict(module.named_parameters()))
    state = training.initial_state()
    # torch in double precision is the truth; its own float32 gradients are a thousand times further from it
    module.double().train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(3):
        images = torch.rand(6, *shape)
        logits = module(images.double())
        target = torch.rand_like(logits)
        target = (target / target.sum(1, keepdim=True)).float()
        p = torch.softmax(logits, 1)
        losses = (
            torch.nn.functional.cross_entropy(logits, target.double(), reduction="none").flatten(1).mean(1)
            if logits.ndim > 2
            else torch.nn.functional.cross_entropy(logits, target.double(), reduction="none")
        )
        if loss == "cross_entropy_dice":
            overlap = 2 * (p * target).sum((2, 3)) + 1e-5
            losses = losses + 1 - (overlap / ((p + target).sum((2, 3)) + 1e-5)).mean(1)
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()
        outputs = run(
            training.model,
            image=images.numpy(),
            target=target.numpy(),
            learning_rate=np.array(0.05, np.float32),
            **state,
        )
        state = training.next_state(outputs)
        assert outputs["loss"] == pytest.approx(losses.mean().item(), rel=3e-6)
    torch_state = module.state_dict()
    for name, array in training.weights(state).items():
        want = torch_state[name].numpy()
        assert np.linalg.norm(array - want) < 1e-4 * max(np.linalg.norm(want), 1.0)
