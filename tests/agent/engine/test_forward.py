"""Forward sessions compute what the received graph says, from a graph of our own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from medveil.agent.engine import OnnxClassifier, OnnxGenerator, Resources
from medveil.models.autodiff.admission import AdmittedGraph, admit
from medveil.models.errors import ConfigurationError

Net = Callable[..., bytes]
Admitted = Callable[..., AdmittedGraph]
RESOURCES = Resources("cpu", 2, 1 << 30)


def received(data: bytes, **feeds: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    answer: np.ndarray = session.run(None, feeds)[0]
    return answer


@pytest.mark.parametrize("name", ["cnn", "mlp", "vit", "segmenter", "normalised"])
def test_a_classifier_scores_as_the_received_graph(net: Net, admitted: Admitted, name: str) -> None:
    graph = admitted(name)
    images = np.random.default_rng(0).random((11, *graph.input_shape), np.float32)
    scores = OnnxClassifier(graph, RESOURCES).logits(images)
    np.testing.assert_allclose(scores, received(net(name), image=images), rtol=1e-4, atol=1e-5)


def test_a_plain_generator_perturbs_as_the_received_graph(net: Net, admitted: Admitted) -> None:
    generator = OnnxGenerator(admitted("plain generator"), RESOURCES)
    images = np.random.default_rng(0).random((11, 1, 8, 8), np.float32)
    assert not generator.takes_target
    expected = received(net("plain generator"), image=images)
    np.testing.assert_allclose(generator.perturbation(images), expected, rtol=1e-5, atol=1e-6)


def test_a_generator_sees_the_target_too(net: Net, admitted: Admitted) -> None:
    generator = OnnxGenerator(admitted("generator"), RESOURCES)
    rng = np.random.default_rng(0)
    images, targets = rng.random((11, 1, 8, 8), np.float32), rng.random((11, 3), np.float32)
    assert generator.takes_target
    expected = received(net("generator"), image=images, target=targets)
    np.testing.assert_allclose(generator.perturbation(images, targets), expected, rtol=1e-5, atol=1e-6)


def test_a_generator_sees_a_mask_too() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 20]>
    generator (float[batch, 2, 8, 8] image, float[batch, 3, 8, 8] target) => (float[batch, 2, 8, 8] noise)
    { a = Conv (target, w)  noise = Mul (a, image) }
    """
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(1).standard_normal((2, 3, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    rng = np.random.default_rng(0)
    images, masks = rng.random((5, 2, 8, 8), np.float32), rng.random((5, 3, 8, 8), np.float32)
    generator = OnnxGenerator(admit(model.SerializeToString(), role="generator"), RESOURCES)
    expected = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], masks) * images
    np.testing.assert_allclose(generator.perturbation(images, masks), expected, rtol=1e-4, atol=1e-5)


def test_inputs_that_do_not_fit_are_refused(admitted: Admitted) -> None:
    images, targets = np.zeros((2, 1, 8, 8), np.float32), np.zeros((2, 3), np.float32)
    with_target, without = (
        OnnxGenerator(admitted("generator"), RESOURCES),
        OnnxGenerator(admitted("plain generator"), RESOURCES),
    )
    for call in (
        lambda: with_target.perturbation(images),
        lambda: with_target.perturbation(images, targets[:, :2]),
        lambda: with_target.perturbation(images, targets.astype(np.float64)),
        lambda: without.perturbation(images, targets),
        lambda: without.perturbation(images[:, :, :4]),
    ):
        with pytest.raises(ConfigurationError, match="generator-input"):
            call()
    with pytest.raises(ConfigurationError, match="classifier-input"):
        OnnxClassifier(admitted("normalised"), RESOURCES).logits(images[:, :, :4])
