from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from medveil.models.autodiff import build_gradient
from medveil.models.autodiff.admission import admit
from medveil.models.autodiff.selfcheck import check_golden
from medveil.models.errors import RefusedError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

NAMES = ("resnet", "wide-resnet", "vgg", "densenet", "vit", "mlp")


class SessionOracle:
    """The gradient graph in plain onnxruntime, as a site would run it."""

    def __init__(self, graph: bytes, input_shape: tuple[int, ...], classes: int) -> None:
        model = build_gradient(admit(graph))
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.input_shape = input_shape
        self.classes = classes

    def loss_and_gradient(self, images: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(self._session.run(["loss", "gradient"], {"image": images, "target": targets}))


@pytest.fixture(scope="module")
def net_named() -> Callable[..., torch.nn.Module]:
    from medveil.models import nets

    def make(name: str, channels: int = 1, size: int = 28, classes: int = 2) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = nets.build(name, channels, size, classes)
            # running statistics away from their start, as after training
            net.train()
            with torch.no_grad():
                for _ in range(3):
                    net(torch.rand(16, channels, size, size))
        return net.eval()

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_surrogate_is_admitted_and_reproduces_its_golden_vector(
    name: str, net_named: Callable[..., torch.nn.Module], rng: np.random.Generator
) -> None:
    from medveil.models.export import golden_vector, to_onnx

    net = net_named(name)
    graph = to_onnx(net, (1, 28, 28))
    vector = golden_vector(net, rng.random((4, 1, 28, 28), np.float32), 2, rng=rng)
    check_golden(SessionOracle(graph, (1, 28, 28), 2), vector, name=name)
    assert next(net.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("name", "channels", "size"), [("vit", 3, 33), ("vgg", 3, 64), ("mlp", 1, 64)])
def test_colour_and_odd_sizes_export_too(
    name: str,
    channels: int,
    size: int,
    net_named: Callable[..., torch.nn.Module],
    rng: np.random.Generator,
) -> None:
    from medveil.models.export import golden_vector, to_onnx

    net = net_named(name, channels, size, 3)
    shape = (channels, size, size)
    vector = golden_vector(net, rng.random((3, *shape), np.float32), 3, rng=rng)
    check_golden(SessionOracle(to_onnx(net, shape), shape, 3), vector, name=name)


def test_the_file_is_whole_small_and_the_same_every_time(
    net_named: Callable[..., torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medveil.models.export import to_onnx

    monkeypatch.chdir(tmp_path)
    net = net_named("resnet")
    graph = to_onnx(net, (1, 28, 28))
    assert to_onnx(net, (1, 28, 28)) == graph
    assert list(tmp_path.iterdir()) == []
    model = onnx.load_from_string(graph)
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in model.graph.initializer)
    assert [entry.domain for entry in model.opset_import] == [""]
    parameters = sum(p.numel() for p in net.parameters())
    assert len(graph) < 4 * parameters + 40_000


def test_nothing_of_the_machine_that_trained_it_is_in_the_file(
    net_named: Callable[..., torch.nn.Module],
) -> None:
    from medveil.models.export import to_onnx

    graph = to_onnx(net_named("vit"), (1, 28, 28))
    for trace in (b"/", b".py", b"site-packages", b"torch"):
        assert trace not in b"".join(_texts(onnx.load_from_string(graph)))


def _texts(model: onnx.ModelProto) -> list[bytes]:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in model.graph.initializer:
        tensor.raw_data = b""
    return [model.SerializeToString()]


def test_a_trainable_graph_keeps_batch_norms_and_names(net_named: Callable[..., torch.nn.Module]) -> None:
    from medveil.models.export import to_onnx

    net = net_named("resnet")
    folded = onnx.load_from_string(to_onnx(net, (1, 28, 28)))
    trainable = onnx.load_from_string(to_onnx(net, (1, 28, 28), trainable=True))
    assert "BatchNormalization" not in {n.op_type for n in folded.graph.node}
    norms = [n for n in trainable.graph.node if n.op_type == "BatchNormalization"]
    assert len(norms) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert {name for name, _ in net.named_parameters()} <= {t.name for t in trainable.graph.initializer}


def test_a_graph_that_computes_something_else_is_refused(
    net_named: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medveil.models.export import onnx as exporter

    def with_a_wrong_weight(model: onnx.ModelProto) -> onnx.ModelProto:
        model = bare(model)
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
        return model

    bare = exporter.bare
    monkeypatch.setattr(exporter, "bare", with_a_wrong_weight)
    with pytest.raises(RefusedError) as caught:
        exporter.to_onnx(net_named("mlp"), (1, 28, 28))
    assert caught.value.code == "export"
