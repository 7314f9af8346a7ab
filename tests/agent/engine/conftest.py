"""Small nets as ONNX text, of the families whose sums onnxruntime orders differently."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from medveil.models.autodiff.admission import AdmittedGraph, admit

_HEADER = '<ir_version: 10, opset_import: ["": 20]> net'

NETS = {
    "cnn": f"""{_HEADER} (float[batch, 1, 13, 11] image) => (float[batch, 3] logits)
<float[8, 1, 3, 3] w0, float[8] b0, float[12, 8, 3, 3] w1, float[36, 3] w2, float[3] b2>
{{
    a = Conv <pads = [1, 1, 1, 1]> (image, w0, b0)
    b = Relu (a)
    c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
    d = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (c, w1)
    e = Relu (d)
    f = AveragePool <kernel_shape = [1, 1]> (e)
    axes = Constant <value_ints = [3]> ()
    g = ReduceMean <keepdims = 0> (f, axes)
    h = Flatten (g)
    logits = Gemm (h, w2, b2)
}}""",
    "mlp": f"""{_HEADER} (float[batch, 1, 9, 7] image) => (float[batch, 3] logits)
<float[63, 37] w0, float[37] b0, float[37, 3] w1, float[3] b1>
{{
    a = Flatten (image)
    b = Gemm (a, w0, b0)
    c = Relu (b)
    logits = Gemm (c, w1, b1)
}}""",
    "vit": f"""{_HEADER} (float[batch, 1, 14, 14] image) => (float[batch, 3] logits)
<float[24, 1, 2, 2] w0, float[49, 24] pos, float[24] s0, float[24, 24] wq, float[24, 24] wk, float[24, 24] wv,
 float[24, 40] w1, float[40, 24] w2, float[24, 3] w3, float[3] b3>
{{
    a = Conv <strides = [2, 2]> (image, w0)
    tokens = Constant <value_ints = [0, 24, 49]> ()
    b = Reshape (a, tokens)
    c = Transpose <perm = [0, 2, 1]> (b)
    d = Add (c, pos)
    e = LayerNormalization (d, s0)
    q = MatMul (e, wq)
    k = MatMul (e, wk)
    v = MatMul (e, wv)
    kt = Transpose <perm = [0, 2, 1]> (k)
    scores = MatMul (q, kt)
    weights = Softmax (scores)
    f = MatMul (weights, v)
    g = Add (d, f)
    h = MatMul (g, w1)
    i = Gelu (h)
    j = MatMul (i, w2)
    m = Add (g, j)
    axis = Constant <value_ints = [1]> ()
    n = ReduceMean <keepdims = 0> (m, axis)
    logits = Gemm (n, w3, b3)
}}""",
    "instance": f"""{_HEADER} (float[batch, 1, 11, 37] image) => (float[batch, 3] logits)
<float[5, 1, 3, 3] w0, float[5] s0, float[5] b0, float[2035, 3] w1>
{{
    a = Conv <pads = [1, 1, 1, 1]> (image, w0)
    b = InstanceNormalization (a, s0, b0)
    c = Relu (b)
    d = Flatten (c)
    logits = Gemm (d, w1)
}}""",
    "segmenter": f"""{_HEADER} (float[batch, 1, 10, 10] image) => (float[batch, 2, 10, 10] logits)
<float[6, 1, 3, 3] w0, float[2, 6, 3, 3] w1>
{{
    a = Conv <pads = [1, 1, 1, 1]> (image, w0)
    b = Relu (a)
    logits = Conv <pads = [1, 1, 1, 1]> (b, w1)
}}""",
    "unet": f"""{_HEADER} (float[batch, 1, 32, 32] image) => (float[batch, 2, 32, 32] logits)
<float[16, 1, 3, 3] w0, float[16, 16, 3, 3] w1, float[32, 16, 3, 3] w2, float[32, 16, 2, 2] w3,
 float[16, 32, 3, 3] w4, float[2, 16, 1, 1] w5>
{{
    a = Conv <pads = [1, 1, 1, 1]> (image, w0)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1]> (b, w1)
    d = Relu (c)
    e = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)
    f = Conv <pads = [1, 1, 1, 1]> (e, w2)
    g = Relu (f)
    h = ConvTranspose <strides = [2, 2]> (g, w3)
    i = Concat <axis = 1> (h, d)
    j = Conv <pads = [1, 1, 1, 1]> (i, w4)
    k = Relu (j)
    logits = Conv (k, w5)
}}""",
    "normalised": f"""{_HEADER} (float[batch, 1, 8, 8] image) => (float[batch, 2] logits)
<float[1] s0, float[1] b0, float[1] mean, float[1] var, float[4, 1, 3, 3] w1, float[144, 2] w2, float[2] b2>
{{
    a = BatchNormalization (image, s0, b0, mean, var)
    b = Conv (a, w1)
    c = Relu (b)
    d = Flatten (c)
    logits = Gemm (d, w2, b2)
}}""",
    "generator": f"""{_HEADER} (float[batch, 1, 8, 8] image, float[batch, 3] target) => (float[batch, 1, 8, 8] noise)
<float[3, 64] pattern>
{{
    shape = Constant <value_ints = [-1, 1, 8, 8]> ()
    a = Gemm (target, pattern)
    b = Reshape (a, shape)
    noise = Mul (b, image)
}}""",
    "plain generator": f"""{_HEADER} (float[batch, 1, 8, 8] image) => (float[batch, 1, 8, 8] noise)
<float[1, 1, 3, 3] w0>
{{
    a = Conv <pads = [1, 1, 1, 1]> (image, w0)
    noise = Tanh (a)
}}""",
}


def build(name: str, seed: int = 5) -> bytes:
    """Return a net with weights drawn as its layers would be initialised."""
    model = onnx.parser.parse_model(NETS[name])
    rng = np.random.default_rng(seed)
    for value in model.graph.value_info:
        shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        values = rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        if value.name == "var":
            values = np.abs(values) + 0.5
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), value.name))
    del model.graph.value_info[:]
    return model.SerializeToString()


@pytest.fixture(scope="session")
def net() -> Callable[..., bytes]:
    """Bytes of a net by name (and seed)."""
    return build


@pytest.fixture(scope="session")
def admitted() -> Callable[..., AdmittedGraph]:
    """An admitted net by name (and seed)."""
    return lambda name, seed=5: admit(
        build(name, seed), role="generator" if "generator" in name else "surrogate"
    )
