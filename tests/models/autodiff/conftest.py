"""Tiny ONNX models from text, and two ways of knowing their gradient without torch."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper, parser
from onnx.reference import ReferenceEvaluator


@dataclass(frozen=True)
class Tiny:
    """A model as text: what happens to ``image`` (``(N, *shape)``) until ``y``; weights by name (a shape: random)."""

    body: str
    shape: tuple[int, ...]
    weights: Mapping[str, object] = field(default_factory=dict)
    positive: bool = False  # draw the image from [0.5, 1.5] instead of a normal distribution
    opset: int = 20

    def model(self, seed: int = 0) -> onnx.ModelProto:
        rng = np.random.default_rng(seed)
        extents = ",".join(["N", *map(str, self.shape)])
        model = parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : {self.opset}]> '
            f"tiny (float[{extents}] image) => (float[] y) {{ {self.body} }}"
        )
        for name, weight in self.weights.items():
            array = (
                rng.normal(size=weight).astype(np.float32)
                if isinstance(weight, tuple)
                else np.asarray(weight)
            )
            array = array.astype(np.float32) if array.dtype.kind == "f" else array
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        return model

    def images(self, count: int, seed: int = 1) -> np.ndarray:
        rng = np.random.default_rng(seed)
        size = (count, *self.shape)
        drawn = rng.uniform(0.5, 1.5, size) if self.positive else rng.normal(size=size)
        return drawn.astype(np.float32)


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, np.ndarray]]:
    """Run a model in plain onnxruntime on one thread; outputs by name."""

    def run_model(model: onnx.ModelProto, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return {n: np.array(v, copy=True) for n, v in zip(names, session.run(names, inputs), strict=True)}

    return run_model


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same model with float64 weights, for the ONNX reference evaluator."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    for tensor in double.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)
            )
    return double


@pytest.fixture(scope="session")
def finite_differences(run: Callable[..., dict[str, np.ndarray]]) -> Callable[..., np.ndarray]:
    """Gradient of ``<y, target>`` in the pixels by central differences in float64; images must be independent."""

    def gradient(
        model: onnx.ModelProto, images: np.ndarray, target: np.ndarray, *, in_runtime: bool = False
    ) -> np.ndarray:
        """``in_runtime``: in onnxruntime and float32, where the reference evaluator is at fault."""
        step = 1e-3 if in_runtime else 1e-6
        evaluator = None if in_runtime else ReferenceEvaluator(in_double(model))
        result = np.zeros(images.shape)
        for index, image in enumerate(images.astype(np.float64)):
            shifts = step * np.eye(image.size).reshape(image.size, *image.shape)
            both = np.concatenate([image + shifts, image - shifts])
            if evaluator is None:
                (y,) = run(model, image=both.astype(np.float32)).values()
            else:
                (y,) = evaluator.run(None, {"image": both})
            values = (y * target[index].astype(np.float64)).reshape(len(y), -1).sum(axis=1)
            up, down = np.split(values, 2)
            result[index] = ((up - down) / (2 * step)).reshape(image.shape)
        return result

    return gradient


@pytest.fixture(scope="session")
def distance() -> Callable[[np.ndarray, np.ndarray], float]:
    """Relative L2 distance of a gradient from the true one."""

    def relative(got: np.ndarray, want: np.ndarray) -> float:
        assert got.shape == want.shape
        return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))

    return relative


@pytest.fixture(scope="session")
def export() -> Callable[..., onnx.ModelProto]:
    """Export a torch module whose batch is left open, by the new exporter or the legacy one."""
    torch = pytest.importorskip("torch")

    def export_module(
        module: object,
        shape: tuple[int, ...],
        *,
        exporter: str = "dynamo",
        opset: int = 18,
        optimize: bool = True,
    ) -> onnx.ModelProto:
        images = torch.randn(2, *shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations; the tests are about ours
            if exporter == "legacy":
                file = io.BytesIO()
                torch.onnx.export(
                    module,
                    (images,),
                    file,
                    dynamo=False,
                    input_names=["x"],
                    output_names=["y"],
                    dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
                    opset_version=opset,
                )
                return onnx.load_from_string(file.getvalue())
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n")},),
                opset_version=opset,
                optimize=optimize,
                verbose=False,
            )
            return program.model_proto

    return export_module


@pytest.fixture(scope="session")
def networks() -> ModuleType:
    """The reference architectures, shared with the benchmarks."""
    pytest.importorskip("torch")
    path = Path(__file__).resolve().parents[3] / "bench" / "networks.py"
    spec = importlib.util.spec_from_file_location("bench_networks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
