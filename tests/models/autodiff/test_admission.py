"""Every admission rule refuses what it is there for, under its own code, and lets sound graphs pass."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from medveil.models.autodiff.admission import Limits, Role, admit
from medveil.models.errors import AdmissionError

SOUND = """
<ir_version: 10, opset_import: ["": 20]>
surrogate (float[batch, 1, 8, 8] image) => (float[batch, 2] logits)
<float[4, 1, 3, 3] kernel, float[256, 2] weight>
{
    features = Conv <pads = [1, 1, 1, 1]> (image, kernel)
    active = Relu (features)
    flat = Flatten (active)
    logits = Gemm (flat, weight)
}
"""


def sound(text: str = SOUND) -> ModelProto:
    """Parse a model and fill the weights that the text only declares."""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(7)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, value.name))
    del model.graph.value_info[:]
    return model


def graph_of(
    body: str, *, outputs: str = "float[batch, 2] logits", image: str = "batch, 1, 8, 8"
) -> ModelProto:
    header = '<ir_version: 10, opset_import: ["": 20]>'
    return sound(
        f"{header} surrogate (float[{image}] image) => ({outputs}) <float[64, 2] weight> {{ {body} }}"
    )


def swollen(body: str) -> ModelProto:
    """A graph that computes ``big``, ``(batch, ., ., .)``, and adds its sum to the scores."""
    return graph_of(
        f"{body} axes = Constant<value_ints = [1, 2, 3]>() one = Constant<value_ints = [1]>() "
        "sum = ReduceSum<keepdims = 0>(big, axes) each = Unsqueeze(sum, one) "
        "flat = Flatten(image) scores = Gemm(flat, weight) logits = Add(scores, each)"
    )


def refusal(
    data: bytes | ModelProto, limits: Limits | None = None, role: Role = "surrogate"
) -> AdmissionError:
    data = data if isinstance(data, bytes) else data.SerializeToString()
    with pytest.raises(AdmissionError) as caught:
        admit(data, limits, role=role)
    return caught.value


# -- sound graphs --------------------------------------------------------------------------------------------


def test_a_sound_graph_is_measured_and_keeps_its_weights() -> None:
    admitted = admit(sound().SerializeToString())
    assert (admitted.input_shape, admitted.output_shape) == ((1, 8, 8), (2,))
    assert admitted.operators == ("Conv", "Flatten", "Gemm", "Relu")
    assert admitted.parameters == 4 * 9 + 256 * 2
    assert admitted.flops == 2 * (4 * 64 * 9) + 256 + 256 + 2 * 256 * 2
    assert admitted.activation_bytes == 4 * (256 + 256 + 256 + 2)
    given = {t.name: numpy_helper.to_array(t) for t in sound().graph.initializer}
    kept = {t.name: numpy_helper.to_array(t) for t in admitted.model.graph.initializer}
    for name, values in given.items():
        np.testing.assert_array_equal(kept[name], values)


@pytest.mark.parametrize("opset", range(13, 23))
def test_every_opset_from_13_to_22_is_admitted_at_opset_20(opset: int) -> None:
    model = sound()
    model.opset_import[0].version = opset
    assert [entry.version for entry in admit(model.SerializeToString()).model.opset_import] == [20]


def test_admitting_twice_gives_the_same_bytes() -> None:
    data = sound().SerializeToString()
    first, second = (admit(data).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_weights_too_large_for_the_skeleton_come_back_unchanged() -> None:
    large = np.random.default_rng(1).standard_normal((70_000, 2)).astype(np.float32)
    text = SOUND.replace("256, 2", "70000, 2").replace("[batch, 1, 8, 8]", "[batch, 1, 175, 100]")
    model = sound(text)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(large, "weight"))
    admitted = admit(model.SerializeToString())
    assert [value.name for value in admitted.model.graph.input] == ["image"]
    kept = {t.name: numpy_helper.to_array(t) for t in admitted.model.graph.initializer}
    np.testing.assert_array_equal(kept["weight"], large)


def test_received_shapes_are_forgotten_not_believed() -> None:
    model = sound()
    model.graph.value_info.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, [1]))
    assert (
        admit(model.SerializeToString()).activation_bytes
        == admit(sound().SerializeToString()).activation_bytes
    )


def test_initialisers_listed_as_inputs_as_before_ir_version_4_are_not_fed() -> None:
    model = sound()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert admit(model.SerializeToString()).input_shape == (1, 8, 8)


# -- hostile graphs: one change to the sound one each ----------------------------------------------------------


def change(edit: Callable[[ModelProto], object]) -> ModelProto:
    model = sound()
    edit(model)
    return model


def external(location: str) -> ModelProto:
    model = sound()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


def loop() -> ModelProto:
    body = helper.make_graph([], "body", [], [])
    return change(lambda m: m.graph.node.append(helper.make_node("Loop", ["forever"], ["x"], body=body)))


def with_tensor(**fields: object) -> ModelProto:
    tensor = TensorProto(name="extra", **fields)  # type: ignore[arg-type]
    return change(lambda m: m.graph.initializer.append(tensor))


HUGE = 1 << 40

HOSTILE: dict[str, tuple[str, Callable[[], bytes | ModelProto]]] = {
    # the file
    "empty": ("unparsable", lambda: b""),
    "random bytes": ("unparsable", lambda: bytes(range(256)) * 4),
    "cut in half": ("unparsable", lambda: sound().SerializeToString()[:900]),
    "ORT format": ("ort-format", lambda: b"\x18\x00\x00\x00ORTM" + bytes(64)),
    # beside the graph
    "function": ("functions", lambda: change(lambda m: m.functions.add(name="f", domain="mine"))),
    "function attribute": (
        "functions",
        lambda: change(lambda m: m.graph.node[1].attribute.add(name="alpha", ref_attr_name="a")),
    ),
    "overload": ("functions", lambda: change(lambda m: setattr(m.graph.node[1], "overload", "o"))),
    "training info": ("training-info", lambda: change(lambda m: m.training_info.add())),
    "sparse initialiser": ("sparse", lambda: change(lambda m: m.graph.sparse_initializer.add())),
    "quantisation": (
        "quantization",
        lambda: change(lambda m: m.graph.quantization_annotation.add(tensor_name="kernel")),
    ),
    "metadata": (
        "metadata-size",
        lambda: change(lambda m: m.metadata_props.add(key="k", value="v" * (17 << 20))),
    ),
    "documentation": (
        "metadata-size",
        lambda: change(lambda m: setattr(m.graph.node[0], "doc_string", "v" * (17 << 20))),
    ),
    "IR of the future": ("ir-version", lambda: change(lambda m: setattr(m, "ir_version", 99))),
    "opset 12": ("opset", lambda: change(lambda m: setattr(m.opset_import[0], "version", 12))),
    "opset 23": ("opset", lambda: change(lambda m: setattr(m.opset_import[0], "version", 23))),
    "no opset": ("opset", lambda: change(lambda m: m.opset_import.pop())),
    "two opsets": ("opset", lambda: change(lambda m: m.opset_import.add(domain="", version=13))),
    "imports com.microsoft": (
        "domain",
        lambda: change(lambda m: m.opset_import.add(domain="com.microsoft", version=1)),
    ),
    # nodes
    "operator of com.microsoft": (
        "domain",
        lambda: change(lambda m: setattr(m.graph.node[1], "domain", "com.microsoft")),
    ),
    "operator of a custom domain": (
        "domain",
        lambda: change(lambda m: setattr(m.graph.node[1], "domain", "evil.corp")),
    ),
    "Loop": ("subgraph", loop),
    "graph in an innocent operator": (
        "subgraph",
        lambda: change(
            lambda m: m.graph.node[1].attribute.append(
                helper.make_attribute("body", helper.make_graph([], "g", [], []))
            )
        ),
    ),
    "operator without a derivative": (
        "operator",
        lambda: change(lambda m: setattr(m.graph.node[1], "op_type", "NonZero")),
    ),
    "invented operator": (
        "operator",
        lambda: change(lambda m: setattr(m.graph.node[1], "op_type", "Exfiltrate")),
    ),
    "invented attribute": (
        "attribute",
        lambda: change(lambda m: m.graph.node[1].attribute.append(helper.make_attribute("evil", 1))),
    ),
    "attribute of the wrong type": (
        "attribute",
        lambda: change(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("group", "one"))),
    ),
    "attribute twice": (
        "attribute",
        lambda: change(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("pads", [0] * 4))),
    ),
    "sparse attribute": (
        "sparse",
        lambda: change(
            lambda m: m.graph.node[0].attribute.add(name="x", type=11).sparse_tensor.dims.append(1)
        ),
    ),
    "text attribute": (
        "text-size",
        lambda: change(
            lambda m: m.graph.node[0].attribute.append(helper.make_attribute("auto_pad", "S" * 5000))
        ),
    ),
    "too many inputs": ("arity", lambda: change(lambda m: m.graph.node[1].input.extend(["image"] * 3))),
    # tensors
    "external data above the folder": ("external-data", lambda: external("../weights.bin")),
    "external data at an absolute path": ("external-data", lambda: external("/etc/hostname")),
    "external data in an attribute": (
        "external-data",
        lambda: change(
            lambda m: m.graph.node[1].attribute.append(
                helper.make_attribute("value", external("x").graph.initializer[0])
            )
        ),
    ),
    "external keys without the flag": (
        "external-data",
        lambda: change(lambda m: m.graph.initializer[0].external_data.add(key="location", value="x")),
    ),
    "text tensor": (
        "string-tensor",
        lambda: with_tensor(data_type=TensorProto.STRING, dims=[1], string_data=[b"x"]),
    ),
    "16-bit floats": (
        "tensor-type",
        lambda: with_tensor(data_type=TensorProto.FLOAT16, dims=[1], raw_data=b"ab"),
    ),
    "nine axes": (
        "tensor-rank",
        lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[1] * 9, raw_data=bytes(4)),
    ),
    "negative size": (
        "tensor-shape",
        lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[-1], raw_data=bytes(4)),
    ),
    "huge claim": ("tensor-bomb", lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[HUGE, HUGE])),
    "claim that wraps around to zero": (
        "tensor-bomb",
        lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[1 << 32, 1 << 32]),
    ),
    "too few bytes": (
        "raw-data-length",
        lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[4], raw_data=bytes(12)),
    ),
    "too many bytes": (
        "raw-data-length",
        lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[4], raw_data=bytes(20)),
    ),
    "no bytes": ("raw-data-length", lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[4])),
    "elements in the wrong field": (
        "raw-data-length",
        lambda: with_tensor(data_type=TensorProto.INT64, dims=[1], float_data=[1.0]),
    ),
    "elements twice": (
        "raw-data-length",
        lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[1], float_data=[1.0], raw_data=bytes(4)),
    ),
    "NaN weights": (
        "non-finite-weights",
        lambda: with_tensor(data_type=TensorProto.FLOAT, dims=[1], raw_data=np.float32("nan").tobytes()),
    ),
    "infinite weights": (
        "non-finite-weights",
        lambda: with_tensor(data_type=TensorProto.DOUBLE, dims=[2], double_data=[0.0, float("inf")]),
    ),
    # names and signature
    "value computed twice": (
        "duplicate-name",
        lambda: change(lambda m: m.graph.node.append(helper.make_node("Relu", ["image"], ["active"]))),
    ),
    "value shadows a weight": (
        "duplicate-name",
        lambda: change(lambda m: m.graph.node.append(helper.make_node("Relu", ["image"], ["kernel"]))),
    ),
    "value nobody computes": (
        "undefined-name",
        lambda: change(lambda m: m.graph.node[1].input.__setitem__(0, "ghost")),
    ),
    "output nobody computes": (
        "undefined-name",
        lambda: change(lambda m: setattr(m.graph.output[0], "name", "ghost")),
    ),
    "cycle": ("node-order", lambda: change(lambda m: m.graph.node[0].input.__setitem__(0, "flat"))),
    "out of order": ("node-order", lambda: change(lambda m: m.graph.node.insert(0, m.graph.node.pop()))),
    "long name": (
        "text-size",
        lambda: change(lambda m: m.graph.node.append(helper.make_node("Relu", ["image"], ["n" * 2000]))),
    ),
    "two inputs": (
        "signature",
        lambda: change(
            lambda m: m.graph.input.append(helper.make_tensor_value_info("b", 1, ["batch", 1, 8, 8]))
        ),
    ),
    "two outputs": (
        "signature",
        lambda: change(
            lambda m: m.graph.output.append(helper.make_tensor_value_info("flat", 1, ["batch", 256]))
        ),
    ),
    "integer image": (
        "signature",
        lambda: change(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT64)),
    ),
    "fixed batch": (
        "signature",
        lambda: change(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1)),
    ),
    "open width": (
        "signature",
        lambda: change(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[3], "dim_param", "w")),
    ),
    "flat image": ("signature", lambda: graph_of("logits = Gemm(image, weight)", image="batch, 64")),
    "one class only": (
        "signature",
        lambda: graph_of(
            "axes = Constant<value_ints = [1, 2, 3]>() m = ReduceMean<keepdims = 0>(image, axes) "
            "one = Constant<value_ints = [1]>() logits = Unsqueeze(m, one)",
            outputs="float[batch, 1] logits",
        ),
    ),
    # what it would do
    "shapes that do not fit": (
        "shape",
        lambda: graph_of("flat = Flatten(image) m = Gemm(flat, weight) logits = Gemm(m, weight)"),
    ),
    "empty value": (
        "shape",
        lambda: swollen("n = Constant<value_ints = [1, 1, 1, 0]>() big = Tile(image, n)"),
    ),
    "images compared with each other": (
        "batch",
        lambda: graph_of(
            "f = Flatten(image) t = Transpose(f) g = MatMul(f, t) h = Gemm(f, weight) s = ReduceSum(g) "
            "logits = Add(h, s)"
        ),
    ),
    "sum over the batch": (
        "batch",
        lambda: graph_of(
            "axes = Constant<value_ints = [0]>() f = Flatten(image) s = ReduceSum(f, axes) logits = Gemm(s, weight)"
        ),
    ),
    "ConstantOfShape bomb": (
        "tensor-bomb",
        lambda: graph_of(
            "n = Constant<value_ints = [1, 1099511627776]>() c = ConstantOfShape(n) s = ReduceSum(c) "
            "f = Flatten(image) h = Gemm(f, weight) logits = Add(h, s)"
        ),
    ),
    "Expand bomb": (
        "tensor-bomb",
        lambda: swollen("n = Constant<value_ints = [1, 8388608, 8, 8]>() big = Expand(image, n)"),
    ),
    "Tile bomb": (
        "tensor-bomb",
        lambda: swollen("n = Constant<value_ints = [1, 65536, 64, 64]>() big = Tile(image, n)"),
    ),
    "Resize bomb": (
        "tensor-bomb",
        lambda: swollen(
            'k = Constant<value_floats = [1.0, 1.0, 10000.0, 10000.0]>() big = Resize<mode = "nearest">(image, , k)'
        ),
    ),
    "Pad bomb": (
        "tensor-bomb",
        lambda: swollen("p = Constant<value_ints = [0, 0, 0, 0, 0, 0, 65536, 65536]>() big = Pad(image, p)"),
    ),
    "Tile whose size wraps around": (
        "shape",
        lambda: swollen("n = Constant<value_ints = [1, 1, 1, 9223372036854775807]>() big = Tile(image, n)"),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_under_its_own_code(name: str) -> None:
    code, build = HOSTILE[name]
    error = refusal(build())
    assert error.code == code, f"{error.code}: {error.public} {error.private}"
    assert error.public
    assert "\n" not in error.public


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_external_data_through_a_link_beside_the_graph_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: Callable[[Path, Path], None]
) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(4 * 36))
    link(secret, tmp_path / "weights.bin")
    monkeypatch.chdir(tmp_path)
    assert refusal(external("weights.bin")).code == "external-data"


@pytest.mark.parametrize(
    ("code", "limits"),
    [
        ("file-size", Limits(file_bytes=1000)),
        ("node-count", Limits(nodes=3)),
        ("tensor-bomb", Limits(tensor_bytes=4 * 256)),
        ("activation-limit", Limits(activation_bytes=4 * 256 * 3)),
        ("flops-limit", Limits(flops=6000)),
        ("tensor-rank", Limits(tensor_rank=3)),
    ],
)
def test_one_step_beyond_a_limit_is_refused(code: str, limits: Limits) -> None:
    assert refusal(sound(), limits).code == code


def test_a_refusal_never_repeats_what_a_graph_wants_on_the_screen() -> None:
    model = change(lambda m: setattr(m.graph.node[1], "op_type", "\x1b[31mEvil\n" + "x" * 500))
    error = refusal(model)
    assert error.code == "operator"
    assert error.public.isprintable()
    assert len(error.public) < 200


def test_bombs_are_refused_before_they_take_memory() -> None:
    builds = [build for code, build in HOSTILE.values() if code == "tensor-bomb"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for build in builds:
        refusal(build())
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert len(builds) >= 6
    assert grown_bytes < 32 << 20


# -- generators ------------------------------------------------------------------------------------------------

GENERATOR = """
<ir_version: 10, opset_import: ["": 20]>
generator (float[batch, 1, 8, 8] image, float[batch, 3] target) => (float[batch, 1, 8, 8] noise)
<float[3, 64] weight>
{
    shape = Constant <value_ints = [-1, 1, 8, 8]> ()
    pattern = Gemm (target, weight)
    planes = Reshape (pattern, shape)
    noise = Mul (planes, image)
}
"""


def test_a_generator_may_take_the_target_too() -> None:
    admitted = admit(sound(GENERATOR).SerializeToString(), role="generator")
    assert (admitted.input_shape, admitted.target_shape) == ((1, 8, 8), (3,))
    assert admitted.output_shape == (1, 8, 8)
    fed = [value.type.tensor_type.shape for value in admitted.model.graph.input]
    assert [tuple(d.dim_value for d in shape.dim)[1:] for shape in fed] == [(4, 8, 8)]


def test_a_generator_must_answer_with_an_image() -> None:
    assert refusal(sound(), role="generator").code == "signature"


def test_a_surrogate_may_not_take_a_target() -> None:
    assert refusal(sound(GENERATOR)).code == "signature"
