"""Only surrogates that were admitted and have proved themselves are handed out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from medveil.agent.engine import OnnxOracle, Resources, open_generator, open_oracle, open_trainable
from medveil.agent.engine import oracles as engine_oracles
from medveil.models.autodiff.admission import AdmittedGraph
from medveil.models.autodiff.gradient import build_gradient
from medveil.models.autodiff.selfcheck import GoldenVector
from medveil.models.errors import AdmissionError, ConfigurationError, SelfTestError

Net = Callable[..., bytes]
Admitted = Callable[..., AdmittedGraph]
GIB = 1 << 30


def golden_of(graph: AdmittedGraph, loss: str = "cross_entropy") -> GoldenVector:
    images = np.random.default_rng(1).random((2, *graph.input_shape), np.float32)
    targets = np.zeros((2, *graph.output_shape), np.float32)
    targets[:, 0] = 1
    oracle = OnnxOracle("golden", graph, Resources("cpu", 1, GIB), loss=loss)
    return GoldenVector(images, targets, *oracle.loss_and_gradient(images, targets))


@pytest.mark.parametrize("name", ["cnn", "mlp", "vit"])
def test_a_sound_surrogate_is_opened_and_answers_as_its_only_member(
    net: Net, admitted: Admitted, name: str
) -> None:
    graph = admitted(name)
    golden = golden_of(graph)
    oracle = open_oracle([(name, net(name), golden)], threads=2, memory_budget_bytes=GIB)
    assert (oracle.input_shape, oracle.classes) == (graph.input_shape, 3)
    losses, gradient = oracle.loss_and_gradient(golden.images, golden.targets)
    np.testing.assert_array_equal(losses, golden.losses)
    np.testing.assert_array_equal(np.sign(gradient), np.sign(golden.gradients))


def test_a_segmentation_surrogate_is_asked_with_its_own_loss(net: Net, admitted: Admitted) -> None:
    golden = golden_of(admitted("segmenter"), "cross_entropy_dice")
    graphs = [("unet", net("segmenter"), golden)]
    open_oracle(graphs, threads=1, memory_budget_bytes=GIB, loss="cross_entropy_dice")
    with pytest.raises(SelfTestError, match="golden"):
        open_oracle(graphs, threads=1, memory_budget_bytes=GIB, loss="cross_entropy")


def test_an_ensemble_shares_the_memory_budget(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []
    opened = engine_oracles.open_runner

    def spy(model: onnx.ModelProto, resources: Resources, **rest: object) -> object:
        budgets.append(resources.memory_budget_bytes)
        return opened(model, resources, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_oracles, "open_runner", spy)
    open_oracle([(str(s), net("cnn", s), None) for s in range(3)], threads=1, memory_budget_bytes=GIB)
    assert budgets == [GIB // 3] * 3


def test_the_golden_vector_of_another_surrogate_is_refused(net: Net, admitted: Admitted) -> None:
    with pytest.raises(SelfTestError) as caught:
        open_oracle(
            [
                ("good", net("cnn", 5), golden_of(admitted("cnn", 5))),
                ("swapped", net("cnn", 6), golden_of(admitted("cnn", 5))),
            ],
            threads=1,
            memory_budget_bytes=GIB,
        )
    assert caught.value.code == "golden"
    assert "'swapped'" in caught.value.public


def test_a_runtime_with_a_wrong_gradient_is_refused_even_without_a_golden_vector(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unflipped(*args: object, **settings: object) -> onnx.ModelProto:
        graph = build_gradient(*args, **settings)  # type: ignore[arg-type]
        for node in graph.graph.node:
            if node.op_type == "Slice":
                node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output))
        return graph

    monkeypatch.setattr(engine_oracles, "build_gradient", unflipped)
    with pytest.raises(SelfTestError) as caught:
        open_oracle([("openvino", net("segmenter"), None)], threads=1, memory_budget_bytes=GIB)
    assert caught.value.code == "directional"
    assert "'openvino'" in caught.value.public


def test_a_graph_that_compares_images_runs_image_by_image_and_so_gives_itself_away() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 20]>
    batch_softmax (float[batch, 1, 8, 8] image) => (float[batch, 64] logits)
    { a = Flatten (image)  logits = Softmax <axis = 0> (a) }
    """
    data = onnx.parser.parse_model(text).SerializeToString()
    with pytest.raises(SelfTestError, match="constant"):
        open_oracle([("mixing", data, None)], threads=1, memory_budget_bytes=GIB)


def test_hostile_bytes_are_refused_by_the_child(net: Net) -> None:
    model = onnx.ModelProto.FromString(net("cnn"))
    model.graph.node[1].domain = "com.microsoft"
    with pytest.raises(AdmissionError, match="domain"):
        open_oracle([("hostile", model.SerializeToString(), None)], threads=1, memory_budget_bytes=GIB)


def test_an_empty_bundle_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no-surrogates"):
        open_oracle([], threads=1, memory_budget_bytes=GIB)


def test_opening_and_asking_print_nothing(net: Net, capfd: pytest.CaptureFixture[str]) -> None:
    oracle = open_oracle([("vit", net("vit"), None)], threads=2, memory_budget_bytes=GIB)
    oracle.loss_and_gradient(np.zeros((3, 1, 14, 14), np.float32), np.eye(3, dtype=np.float32))
    assert capfd.readouterr() == ("", "")


def test_a_surrogate_to_be_trained_proves_itself_first(net: Net, admitted: Admitted) -> None:
    golden, other = golden_of(admitted("normalised")), golden_of(admitted("normalised", 6))
    oracle = open_trainable("s", net("normalised"), golden, threads=1, memory_budget_bytes=GIB)
    assert np.isfinite(oracle.train_step(golden.images, golden.targets))
    with pytest.raises(SelfTestError, match="golden"):
        open_trainable("s", net("normalised"), other, threads=1, memory_budget_bytes=GIB)


def test_a_generator_is_admitted_as_a_generator(net: Net) -> None:
    generator = open_generator(net("generator"), threads=1, memory_budget_bytes=GIB)
    assert generator.perturbation(
        np.ones((2, 1, 8, 8), np.float32), np.eye(2, 3, dtype=np.float32)
    ).shape == (2, 1, 8, 8)
    with pytest.raises(AdmissionError, match="signature"):
        open_generator(net("cnn"), threads=1, memory_budget_bytes=GIB)
