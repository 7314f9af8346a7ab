"""The same gradients from an independent implementation: onnx-ad, in reverse mode."""

from __future__ import annotations

import numpy as np
import pytest

from medveil.models.autodiff import build_gradient

onnx_ad = pytest.importorskip("onnx_ad")

CASES = {
    "convolutions": (
        """
        a = Conv<pads=[1,1,1,1], strides=[2,2]>(image, k1, b1)
        r = Relu(a)
        p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(r)
        f = Flatten(p)
        y = Gemm<transB=1>(f, w, h)
        """,
        (2, 8, 8),
        {"k1": (4, 2, 3, 3), "b1": (4,), "w": (3, 16), "h": (3,)},
    ),
    "normalisation": (
        """
        n = LayerNormalization(image, s, b)
        m = MatMul(n, w)
        g = Sigmoid(m)
        x = Mul(m, g)
        y = LogSoftmax(x)
        """,
        (3, 6),
        {"s": (6,), "b": (6,), "w": (6, 4)},
    ),
    "reductions": (
        "e = Exp(image) l = ReduceLogSumExp<keepdims=1>(e, a) d = Sub(e, l) y = Tanh(d)",
        (3, 4),
        {"a": [2]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_another_implementation_agrees(name, tiny, run, distance):
    small = tiny(*CASES[name])
    model = small.model()
    gradient = build_gradient(model, loss="inner_product")
    extents = [d.dim_value for d in gradient.graph.input[1].type.tensor_type.shape.dim[1:]]
    images, target = small.images(1), np.random.default_rng(9).normal(size=(1, *extents)).astype(np.float32)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1  # onnx-ad wants every extent static
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    for extent in (1, *extents):
        model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = extent
    other = onnx_ad.reverse(model, layout="onnx")
    want = run(other, image=images, adj_y=target[..., None])["adj_image"][..., 0]
    got = run(gradient, image=images, target=target)["gradient"]
    assert distance(got, want) < 1e-5
