"""The same image gives the same bits, whatever it is computed with and on how many threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from medveil.agent.engine import OnnxOracle, Resources
from medveil.agent.engine.batching import BatchRunner, aligned_copy, choose_micro_batch, place_matters
from medveil.agent.engine.memory import GraphMemory, measure
from medveil.models.autodiff import build_gradient
from medveil.models.autodiff.admission import AdmittedGraph
from medveil.models.errors import ConfigurationError, SelfTestError

Admitted = Callable[..., AdmittedGraph]
GIB = 1 << 30


def question(graph: AdmittedGraph, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.random((count, *graph.input_shape), np.float32)
    targets = rng.dirichlet(np.ones(graph.output_shape[0]), (count, *graph.output_shape[1:]))
    return images, np.ascontiguousarray(np.moveaxis(targets, -1, 1), np.float32)


@pytest.mark.parametrize("name", ["cnn", "mlp", "vit", "instance", "segmenter"])
def test_bits_do_not_depend_on_batch_size_threads_or_budget(admitted: Admitted, name: str) -> None:
    graph = admitted(name)
    images, targets = question(graph, 64)
    reference = OnnxOracle(name, graph, Resources("cpu", 1, GIB)).loss_and_gradient(images, targets)
    smallest = measure(build_gradient(graph))
    for threads in (1, 2, 3):
        for budget in (GIB, smallest.fixed_bytes + 8 * smallest.bytes_per_image):
            oracle = OnnxOracle(name, graph, Resources("cpu", threads, budget))
            for size in (1, 2, 3, 5, 7, 8, 13, 16, 31, 33, 64):
                parts = [
                    oracle.loss_and_gradient(images[i : i + size], targets[i : i + size])
                    for i in range(0, 64, size)
                ]
                for k in (0, 1):
                    assert np.concatenate([part[k] for part in parts]).tobytes() == reference[k].tobytes()


@pytest.mark.parametrize("name", ["cnn", "mlp", "vit", "instance"])
def test_bits_do_not_depend_on_neighbours_or_order(admitted: Admitted, name: str) -> None:
    graph = admitted(name)
    images, targets = question(graph, 24)
    oracle = OnnxOracle(name, graph, Resources("cpu", 2, GIB))
    _, reference = oracle.loss_and_gradient(images, targets)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(24)
        assert (
            oracle.loss_and_gradient(images[order], targets[order])[1].tobytes() == reference[order].tobytes()
        )


@pytest.mark.parametrize("name", ["cnn", "vit", "instance"])
def test_bits_do_not_depend_on_where_the_caller_keeps_its_arrays(admitted: Admitted, name: str) -> None:
    graph = admitted(name)
    images, targets = question(graph, 9)
    oracle = OnnxOracle(name, graph, Resources("cpu", 1, GIB))
    reference = oracle.loss_and_gradient(images, targets)[1].tobytes()
    for offset in (4, 8, 20, 36):  # bytes away from whatever alignment NumPy gave
        room = np.zeros(images.nbytes + 64, np.uint8)
        moved = room[offset : offset + images.nbytes].view(np.float32).reshape(images.shape)
        moved[:] = images
        assert oracle.loss_and_gradient(moved, targets)[1].tobytes() == reference


def test_two_sessions_give_the_same_bits(admitted: Admitted) -> None:
    graph = admitted("vit")
    images, targets = question(graph, 5)
    first, second = (OnnxOracle("vit", graph, Resources("cpu", 1, GIB)) for _ in range(2))
    assert (
        first.loss_and_gradient(images, targets)[1].tobytes()
        == second.loss_and_gradient(images, targets)[1].tobytes()
    )


def test_an_answer_is_the_callers_own_memory(admitted: Admitted) -> None:
    graph = admitted("cnn")
    oracle = OnnxOracle("cnn", graph, Resources("cpu", 1, GIB))
    _, first = oracle.loss_and_gradient(*question(graph, 4))
    kept = first.copy()
    for seed in range(1, 4):
        oracle.loss_and_gradient(*question(graph, 4, seed))
    np.testing.assert_array_equal(first, kept)
    assert first.flags.owndata
    assert first.flags.writeable


class FakeRunner:
    """Answers with a function of (images, places)."""

    def __init__(self, answer: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self.answer = answer

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        images = feeds["image"]
        return [self.answer(images, np.arange(len(images), dtype=np.float32))]


@pytest.mark.parametrize(
    ("answer", "matters"),
    [
        (lambda x, place: 2 * x, False),
        (lambda x, place: np.nextafter(x, np.where(place == 0, 9, x).astype(np.float32)), True),
        (lambda x, place: x + 1e-6 * (place % 4 == 3), True),
        (lambda x, place: x + np.roll(x, 1), True),
    ],
)
def test_it_is_noticed_when_a_place_matters(answer: Callable[..., np.ndarray], matters: bool) -> None:
    images = np.random.default_rng(0).random(8, np.float32)
    assert place_matters(FakeRunner(answer), {"image": images}, ("y",)) is matters  # type: ignore[arg-type]


def test_a_graph_in_which_place_matters_runs_image_by_image(
    admitted: Admitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = admitted("cnn")
    assert OnnxOracle("cnn", graph, Resources("cpu", 1, GIB)).micro_batch > 1
    monkeypatch.setattr("medveil.agent.engine.batching.place_matters", lambda *_: True)
    assert OnnxOracle("cnn", graph, Resources("cpu", 1, GIB)).micro_batch == 1


def test_the_micro_batch_follows_from_the_graph_alone() -> None:
    sizes = [choose_micro_batch(GraphMemory(0, mib << 20), "cpu") for mib in (1, 32, 33, 100, 1000)]
    assert sizes == [8, 8, 4, 2, 1]


def test_too_small_a_budget_is_refused_and_says_what_would_do(admitted: Admitted) -> None:
    with pytest.raises(ConfigurationError) as caught:
        OnnxOracle("cnn", admitted("cnn"), Resources("cpu", 1, 1 << 20))
    assert caught.value.code == "memory-budget"
    needed = int(caught.value.public.split("at least ")[1].split()[0])
    OnnxOracle("cnn", admitted("cnn"), Resources("cpu", 1, needed << 20))


def test_no_threads_are_refused(admitted: Admitted) -> None:
    with pytest.raises(ConfigurationError, match="threads"):
        OnnxOracle("cnn", admitted("cnn"), Resources("cpu", 0, GIB))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, t: (x[:0], t[:0]),
        lambda x, t: (x[:, :, 1:], t),
        lambda x, t: (x.astype(np.float64), t),
        lambda x, t: (x, t[:1]),
        lambda x, t: (x, t[:, :1]),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    admitted: Admitted, spoil: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> None:
    graph = admitted("cnn")
    oracle = OnnxOracle("cnn", graph, Resources("cpu", 1, GIB))
    with pytest.raises(ConfigurationError):
        oracle.loss_and_gradient(*spoil(*question(graph, 3)))


def test_a_gradient_that_is_not_a_number_is_refused(admitted: Admitted) -> None:
    graph = admitted("mlp")
    images, targets = question(graph, 3)
    images[1, 0, 0, 0] = np.nan
    with pytest.raises(SelfTestError, match="non-finite"):
        OnnxOracle("mlp", graph, Resources("cpu", 1, GIB)).loss_and_gradient(images, targets)


def test_onnxruntime_prints_nothing_not_even_when_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SelfTestError, match="runtime-failure"):
        BatchRunner(b"not a graph", Resources("cpu", 1, GIB), memory=GraphMemory(1, 1), micro_batch=8)
    assert capfd.readouterr() == ("", "")


def test_a_copy_for_onnxruntime_is_aligned_and_filled_up() -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    for _ in range(20):
        copy = aligned_copy(array, 4)
        assert copy.ctypes.data % 64 == 0
        np.testing.assert_array_equal(copy, [[0, 1], [2, 3], [4, 5], [0, 0]])
    assert aligned_copy(np.array(2.5, np.float32)) == np.float32(2.5)


MEASURE = """
import sys
import numpy as np
from medveil.agent.engine import Resources
from medveil.agent.engine.batching import BatchRunner
from medveil.agent.engine.memory import measure
from medveil.models.autodiff import build_gradient
from medveil.models.autodiff.admission import admit

def resident_bytes(field):
    with open("/proc/self/status") as status:
        return int(status.read().partition(field + ":")[2].split()[0]) << 10

graph = admit(sys.stdin.buffer.read())
model = build_gradient(graph)
memory = measure(model)
runner = BatchRunner(model.SerializeToString(), Resources("cpu", 1, 1 << 40), memory=memory, micro_batch=128)
images = np.zeros((128, *graph.input_shape), np.float32)
targets = np.zeros((128, *graph.output_shape), np.float32)
before = resident_bytes("VmRSS")
for _ in range(3):
    runner.run({"image": images, "target": targets}, ("loss", "gradient"))
print(memory.bytes_per_image, (resident_bytes("VmHWM") - before) / 128)
"""


@pytest.mark.parametrize("name", ["vit", "unet"])
def test_the_memory_estimate_is_honest(net: Callable[..., bytes], name: str) -> None:
    result = subprocess.run([sys.executable, "-c", MEASURE], input=net(name), capture_output=True, check=True)
    estimated, measured = map(float, result.stdout.split())
    allowance = (8 << 20) / 128  # of arrays and allocator, whatever the graph
    assert measured < 1.1 * estimated + allowance
    assert estimated < 3 * measured + allowance
