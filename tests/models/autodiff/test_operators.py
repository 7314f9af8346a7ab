"""Every operator's derivative against central differences in float64, in both dialects, at two batch sizes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from medveil.models.autodiff import OPERATORS, build_gradient
from medveil.models.autodiff.operators import ZERO_DERIVATIVE
from medveil.models.autodiff.rules import RULES

IMAGE = (2, 5, 6)
VOLUME = (2, 4, 3, 4)
PER_CHANNEL = {"s": (2,), "b": (2,)}

UNARY = ("Abs", "Cos", "Sin", "Neg", "Exp", "Erf", "Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Mish")
RECTIFIERS = ("HardSwish", "Identity", "Dropout", "Elu", "Selu", "Celu", "LeakyRelu", "Gelu")
REDUCTIONS = ("Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp")


def _unary(op: str) -> tuple[str, tuple[int, ...], dict]:
    return f"y = {op}(image)", IMAGE, {}


def _resize(shape: tuple[int, ...], scales: list[float], attributes: str) -> tuple:
    return f"y = Resize<{attributes}>(image, , scales)", shape, {"scales": np.array([1.0, 1.0, *scales])}


# name: (what happens to the image, shape of one image, weights); "+" before the name: positive pixels
CASES: dict[str, tuple[str, tuple[int, ...], dict]] = {
    **{op: _unary(op) for op in UNARY},
    **{op: _unary(op) for op in RECTIFIERS},
    **{f"+{op}": _unary(op) for op in ("Log", "Sqrt", "Reciprocal")},
    "Gelu tanh": ('y = Gelu<approximate="tanh">(image)', IMAGE, {}),
    "Elu alpha": ("y = Elu<alpha=0.7>(image)", IMAGE, {}),
    "Celu alpha": ("y = Celu<alpha=0.7>(image)", IMAGE, {}),
    "LeakyRelu steep": ("y = LeakyRelu<alpha=1.5>(image)", IMAGE, {}),
    "HardSigmoid": ("y = HardSigmoid<alpha=0.4>(image)", IMAGE, {}),
    "PRelu": ("y = PRelu(image, s)", IMAGE, {"s": (2, 1, 1)}),
    "PRelu both": ("t = Sin(image) y = PRelu(image, t)", IMAGE, {}),
    "Clip": ("y = Clip(image, low, high)", IMAGE, {"low": np.array(-0.5), "high": np.array(0.7)}),
    "Clip below": ("y = Clip(image, low)", IMAGE, {"low": np.array(0.0)}),
    "Clip wide": ("y = Clip(image, low, high)", IMAGE, {"low": np.array(-1e30), "high": np.array(500.0)}),
    "Cast": (
        "c = Greater(image, w) f = Cast<to=1>(c) z = Mul(f, image) y = Cast<to=1>(z)",
        IMAGE,
        {"w": np.array(0.0)},
    ),
    "CastLike": (
        "c = Greater(image, w) f = CastLike(c, w) z = Mul(f, image) y = CastLike(z, w)",
        IMAGE,
        {"w": np.array(0.0)},
    ),
    # two and more operands
    **{
        f"{op} broadcast": (f"t = Cos(image) y = {op}(t, w)", IMAGE, {"w": (5, 1)})
        for op in ("Add", "Sub", "Mul")
    },
    **{
        f"{op} shared": (f"t = ReduceMean<keepdims=1>(image, a) y = {op}(image, t)", IMAGE, {"a": [2, 3]})
        for op in ("Add", "Sub", "Mul", "Div")
    },
    "Div constant": ("y = Div(w, image)", IMAGE, {"w": (2, 1, 1)}),
    "Sum": ("t = Sin(image) u = Cos(image) y = Sum(image, t, u, w)", IMAGE, {"w": (1, 6)}),
    "Mean": ("t = Sin(image) y = Mean(image, t)", IMAGE, {}),
    "Max": ("t = Sin(image) y = Max(image, t, w)", IMAGE, {"w": (5, 6)}),
    "Min": ("y = Min(image, w)", IMAGE, {"w": (1,)}),
    "Pow square": ("y = Pow(image, p)", IMAGE, {"p": np.array(2.0)}),
    "Pow cube": ("y = Pow(image, p)", IMAGE, {"p": np.array(3.0)}),
    "+Pow half": ("y = Pow(image, p)", IMAGE, {"p": np.array(0.5)}),
    "+Pow exponent": ("t = Sin(image) y = Pow(image, t)", IMAGE, {}),
    "+Pow vector": ("y = Pow(image, p)", IMAGE, {"p": np.array([1.0, 2.0, 0.0, 1.5, 3.0, -1.0])}),
    "Where": ("c = Greater(image, w) t = Sin(image) y = Where(c, t, image)", IMAGE, {"w": (1, 6)}),
    # linear algebra
    "Gemm": ("y = Gemm<alpha=0.5, beta=2.0>(image, w, b)", (7,), {"w": (7, 4), "b": (4,)}),
    "Gemm transB": ("y = Gemm<transB=1>(image, w)", (7,), {"w": (4, 7)}),
    "Gemm transA": (
        "t = Transpose<perm=[1,0]>(image) z = Gemm<transA=1, transB=1, alpha=2.0>(t, w) y = Sin(z)",
        (7,),
        {"w": (4, 7)},
    ),
    "MatMul": ("y = MatMul(image, w)", (3, 5), {"w": (5, 4)}),
    "MatMul left": ("y = MatMul(w, image)", (3, 5), {"w": (2, 3)}),
    "MatMul batched": ("t = Transpose<perm=[0,1,3,2]>(image) y = MatMul(image, t)", IMAGE, {}),
    "MatMul broadcast": ("t = Unsqueeze(image, a) y = MatMul(t, w)", (3, 4, 5), {"w": (2, 5, 3), "a": [2]}),
    "MatMul vector": ("y = MatMul(image, w)", (3, 5), {"w": (5,)}),
    "MatMul row vector": ("y = MatMul(w, image)", (3, 5), {"w": (3,)}),
    "Einsum": ('y = Einsum<equation="bchw,hk->bkc">(image, w)', IMAGE, {"w": (5, 3)}),
    "Einsum pair": ('t = Sin(image) y = Einsum<equation="bij,bkj->bik">(image, t)', (3, 4), {}),
    "Einsum ellipsis": ('y = Einsum<equation="...i,ij->...j">(image, w)', (3, 4), {"w": (4, 2)}),
    "Einsum lone": (
        't = ReduceMean<keepdims=0>(image, a) y = Einsum<equation="bij,bj->bj">(image, t)',
        (3, 4),
        {"a": [1]},
    ),
    # convolution
    "Conv": ("y = Conv<pads=[1,1,1,1]>(image, w, b)", IMAGE, {"w": (4, 2, 3, 3), "b": (4,)}),
    "Conv 1x1": ("y = Conv(image, w)", IMAGE, {"w": (4, 2, 1, 1)}),
    "Conv strided": ("y = Conv<strides=[2,3], pads=[1,0,0,2]>(image, w)", (2, 9, 11), {"w": (4, 2, 3, 3)}),
    "Conv stride beyond kernel": ("y = Conv<strides=[4,3]>(image, w)", (2, 11, 9), {"w": (4, 2, 2, 1)}),
    "Conv remainder": ("y = Conv<strides=[4,4]>(image, w)", (2, 8, 8), {"w": (3, 2, 1, 1)}),
    "Conv dilated": ("y = Conv<dilations=[2,3], pads=[2,3,2,3]>(image, w)", (2, 8, 9), {"w": (3, 2, 3, 3)}),
    "Conv dilated strided": (
        "y = Conv<dilations=[2,1], strides=[2,2], pads=[1,1,0,1]>(image, w)",
        (2, 9, 8),
        {"w": (3, 2, 3, 2)},
    ),
    "Conv wide pads": ("y = Conv<pads=[3,4,3,5]>(image, w)", IMAGE, {"w": (3, 2, 3, 3)}),
    "Conv grouped": ("y = Conv<group=2, pads=[1,1,1,1]>(image, w)", (4, 5, 5), {"w": (6, 2, 3, 3)}),
    "Conv depthwise": (
        "y = Conv<group=3, pads=[1,1,1,1], strides=[2,2]>(image, w)",
        (3, 6, 5),
        {"w": (6, 1, 3, 3)},
    ),
    "Conv same": ('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(image, w)', (2, 7, 8), {"w": (3, 2, 3, 4)}),
    "Conv same lower": ('y = Conv<auto_pad="SAME_LOWER">(image, w)', (2, 7, 8), {"w": (3, 2, 3, 4)}),
    "Conv 1-D": ("y = Conv<pads=[1,1]>(image, w)", (2, 9), {"w": (3, 2, 4)}),
    "Conv 3-D": ("y = Conv<pads=[1,1,1,1,1,1]>(image, w)", VOLUME, {"w": (3, 2, 3, 3, 3)}),
    "Conv 3-D strided": ("y = Conv<strides=[2,2,2]>(image, w)", (2, 5, 4, 4), {"w": (3, 2, 2, 2, 2)}),
    "ConvTranspose": (
        "y = ConvTranspose<strides=[2,2]>(image, w, b)",
        (2, 3, 4),
        {"w": (2, 3, 2, 2), "b": (3,)},
    ),
    "ConvTranspose pads": (
        "y = ConvTranspose<strides=[2,3], pads=[1,0,0,1], output_padding=[1,2]>(image, w)",
        (2, 3, 4),
        {"w": (2, 3, 3, 3)},
    ),
    "ConvTranspose grouped": (
        "y = ConvTranspose<group=2, dilations=[2,1], strides=[2,1], output_padding=[1,0]>(image, w)",
        (4, 3, 3),
        {"w": (4, 3, 2, 3)},
    ),
    "ConvTranspose 1-D": ("y = ConvTranspose<strides=[2]>(image, w)", (2, 5), {"w": (2, 3, 3)}),
    "ConvTranspose 3-D": (
        "y = ConvTranspose<strides=[2,2,2]>(image, w)",
        (2, 2, 3, 2),
        {"w": (2, 3, 2, 2, 2)},
    ),
    # pools
    "MaxPool": ("y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(image)", (2, 6, 7), {}),
    "MaxPool ceil": ("y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(image)", (2, 5, 7), {}),
    "MaxPool overlapping": (
        "y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(image)",
        (2, 7, 6),
        {},
    ),
    "MaxPool dilated": (
        "y = MaxPool<kernel_shape=[2,2], strides=[1,1], dilations=[2,1]>(image)",
        (2, 6, 5),
        {},
    ),
    "MaxPool sparse": ("y = MaxPool<kernel_shape=[2,2], strides=[3,3]>(image)", (2, 7, 8), {}),
    "MaxPool 1-D": ("y = MaxPool<kernel_shape=[3], strides=[2]>(image)", (2, 9), {}),
    "MaxPool 3-D": ("y = MaxPool<kernel_shape=[2,2,2], strides=[2,2,2]>(image)", (2, 4, 4, 5), {}),
    "AveragePool": ("y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(image)", (2, 4, 6), {}),
    "AveragePool overlapping": (
        "y = AveragePool<kernel_shape=[3,2], strides=[1,2], pads=[1,0,1,1]>(image)",
        IMAGE,
        {},
    ),
    "AveragePool counting pads": (
        "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>(image)",
        IMAGE,
        {},
    ),
    "AveragePool ceil": (
        "y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(image)",
        (2, 6, 6),
        {},
    ),
    "AveragePool 1-D": ("y = AveragePool<kernel_shape=[3], strides=[2], pads=[1,1]>(image)", (2, 7), {}),
    "AveragePool 3-D": ("y = AveragePool<kernel_shape=[2,2,2], strides=[2,1,2]>(image)", VOLUME, {}),
    "GlobalAveragePool": ("y = GlobalAveragePool(image)", IMAGE, {}),
    "GlobalMaxPool": ("y = GlobalMaxPool(image)", IMAGE, {}),
    "GlobalMaxPool 3-D": ("y = GlobalMaxPool(image)", VOLUME, {}),
    # resampling
    "Resize nearest": _resize(
        IMAGE, [2, 3], 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
    ),
    "Resize nearest half pixel": _resize(IMAGE, [1.5, 2.5], 'mode="nearest"'),
    "Resize nearest down": _resize(IMAGE, [0.6, 0.5], 'mode="nearest", nearest_mode="ceil"'),
    "Resize prefer ceil": _resize(IMAGE, [2.5, 0.5], 'mode="nearest", nearest_mode="round_prefer_ceil"'),
    "Resize linear": _resize(IMAGE, [2, 1.5], 'mode="linear"'),
    "Resize linear corners": _resize(
        IMAGE, [2, 1.5], 'mode="linear", coordinate_transformation_mode="align_corners"'
    ),
    "Resize linear pytorch": _resize(
        IMAGE, [2, 2], 'mode="linear", coordinate_transformation_mode="pytorch_half_pixel"'
    ),
    "Resize linear down": _resize(
        IMAGE, [0.4, 0.5], 'mode="linear", coordinate_transformation_mode="asymmetric"'
    ),
    "Resize cubic": _resize(IMAGE, [2, 1.5], 'mode="cubic"'),
    "Resize nearest 1-D": _resize((2, 5), [2], 'mode="nearest"'),
    "Resize nearest 3-D": _resize(VOLUME, [2, 2, 2], 'mode="nearest"'),
    "Resize linear 3-D": _resize(VOLUME, [2, 2, 1.5], 'mode="linear"'),
    "Resize linear 3-D corners": _resize(
        VOLUME, [2, 2, 2], 'mode="linear", coordinate_transformation_mode="align_corners"'
    ),
    "Resize sizes": ('y = Resize<mode="linear", axes=[2,3]>(image, , , sizes)', IMAGE, {"sizes": [9, 4]}),
    # normalisation
    "BatchNormalization": (
        "y = BatchNormalization<epsilon=0.01>(image, s, b, m, v)",
        IMAGE,
        {**PER_CHANNEL, "m": (2,), "v": np.array([0.5, 2.0])},
    ),
    "InstanceNormalization": ("y = InstanceNormalization(image, s, b)", IMAGE, PER_CHANNEL),
    "InstanceNormalization 3-D": ("y = InstanceNormalization(image, s, b)", VOLUME, PER_CHANNEL),
    "LayerNormalization": ("y = LayerNormalization(image, s, b)", IMAGE, {"s": (6,), "b": (6,)}),
    "LayerNormalization axis": ("y = LayerNormalization<axis=2>(image, s)", IMAGE, {"s": (5, 6)}),
    "GroupNormalization": (
        "y = GroupNormalization<num_groups=2>(image, s, b)",
        (4, 5, 3),
        {"s": (2,), "b": (2,)},
    ),
    "LpNormalization": ("y = LpNormalization<axis=1>(image)", IMAGE, {}),
    "LpNormalization p1": ("y = LpNormalization<axis=2, p=1>(image)", IMAGE, {}),
    "Softmax": ("y = Softmax<axis=1>(image)", IMAGE, {}),
    "LogSoftmax": ("y = LogSoftmax(image)", IMAGE, {}),
    # reduction
    **{
        f"Reduce{op} {keep}": (f"y = Reduce{op}<keepdims={keep}>(image, a)", IMAGE, {"a": [1, -1]})
        for op in REDUCTIONS
        for keep in (0, 1)
    },
    "+ReduceLogSum": ("y = ReduceLogSum<keepdims=0>(image, a)", IMAGE, {"a": [2]}),
    "ReduceSum nothing": ("y = ReduceSum<noop_with_empty_axes=1>(image)", IMAGE, {}),
    "CumSum": ("y = CumSum(image, a)", IMAGE, {"a": np.array(2)}),
    "CumSum reverse": ("y = CumSum<reverse=1, exclusive=1>(image, a)", IMAGE, {"a": np.array(1)}),
    # shape
    "Reshape": ("y = Reshape(image, s)", IMAGE, {"s": [0, -1, 3]}),
    "Reshape merging the batch": (
        "t = Reshape(image, s) u = Softmax(t) y = Reshape(u, r)",
        IMAGE,
        {"s": [-1, 6], "r": [-1, 2, 5, 6]},
    ),
    "Flatten": ("y = Flatten(image)", IMAGE, {}),
    "Transpose": ("t = Transpose<perm=[0,3,1,2]>(image) y = Sin(t)", IMAGE, {}),
    "Transpose reversed": ("t = Transpose(image) u = Sin(t) y = Transpose(u)", IMAGE, {}),
    "Squeeze": ("t = Unsqueeze(image, a) u = Sin(t) y = Squeeze(u, a)", IMAGE, {"a": [1, 4]}),
    "Concat": ("t = Sin(image) y = Concat<axis=2>(image, t)", (2, 3, 4), {}),
    "Split": ("a, b = Split<axis=2>(image, s) t = Sin(a) y = Concat<axis=2>(b, t)", IMAGE, {"s": [2, 3]}),
    "Split part": ("a, b, c = Split<axis=3, num_outputs=3>(image) y = Sin(b)", IMAGE, {}),
    "Slice": ("y = Slice(image, s, e, a)", IMAGE, {"s": [1, -4], "e": [4, 1000], "a": [2, 3]}),
    "Slice stepped": (
        "y = Slice(image, s, e, a, t)",
        IMAGE,
        {"s": [1, 0], "e": [9, 9], "a": [2, -1], "t": [2, 3]},
    ),
    "Slice backwards": (
        "y = Slice(image, s, e, a, t)",
        IMAGE,
        {"s": [-1, 4], "e": [-99, 0], "a": [2, 3], "t": [-2, -1]},
    ),
    "Slice whole batch": ("y = Slice(image, s, e)", IMAGE, {"s": [0, 1], "e": [9223372036854775807, 2]}),
    "Gather one": ("y = Gather<axis=2>(image, i)", IMAGE, {"i": np.array(-2)}),
    "Gather run": ("y = Gather<axis=2>(image, i)", IMAGE, {"i": [1, 2, 3]}),
    "Gather permuted": ("y = Gather<axis=3>(image, i)", IMAGE, {"i": [3, 1, 0, 5, 4, 2]}),
    "Gather repeated": ("y = Gather<axis=2>(image, i)", IMAGE, {"i": np.array([[0, 3], [3, 4]])}),
    "GatherElements": ("i = ArgMax<axis=2>(image) y = GatherElements<axis=2>(image, i)", IMAGE, {}),
    "GatherND": (
        "t = Transpose<perm=[2,1,0,3]>(image) u = GatherND(t, i) y = Transpose<perm=[1,0,2]>(u)",
        IMAGE,
        {"i": np.array([[0, 1], [4, 0], [0, 1]])},
    ),
    "Pad": ("y = Pad(image, p)", IMAGE, {"p": [0, 0, 1, 2, 0, 1, 0, 3]}),
    "Pad axes": ("y = Pad(image, p, , a)", IMAGE, {"p": [1, -1, -2, 3], "a": [2, 3]}),
    **{
        f"Pad {mode}": (f'y = Pad<mode="{mode}">(image, p)', IMAGE, {"p": [0, 0, 1, 2, 0, 0, 2, 3]})
        for mode in ("edge", "reflect", "wrap")
    },
    "Expand": (
        "t = ReduceMean(image, a) u = Expand(t, s) y = Mul(u, image)",
        IMAGE,
        {"a": [2], "s": [2, 5, 6]},
    ),
    "Tile": ("y = Tile(image, r)", IMAGE, {"r": [1, 1, 2, 3]}),
    "Tile ones": ("t = ReduceMean(image, a) y = Tile(t, r)", IMAGE, {"a": [2], "r": [1, 1, 4, 1]}),
    "DepthToSpace": ("y = DepthToSpace<blocksize=2>(image)", (8, 2, 3), {}),
    "DepthToSpace CRD": ('y = DepthToSpace<blocksize=2, mode="CRD">(image)', (8, 2, 3), {}),
    "SpaceToDepth": ("y = SpaceToDepth<blocksize=2>(image)", (2, 4, 6), {}),
    "Trilu": ("y = Trilu<upper=0>(image, k)", (2, 4, 4), {"k": np.array(1)}),
    # a value that several nodes read, and one whose derivative is zero
    "fan-out": ("a = Sin(image) b = Mul(a, a) c = Add(b, a) y = Mul(c, image)", IMAGE, {}),
    "zero derivative": ("f = Floor(image) s = Sign(f) y = Mul(s, image)", IMAGE, {}),
}

# The reference evaluator computes Erf in float32, casts on its own terms, refuses negative pads, 3-D global
# pools and groups in ConvTranspose, and forgets the absolute value of the 1-norm: there the differences are
# taken in onnxruntime, in float32.
IN_RUNTIME = {
    "Cast",
    "ConvTranspose grouped",
    "Erf",
    "Gelu",
    "GlobalMaxPool 3-D",
    "LpNormalization p1",
    "Pad axes",
}
TOLERANCE = {False: 2e-5, True: 2e-3}


@pytest.mark.parametrize("dialect", ["cpu", "portable"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_limit_of_differences(name, dialect, tiny, run, finite_differences, distance):
    body, shape, weights = CASES[name]
    small = tiny(body, shape, weights, positive=name.startswith("+"))
    model = small.model()
    gradient = build_gradient(model, loss="inner_product", dialect=dialect)
    onnx.checker.check_model(gradient, full_check=True)
    for count in (1, 3):
        images = small.images(count)
        target = _cotangent(gradient, count)
        got = run(gradient, image=images, target=target)
        in_runtime = name in IN_RUNTIME
        want = finite_differences(model, images, target, in_runtime=in_runtime)
        assert distance(got["gradient"], want) < TOLERANCE[in_runtime]


@pytest.mark.parametrize("opset", [13, 14, 15, 17, 18, 20, 21, 22])
def test_every_supported_opset_gives_the_same_gradient(opset, tiny, run):
    body = """
        a = Conv<pads=[1,1,1,1]>(image, w)
        n = BatchNormalization(a, s, b, m, v)
        r = Relu(n)
        p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(r)
        f = Flatten(p)
        y = Softmax<axis=-1>(f)
    """
    weights = {"w": (3, 2, 3, 3), "s": (3,), "b": (3,), "m": (3,), "v": np.array([0.5, 1.0, 2.0])}
    results = []
    for version in (20, opset):
        model = tiny(body, (2, 4, 6), weights, opset=version).model()
        gradient = build_gradient(model, loss="inner_product")
        images = tiny(body, (2, 4, 6)).images(2)
        results.append(run(gradient, image=images, target=_cotangent(gradient, 2))["gradient"])
    np.testing.assert_array_equal(*results)


def test_group_normalization_of_opset_21_scales_every_channel(tiny, run, finite_differences, distance):
    small = tiny(
        "y = GroupNormalization<num_groups=2>(image, s, b)", (4, 5, 3), {"s": (4,), "b": (4,)}, opset=21
    )
    gradient = build_gradient(small.model(), loss="inner_product")
    images, target = small.images(3), _cotangent(gradient, 3)
    got = run(gradient, image=images, target=target)
    assert (
        distance(got["gradient"], finite_differences(small.model(), images, target, in_runtime=True)) < 2e-3
    )


def test_every_operator_with_a_rule_is_in_the_table_of_cases():
    text = " ".join(body for body, _, _ in CASES.values())
    assert {op for op in RULES if f"{op}(" not in text and f"{op}<" not in text} == set()


def test_every_admitted_operator_has_a_rule_or_a_reason():
    handled = RULES.keys() | ZERO_DERIVATIVE
    assert OPERATORS.keys() - handled == {
        "GroupNormalization",
        "Mod",
        "ReduceProd",
    }  # rewritten or folded away
    assert handled <= OPERATORS.keys()


def _cotangent(gradient: onnx.ModelProto, count: int) -> np.ndarray:
    extents = [d.dim_value for d in gradient.graph.input[1].type.tensor_type.shape.dim[1:]]
    return np.random.default_rng(7).normal(size=(count, *extents)).astype(np.float32)
