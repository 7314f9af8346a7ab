"""The gradient graph as a whole: its contract, its losses, and that an image's answer is its own."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from medveil.models.autodiff import build_gradient
from medveil.models.errors import AdmissionError, ConfigurationError

# Small networks of the kinds that a runtime may treat differently by batch: one product for all images or one each.
PERCEPTRON = """
    f = Flatten(image)
    a = Gemm<transB=1>(f, w1, b1)
    r = Relu(a)
    y = Gemm<transB=1>(r, w2, b2)
"""
CONVOLUTIONS = """
    a = Conv<pads=[1,1,1,1]>(image, k1)
    n = BatchNormalization(a, s, b, m, v)
    r = Relu(n)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    c = Conv<pads=[1,1,1,1], strides=[2,2]>(p, k2)
    d = Elu(c)
    g = ReduceMean<keepdims=0>(d, space)
    y = Gemm(g, w, h)
"""
ATTENTION = """
    t = Reshape(image, tokens)
    e = MatMul(t, embed)
    n = LayerNormalization(e, s, b)
    k = Transpose<perm=[0,2,1]>(n)
    a = MatMul(n, k)
    p = Softmax(a)
    u = MatMul(p, n)
    x = Gelu(u)
    q = ReduceMean<keepdims=0>(x, one)
    y = MatMul(q, head)
"""
UNET = """
    a = Conv<pads=[1,1,1,1]>(image, k1)
    r = Relu(a)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    u = ConvTranspose<strides=[2,2]>(p, k2)
    j = Concat<axis=1>(u, r)
    y = Conv(j, k3)
"""
NETWORKS = {
    "perceptron": (PERCEPTRON, (1, 7, 7), {"w1": (33, 49), "b1": (33,), "w2": (9, 33), "b2": (9,)}),
    "convolutions": (
        CONVOLUTIONS,
        (3, 10, 10),
        {"k1": (8, 3, 3, 3), "s": (8,), "b": (8,), "m": (8,), "v": np.full(8, 0.7), "k2": (5, 8, 3, 3)}
        | {"space": [2, 3], "w": (5, 10), "h": (10,)},
    ),
    "attention": (
        ATTENTION,
        (1, 6, 10),
        {"tokens": [0, 5, 12], "embed": (12, 16), "s": (16,), "b": (16,), "one": [1], "head": (16, 3)},
    ),
    "unet": (UNET, (1, 6, 8), {"k1": (6, 1, 3, 3), "k2": (6, 6, 2, 2), "k3": (3, 12, 1, 1)}),
}  # fmt: skip


def targets(gradient: onnx.ModelProto, count: int) -> np.ndarray:
    extents = [d.dim_value for d in gradient.graph.input[1].type.tensor_type.shape.dim[1:]]
    drawn = np.random.default_rng(4).uniform(size=(count, *extents)).astype(np.float32)
    return drawn / drawn.sum(1, keepdims=True)


@pytest.mark.parametrize("dialect", ["cpu", "portable"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_gets_the_same_bits_in_any_batch(name, dialect, tiny, run):
    small = tiny(*NETWORKS[name])
    gradient = build_gradient(small.model(), dialect=dialect)
    images, target = small.images(24), targets(gradient, 24)
    together = run(gradient, image=images, target=target)
    for size in (1, 2, 3, 5, 8):
        pieces = [slice(i, i + size) for i in range(0, 24, size)]
        parts = [run(gradient, image=images[piece], target=target[piece]) for piece in pieces]
        for output in ("loss", "gradient", "logits"):
            np.testing.assert_array_equal(np.concatenate([part[output] for part in parts]), together[output])


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_a_batch_changes_nothing(name, tiny, run):
    small = tiny(*NETWORKS[name])
    gradient = build_gradient(small.model())
    images, target = small.images(8), targets(gradient, 8)
    padded = images.copy()
    padded[5:] = 0
    want, got = (run(gradient, image=x, target=target)["gradient"][:5] for x in (images, padded))
    np.testing.assert_array_equal(got, want)


def test_a_convolution_of_joined_channels_is_taken_apart_exactly(tiny, run, finite_differences, distance):
    body = """
        a = Conv(image, k1)
        r = Relu(a)
        c = Conv(image, k2)
        j = Concat<axis=1>(r, c, r)
        n = Conv<pads=[1,1,1,1]>(j, k3, bias)
        y = BatchNormalization(n, s, b, m, v)
    """
    weights = {"k1": (16, 1, 1, 1), "k2": (32, 1, 1, 1), "k3": (3, 64, 3, 3), "bias": (3,)}
    weights |= {"s": (3,), "b": (3,), "m": (3,), "v": np.array([0.5, 1.0, 2.0])}
    small = tiny(body, (1, 3, 4), weights)
    gradient = build_gradient(small.model(), loss="inner_product")
    assert not {"Concat", "BatchNormalization"} & {node.op_type for node in gradient.graph.node}
    images, target = small.images(2), targets(gradient, 2)
    want = finite_differences(small.model(), images, target)
    assert distance(run(gradient, image=images, target=target)["gradient"], want) < 2e-5


def test_the_graph_keeps_its_contract(tiny):
    gradient = build_gradient(tiny(*NETWORKS["convolutions"]).model())
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*gradient.graph.input, *gradient.graph.output)
    }
    assert shapes == {
        "image": ["batch", 3, 10, 10],
        "target": ["batch", 10],
        "loss": ["batch"],
        "gradient": ["batch", 3, 10, 10],
        "logits": ["batch", 10],
    }
    assert [(entry.domain, entry.version) for entry in gradient.opset_import] == [("", 20)]
    onnx.checker.check_model(gradient, full_check=True)


def test_a_portable_graph_holds_nothing_that_only_the_cpu_has(tiny):
    small = tiny(*NETWORKS["unet"])
    operators = {
        d: {n.op_type for n in build_gradient(small.model(), dialect=d).graph.node}
        for d in ("cpu", "portable")
    }
    assert {"MaxUnpool", "HardSigmoid"} <= operators["cpu"]
    assert not {"MaxUnpool", "HardSigmoid"} & operators["portable"]


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize(
    ("loss", "space"),
    [
        ("cross_entropy", ()),
        ("cross_entropy", (3, 4)),
        ("cross_entropy", (4, 4)),
        ("cross_entropy_dice", (3, 4)),
        ("cross_entropy_dice", (4, 4)),
    ],
)
def test_each_loss_is_its_formula_and_its_gradient_the_derivative(loss, space, classes, tiny, run):
    small = tiny("y = Mul(image, two)", (classes, *space), {"two": np.array(2.0)})
    gradient = build_gradient(small.model(), loss=loss)
    images = small.images(3)
    target = np.random.default_rng(8).uniform(size=images.shape).astype(np.float32)

    def formula(x: np.ndarray) -> np.ndarray:
        z = 2 * x.astype(np.float64)
        if classes == 1:
            p = 1 / (1 + np.exp(-z))
            each = -(target * np.log(p) + (1 - target) * np.log(1 - p))
        else:
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            each = -(target * np.log(p))
        flat = each.reshape(len(x), classes, -1)
        entropy = flat.sum(1).mean(1)
        if loss == "cross_entropy":
            return entropy
        p, t = (a.reshape(len(x), classes, -1) for a in (p, target))
        dice = (2 * (p * t).sum(2) + 1e-5) / ((p + t).sum(2) + 1e-5)
        return entropy + 1 - dice.mean(1)

    got = run(gradient, image=images, target=target)
    np.testing.assert_allclose(got["loss"], formula(images), rtol=1e-5)
    want = np.zeros(images.shape)
    for index in np.ndindex(*images.shape[1:]):
        shift = np.zeros(images.shape[1:])
        shift[index] = 1e-5
        want[(slice(None), *index)] = (formula(images + shift) - formula(images - shift)) / 2e-5
    np.testing.assert_allclose(got["gradient"], want, rtol=1e-3, atol=1e-6)


def test_confident_logits_leave_no_infinities(tiny, run):
    gradient = build_gradient(tiny("y = Mul(image, big)", (3,), {"big": np.array(1e4)}).model())
    got = run(gradient, image=np.array([[1, 0, -1]], np.float32), target=np.array([[0, 1, 0]], np.float32))
    assert np.isfinite(got["loss"]).all()
    assert np.isfinite(got["gradient"]).all()


@pytest.mark.parametrize("dialect", ["cpu", "portable"])
def test_of_equals_in_a_window_the_first_gets_the_gradient(dialect, tiny, run):
    small = tiny("y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(image)", (1, 2, 4))
    gradient = build_gradient(small.model(), loss="inner_product", dialect=dialect)
    got = run(gradient, image=np.zeros((2, 1, 2, 4), np.float32), target=np.ones((2, 1, 1, 2), np.float32))
    np.testing.assert_array_equal(got["gradient"][1, 0], [[1, 0, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("dialect", ["cpu", "portable"])
def test_the_gate_of_a_rectifier_is_exactly_nought_or_one(dialect, tiny, run):
    small = tiny("y = Relu(image)", (6,))
    gradient = build_gradient(small.model(), loss="inner_product", dialect=dialect)
    least = float(np.finfo(np.float32).tiny)
    images = np.array([[-3e38, -least, 0.0, least, 1.0, 3e38]], np.float32)
    target = np.full((1, 6), 0.7, np.float32)
    got = run(gradient, image=images, target=target)["gradient"]
    np.testing.assert_array_equal(got, target * [[0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize("dialect", ["cpu", "portable"])
def test_a_clip_passes_nothing_at_its_bounds_and_everything_between(dialect, tiny, run):
    small = tiny("y = Clip(image, low, high)", (6,), {"low": np.array(0.0), "high": np.array(6.0)})
    gradient = build_gradient(small.model(), loss="inner_product", dialect=dialect)
    inside = np.nextafter(np.float32(6), np.float32(0))
    images = np.array([[-1, 0, 1e-30, 3, inside, 6]], np.float32)
    got = run(gradient, image=images, target=np.ones((1, 6), np.float32))["gradient"]
    np.testing.assert_array_equal(got, [[0, 0, 1, 1, 1, 0]])


def test_weights_shared_through_identities_survive(tiny, run):
    """The legacy exporter's way of sharing; onnxruntime 1.31 refuses the session if the Identity stays."""
    body = """
        t = Identity(s)
        a = BatchNormalization(image, t, b, m, v)
        c = Relu(a)
        n = BatchNormalization(c, s, b, m, v)
        y = Relu(n)
    """
    small = tiny(body, (2, 3, 3), {"s": (2,), "b": (2,), "m": (2,), "v": np.array([1.0, 2.0])})
    gradient = build_gradient(small.model(), loss="inner_product")
    assert np.isfinite(run(gradient, image=small.images(2), target=targets(gradient, 2))["gradient"]).all()


def test_shape_arithmetic_of_the_legacy_exporter_is_followed(tiny, run, finite_differences, distance):
    """Shape -> Gather -> Concat -> ConstantOfShape -> Where -> Expand: how a class token is repeated for a batch."""
    body = """
        z = Constant<value_int=0>()
        one = Constant<value_ints=[1]>()
        minus = Constant<value_ints=[-1]>()
        sh = Shape(image)
        n = Gather<axis=0>(sh, z)
        first = Unsqueeze(n, zero)
        want = Concat<axis=0>(first, minus, minus)
        rank = Shape(want)
        ones = ConstantOfShape<value: tensor = int64[1] {1}>(rank)
        unset = Mul(ones, minus)
        equal = Equal(want, unset)
        size = Where(equal, ones, want)
        token = Expand(cls, size)
        j = Concat<axis=1>(token, image)
        y = Softmax<axis=1>(j)
    """
    small = tiny(body, (3, 4), {"cls": (1, 1, 4), "zero": [0]})
    gradient = build_gradient(small.model(), loss="inner_product")
    images, target = small.images(3), targets(gradient, 3)
    want = finite_differences(small.model(), images, target)
    assert distance(run(gradient, image=images, target=target)["gradient"], want) < 2e-5


# -- refusals -----------------------------------------------------------------------------------------------------

REFUSED = {
    "an operator without a rule": ("y = Det(image)", (3, 3), {}, "operator", "Det"),
    "an operator known for shapes only": (
        "t = Floor(image) y = ReduceProd(image, a)", (3, 3), {"a": [1]}, "operator", "ReduceProd"),
    "an unknown attribute": ("y = Relu<leak=1>(image)", (3,), {}, "attribute", "leak"),
    "a wrongly typed attribute": ("y = Elu<alpha=1>(image)", (3,), {}, "attribute", "alpha"),
    "a missing attribute": ("y = Concat(image, image)", (3,), {}, "attribute", "axis"),
    "training-mode batch norm": (
        "y, m2, v2 = BatchNormalization<training_mode=1>(image, s, b, m, v)", (2, 3),
        {"s": (2,), "b": (2,), "m": (2,), "v": np.ones(2)}, "attribute", "training_mode"),
    "an antialiased resize": (
        'y = Resize<mode="linear", antialias=1>(image, , s)', (1, 4, 4), {"s": np.array([1.0, 1.0, 0.5, 0.5])},
        "attribute", "antialias"),
    "dropout in training": (
        "y = Dropout(image, r, t)", (3,), {"r": np.array(0.5), "t": np.array(True)}, "operator", "Dropout"),
    "a diagonal": ('y = Einsum<equation="bii->bi">(image)', (3, 3), {}, "operator", "Einsum"),
    "a look at the neighbour": ("y = Slice(image, s, e, s)", (3,), {"s": [0], "e": [1]}, "operator", "Slice"),
    "half a batch": (
        "l = Shape(image) h = Div(l, two) e = Expand(w, h) s = ReduceSum(image, z) y = Mul(e, s)",
        (2,), {"two": [2, 1], "w": (1, 2), "z": [0]}, "batch", ""),
    "part of a batch": ("y = Gather(image, i)", (3,), {"i": [0]}, "operator", "Gather"),
    "joining the batch to itself": ("y = Concat<axis=0>(image, image)", (3,), {}, "operator", "Concat"),
    "a constant": ("t = Sign(image) y = Abs(t)", (3,), {}, "signature", ""),
    "an undefined value": ("y = Add(image, ghost)", (3,), {}, "undefined", "ghost"),
    "shapes that don't fit": ("y = MatMul(image, w)", (3,), {"w": (4, 2)}, "shape", "MatMul"),
    "a reshape by data": (
        "i = Cast<to=7>(image) f = Reshape(i, l) y = Reshape(image, f)", (1,), {"l": [-1]}, "shape", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_derivative_is_refused_by_name(name, tiny):
    body, shape, weights, code, mentioned = REFUSED[name]
    with pytest.raises(AdmissionError, match=mentioned or None) as refusal:
        build_gradient(tiny(body, shape, weights).model())
    assert refusal.value.code == code


def test_opsets_outside_the_range_are_refused(tiny):
    for opset in (12, 23):
        with pytest.raises(AdmissionError) as refusal:
            build_gradient(tiny("y = Relu(image)", (3,), opset=opset).model())
        assert refusal.value.code == "opset"


def test_a_hostile_operator_name_is_cut_before_it_is_shown(tiny):
    model = tiny("y = Relu(image)", (3,)).model()
    model.graph.node[0].op_type = "/home/someone/\x1b[31m" + "x" * 500
    with pytest.raises(AdmissionError) as refusal:
        build_gradient(model)
    assert "\x1b" not in str(refusal.value)
    assert len(str(refusal.value)) < 150


def test_an_unknown_loss_is_a_configuration_error(tiny):
    with pytest.raises(ConfigurationError) as refusal:
        build_gradient(tiny("y = Relu(image)", (3,)).model(), loss="hinge")
    assert refusal.value.code == "loss"


def test_dice_needs_positions(tiny):
    with pytest.raises(ConfigurationError):
        build_gradient(tiny("y = Relu(image)", (3,)).model(), loss="cross_entropy_dice")
