"""How fast one forward and input-gradient pass is: ours in onnxruntime, against torch and the machine's own roof.

    python bench/gradients.py [--models resnet18,unet] [--rounds 15] [--threads 1] [--no-compile]

Everything runs interleaved in one process, round after round, and is counted in CPU time of this process, so that a
busy machine hurts every contender alike. The roof is what onnxruntime's own matrix product reaches in the same run,
over the floating-point operations that the pass needs: the gradient of a convolution or product in its input costs as
much as the forward pass. Operations are those of a convolution's definition: where it is computed with fewer products
(``medveil.models.autodiff.winograd``), the share of the roof may exceed 100 %. Prints a table and writes it to
``bench/results/gradients.{md,json}``.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from rich.console import Console
from rich.progress import track
from rich.table import Table

import networks
from medveil.models.autodiff import build_gradient, parse
from medveil.models.autodiff.graph import Graph

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP_ROUNDS = 2
SIDES = (512, 1024)  # of the square products that measure the roof: within and beyond the second-level cache


@dataclass(frozen=True)
class Case:
    """A model at one image size and batch."""

    name: str
    title: str
    make: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    batch: int
    loss: str = "cross_entropy"


CASES = (
    Case("resnet18", "ResNet-18, 32 px", lambda: networks.resnet18(), (3, 32, 32), 32),
    Case("unet", "U-Net 16, 128 px", lambda: networks.unet(), (1, 128, 128), 16),
    Case("vit", "ViT-S, 32 px", lambda: networks.vit(), (3, 32, 32), 64),
    Case("densenet", "DenseNet-S, 32 px", lambda: networks.densenet(), (3, 32, 32), 64),
)

AIMS = {"resnet18": (1.3, 0.90), "unet": (2.0, 0.80)}
"""Times torch eager, and share of the roof, that the work was asked to reach."""


@dataclass(frozen=True)
class Speed:
    """Images per CPU second of one contender: median over the rounds, and its quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(seconds: Sequence[float], images: int) -> Speed:
        """Turn rounds into a speed."""
        low, median, high = (images / q for q in statistics.quantiles(seconds, n=4)[::-1])
        return Speed(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    console = Console()
    chosen = [case for case in CASES if case.name in options.models.split(",")]
    load = os.getloadavg()[0]
    results: list[dict[str, object]] = []
    for case in chosen:
        results.append(measure(case, options))
        if options.write:  # after every model: a run cut short keeps what it has
            write(results, machine(options, load))
    console.print(rich_table(results))
    console.print(machine(options, load))


def write(results: Sequence[dict[str, object]], about: dict[str, object]) -> None:
    """Write the results beside this program."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gradients.json").write_text(
        json.dumps({"machine": about, "models": results}, indent=1) + "\n"
    )
    (RESULTS / "gradients.md").write_text(markdown(results, about))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(case.name for case in CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--no-write", dest="write", action="store_false", help="print only")
    return parser.parse_args()


def measure(case: Case, options: argparse.Namespace) -> dict[str, object]:
    """Run every contender of a case, interleaved."""
    torch.manual_seed(0)
    module = case.make().eval()
    model = exported(module, case.shape)
    graph = parse(model)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (case.batch, *case.shape)).astype(np.float32)
    answers = rng.uniform(0, 1, (case.batch, *graph.shapes["logits"][1:])).astype(np.float32)
    target = answers / answers.sum(1, keepdims=True)
    contenders = {
        "ours": ours(build_gradient(model, loss=case.loss), images, target, options.threads),
        "torch eager": with_torch(module, images, target),
        "torch channels-last": with_torch(module, images, target, channels_last=True),
    }
    if options.compile:
        contenders["torch.compile"] = with_torch(torch.compile(module), images, target)
    products = {side: product(side, options.threads) for side in SIDES}
    agreement = relative_distance(contenders["ours"](), contenders["torch eager"]())
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peak = 0.0
    for index in track(range(WARM_UP_ROUNDS + options.rounds), description=case.title):
        for name, run in contenders.items():
            spent = cpu_seconds(run)
            if index >= WARM_UP_ROUNDS:
                seconds[name].append(spent)
        for side, run in products.items():
            peak = max(peak, 2 * side**3 / cpu_seconds(run))
    forward = forward_flops(graph)
    speeds = {name: Speed.of(values, case.batch) for name, values in seconds.items()}
    roof = peak / (2 * forward)
    return {
        "name": case.name,
        "title": case.title,
        "batch": case.batch,
        "forward_gflop": forward / 1e9,
        "peak_gflop_per_s": peak / 1e9,
        "roof_images_per_s": roof,
        "images_per_s": {name: asdict(speed) for name, speed in speeds.items()},
        "times_eager": speeds["ours"].median / speeds["torch eager"].median,
        "share_of_roof": speeds["ours"].median / roof,
        "distance_from_torch": agreement,
    }


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of this process that one call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def exported(module: torch.nn.Module, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Export with an open batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        torch.onnx.export(
            module,
            (torch.zeros(2, *shape),),
            file,
            dynamo=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=17,
        )
    return onnx.load_from_string(file.getvalue())


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """Open a session as the site's engine does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def ours(
    gradient: onnx.ModelProto, images: np.ndarray, target: np.ndarray, threads: int
) -> Callable[[], np.ndarray]:
    """Our gradient graph in onnxruntime."""
    opened = session(gradient, threads)
    return lambda: opened.run(["gradient"], {"image": images, "target": target})[0]


def with_torch(
    module: torch.nn.Module, images: np.ndarray, target: np.ndarray, *, channels_last: bool = False
) -> Callable[[], np.ndarray]:
    """The same pass by torch's autograd; weights need no gradient."""
    for parameter in module.parameters():
        parameter.requires_grad_(requires_grad=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, t = torch.from_numpy(images).contiguous(memory_format=layout), torch.from_numpy(target)
    positions = math.prod(target.shape[2:])

    def run() -> np.ndarray:
        module.to(memory_format=layout)
        asked = x.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(module(asked), t, reduction="sum") / positions
        (gradient,) = torch.autograd.grad(loss, asked)
        return gradient.numpy()

    return run


def product(side: int, threads: int) -> Callable[[], object]:
    """A square matrix product in onnxruntime."""
    matrix = helper.make_tensor_value_info
    names = ("a", "b", "c")
    a, b, c = (matrix(name, TensorProto.FLOAT, [side, side]) for name in names)
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [a, b], [c])
    opened = session(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), threads
    )
    values = np.random.default_rng(0).normal(size=(2, side, side)).astype(np.float32)
    return lambda: opened.run(None, {"a": values[0], "b": values[1]})


def forward_flops(graph: Graph) -> float:
    """Floating-point operations of one image's convolutions and products; a multiply-add counts as two."""
    total = 0.0
    for node in graph.nodes:
        if node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        x, w, y = (graph.shapes[name] for name in (node.inputs[0], node.inputs[1], node.output))
        if node.op == "Conv":
            each = math.prod(y[1:]) * math.prod(w[1:])
        elif node.op == "ConvTranspose":
            each = math.prod(x[1:]) * math.prod(w[1:])
        else:
            each = abs(math.prod(y)) * x[-1]
        total += 2.0 * each
    return total


def relative_distance(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 distance of two gradients."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def machine(options: argparse.Namespace, load: float) -> dict[str, object]:
    """What the figures depend on."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "rounds": options.rounds,
        "load_average_before": round(load, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def rows(results: Sequence[dict[str, object]]) -> tuple[list[str], list[list[str]]]:
    """Lay the results out as a heading and rows of text."""
    names: list[str] = []
    for result in results:
        names += [name for name in result["images_per_s"] if name not in names]
    heading = ["model", "batch", "GF fwd", "roof img/s", *names, "x eager", "% of roof", "aims", "relL2"]
    table = []
    for result in results:
        speeds = {name: str(Speed(**speed)) for name, speed in result["images_per_s"].items()}
        aim = AIMS.get(result["name"])
        table.append(
            [
                result["title"],
                str(result["batch"]),
                f"{result['forward_gflop']:.3f}",
                f"{result['roof_images_per_s']:.0f}",
                *(speeds.get(name, "-") for name in names),
                f"{result['times_eager']:.2f}",
                f"{100 * result['share_of_roof']:.0f}",
                f"{aim[0]} x, {100 * aim[1]:.0f} %" if aim else "-",
                f"{result['distance_from_torch']:.1e}",
            ]
        )
    return heading, table


def rich_table(results: Sequence[dict[str, object]]) -> Table:
    """Render for the screen."""
    heading, body = rows(results)
    table = Table(title="images per CPU second, median (quartiles)")
    for name in heading:
        table.add_column(name)
    for row in body:
        table.add_row(*row)
    return table


def markdown(results: Sequence[dict[str, object]], about: dict[str, object]) -> str:
    """Render for the repository."""
    heading, body = rows(results)
    lines = [
        "# Forward and input-gradient pass",
        "",
        "Images per CPU second, median (quartiles); one process, interleaved.",
    ]
    lines += ["", f"| {' | '.join(heading)} |", "|" + " --- |" * len(heading)]
    lines += [f"| {' | '.join(row)} |" for row in body]
    lines += ["", ", ".join(f"{name} {value}" for name, value in about.items())]
    notes = RESULTS / "gradients-notes.md"
    if notes.exists():
        lines += ["", notes.read_text().rstrip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
