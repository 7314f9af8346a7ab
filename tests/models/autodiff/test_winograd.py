"""Minimal filtering: the same convolution and the same gradient, for any extent and padding, in any batch."""

from __future__ import annotations

import numpy as np
import pytest

from medveil.models.autodiff import build_gradient

# An image of 1 channel is spread over many by a 1x1 convolution, so that finite differences stay cheap.
BODY = """
    a = Conv(image, spread)
    r = Relu(a)
    c = Conv<pads={pads}{more}>(r, k, b)
    s = Relu(c)
    y = Conv(s, gather)
"""


def network(tiny, rows, columns, pads="[1,1,1,1]", more="", channels=(128, 144)):
    inputs, outputs = channels
    rng = np.random.default_rng(7)
    weights = {
        "spread": rng.normal(size=(inputs, 1, 1, 1)),
        "k": rng.normal(size=(outputs, inputs, 3, 3)) / np.sqrt(9 * inputs),
        "b": rng.normal(size=outputs),
        "gather": rng.normal(size=(2, outputs, 1, 1)),
    }
    return tiny(BODY.format(pads=pads, more=more), (1, rows, columns), weights)


def is_filtered(gradient):
    """Whether the graph holds the transform of a kernel: 16 products from 9 weights."""
    return any(tuple(tensor.dims) == (16, 9) for tensor in gradient.graph.initializer)


def answers(gradient, images, run):
    logits = [d.dim_value for d in gradient.graph.input[1].type.tensor_type.shape.dim[1:]]
    target = np.random.default_rng(2).normal(size=(len(images), *logits)).astype(np.float32)
    return run(gradient, image=images, target=target)


@pytest.mark.parametrize(
    ("rows", "columns", "pads"),
    [(4, 4, "[1,1,1,1]"), (6, 4, "[1,1,1,1]"), (5, 6, "[1,0,0,0]"), (6, 4, "[0,2,0,0]")],
)
def test_filtering_changes_neither_the_answer_nor_the_gradient(tiny, run, distance, rows, columns, pads):
    small = network(tiny, rows, columns, pads, channels=(512, 528))
    filtered, plain = (
        build_gradient(small.model(), loss="inner_product", dialect=d) for d in ("cpu", "portable")
    )
    assert is_filtered(filtered)
    assert not is_filtered(plain)
    got, want = (answers(gradient, small.images(3), run) for gradient in (filtered, plain))
    for output in ("logits", "gradient"):
        assert distance(got[output], want[output]) < 1e-5


def test_a_filtered_gradient_is_the_derivative(tiny, run, finite_differences, distance):
    small = network(tiny, 4, 4, channels=(256, 256))
    gradient = build_gradient(small.model(), loss="inner_product")
    assert is_filtered(gradient)
    images = small.images(2)
    target = np.random.default_rng(5).normal(size=(2, 2, 4, 4)).astype(np.float32)
    want = finite_differences(small.model(), images, target)
    assert distance(run(gradient, image=images, target=target)["gradient"], want) < 2e-5


def test_an_image_gets_the_same_bits_in_any_batch(tiny, run):
    small = network(tiny, 4, 4, channels=(256, 272))
    gradient = build_gradient(small.model(), loss="inner_product")
    assert is_filtered(gradient)
    logits = [d.dim_value for d in gradient.graph.input[1].type.tensor_type.shape.dim[1:]]
    images = small.images(6)
    target = np.random.default_rng(3).normal(size=(6, *logits)).astype(np.float32)
    together = run(gradient, image=images, target=target)
    for size in (1, 4):
        pieces = [slice(i, i + size) for i in range(0, 6, size)]
        parts = [run(gradient, image=images[piece], target=target[piece]) for piece in pieces]
        for output in ("logits", "gradient"):
            np.testing.assert_array_equal(np.concatenate([part[output] for part in parts]), together[output])


@pytest.mark.parametrize(
    ("extents", "more", "channels"),
    [
        ((4, 4), "", (64, 4096)),
        ((7, 7), ", strides=[2,2]", (256, 256)),
        ((4, 4), ", dilations=[2,2]", (256, 256)),
        ((2, 2), "", (256, 256)),
        ((8, 8), "", (256, 256)),
    ],
)
def test_what_would_gain_nothing_stays_a_convolution(tiny, extents, more, channels):
    small = network(
        tiny, *extents, pads="[2,2,2,2]" if "dilations" in more else "[1,1,1,1]", more=more, channels=channels
    )
    assert not is_filtered(build_gradient(small.model(), loss="inner_product"))


def test_each_weight_is_in_the_graph_once(tiny):
    model = network(tiny, 4, 4, channels=(256, 256)).model()
    gradient = build_gradient(model, loss="inner_product")
    assert is_filtered(gradient)
    assert len(gradient.SerializeToString()) < len(model.SerializeToString()) + 20_000
