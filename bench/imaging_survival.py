"""What is left of a perturbation after the steps that a consumer's pipeline takes, on one head CT.

For each step T: ``T(protected) - T(clean)`` against the change that was wanted, resized where T resizes. Correlation
says whether it still points the same way; energy, the mean square over that of the wanted change, how much is left.
Under JPEG an energy above 1 is codec noise.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as PillowImage

import report
from medveil.agent.budget import Budget, enforce, room
from medveil.agent.engine import open_oracle
from medveil.agent.imageio import Derivation, DerivedUids, DicomFormat, Image, WindowPolicy
from medveil.agent.imageio.dicom_survey import sign_noise
from medveil.agent.imageio.dicom_window import Choice
from medveil.agent.imageio.window import Mapping as Shown
from medveil.agent.imageio.window import StoredWindow, Window
from medveil.agent.perturb import Perturber
from medveil.agent.preparation import Wishes, prepare
from medveil.models.methods.oracle import GradientOracle

Array = npt.NDArray[Any]

HEAD_CT = "dicom_pydicom_data/693_UNCR.dcm"
RELEASE_WINDOW = (40.0, 400.0)
OTHER_WINDOWS = {"40/80": (40.0, 80.0), "-600/1500": (-600.0, 1500.0), "400/1800": (400.0, 1800.0)}
EPSILONS = (2.0, 8.0)
MASK = 0.1
SIDE = 224
QUALITY = 90

EARLIER = (
    ("native sign, earlier", "1.00/.92", "0.99/.94", "1.00/.08", ".46/.98", ".81/.12", ".27/.48"),
    ("28x28 tiles, earlier", "1.00/.92", "0.99/.94", ".98/.82", ".88/1.1", ".97/.84", ".83/1.2"),
    ("20 % of 224 cells, earlier", "1.00/.92", "0.99/.94", ".87/.32", ".68/1.6", ".79/.38", ".30/1.7"),
)
"""Patterns without a surrogate at 2/255, from the measurement that this design was decided on (its table 2.3)."""

Step = Callable[[Array], Array]


@dataclass(frozen=True)
class Noise:
    """A kind of change: what was wanted, in display units, and the stored values that came of it."""

    label: str
    wanted: Array
    written: Array


def measure(data: Path, bundle: Path) -> tuple[str, dict[str, Any]]:
    """Return tables and figures."""
    image = head_ct(data)
    prepared = prepare(Wishes(bundle))
    oracles = {"32x32 surrogates": prepared.perturber.oracle, "224x224 surrogate": random_surrogate()}
    sections, figures = [], {}
    for epsilon in EPSILONS:
        noises = [_native_sign(image, epsilon)]
        for name, oracle in oracles.items():
            perturber = replace(prepared.perturber, oracle=oracle)
            noises += [_salm(image, perturber, f"SALM, {name}", epsilon, mask) for mask in (1.0, MASK)]
        found = {noise.label: survival(image, noise) for noise in noises}
        figures[f"{epsilon:g}"] = found
        sections.append(_table(epsilon, found))
    intro = (
        f"`{HEAD_CT}` (512x512, 1 HU per step), budget counted in the window 40/400; correlation / energy left. "
        "Resizing starts from the 8-bit picture and rounds to 8 bits again, which costs small changes their "
        "direction; the earlier figures resized without rounding. The 224x224 surrogate has random weights: it "
        "stands for a network of the usual size, whose gradients are rougher than a small one's. Windows other than "
        "the release's are shown with the whole chain in 8 bits."
    )
    return "\n\n".join([intro, *sections]), figures


def head_ct(data: Path) -> Image:
    """Return the slice, with its budget counted in the soft-tissue window."""
    nobody = Derivation(DerivedUids(bytes(16), "", ""), datetime.min, "", "")
    reader = DicomFormat(nobody, WindowPolicy(Choice.PRESETS, {"CT": (RELEASE_WINDOW,)}))
    item = reader.inspect(data / HEAD_CT, PurePosixPath(HEAD_CT))
    with reader.open(item, data) as frames:
        return frames[0]


def random_surrogate() -> GradientOracle:
    """Return a small convolutional network of 224x224 pixels with random weights."""
    rng = np.random.default_rng(0)
    weights = {"w1": (8, 1, 7, 7), "w2": (16, 8, 3, 3), "w3": (2, 16)}
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], pads=[3] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["logits"], transB=1),
    ]
    drawn = {name: rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for name, shape in weights.items()}
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in drawn.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return open_oracle(
        [("random", model.SerializeToString(), None)], device="cpu", threads=1, memory_budget_bytes=2**28
    )


def _native_sign(image: Image, epsilon: float) -> Noise:
    """Return noise without a surrogate; what lies outside the window shows none, and none is wanted there."""
    written = sign_noise(image, epsilon)
    down, up = room(image, Budget(epsilon, 1.0))
    direction = np.where(up[0] - down[0] > 0, np.sign(written.astype(int) - image.pixels), 0)
    return Noise("native sign", (direction * epsilon / 255).astype(np.float32), written)


def _salm(image: Image, perturber: Perturber, name: str, epsilon: float, mask: float) -> Noise:
    budget = Budget(epsilon, mask)
    settings = replace(perturber.settings, epsilon=epsilon / 255, mask_ratio=mask)
    wanted = replace(perturber, settings=settings).wanted([image], [0], budget)[0]
    label = f"{name}, {'all pixels' if mask == 1 else f'{mask:.0%} of them'}"
    return Noise(label, wanted[0], enforce(image, wanted, budget))


def survival(image: Image, noise: Noise) -> dict[str, list[float]]:
    """Return correlation and energy after each step."""
    return {
        name: _compared(chain(image, noise.written) - chain(image, image.pixels), noise.wanted)
        for name, chain in chains(image).items()
    }


def chains(image: Image) -> Mapping[str, Callable[[Image, Array], Array]]:
    """Return every way from stored values to what a consumer trains on, in units of the display range."""

    def shown(window: StoredWindow | None, *steps: Step) -> Callable[[Image, Array], Array]:
        def run(image: Image, stored: Array) -> Array:
            picture = eight_bit((window or image.window).display(stored))
            for step in steps:
                picture = step(picture)
            return picture.astype(np.float64) / 255

        return run

    assert isinstance(image.window, StoredWindow)
    first = image.window.mappings[0]
    others = {
        f"window {name}": shown(
            replace(image.window, mappings=(Shown(first.modality, Window(*window), name=name),))
        )
        for name, window in OTHER_WINDOWS.items()
    }
    return {
        "stored": lambda image, stored: image.window.display(stored).astype(np.float64),
        "8-bit PNG": shown(None),
        "resize 224": shown(None, resized),
        "q90": shown(None, through_jpeg),
        "q90, 224": shown(None, through_jpeg, resized),
        "224, q90": shown(None, resized, through_jpeg),
        **others,
    }


def eight_bit(display: Array) -> Array:
    """Return what an export to an 8-bit picture keeps."""
    return np.rint(display * 255).astype(np.uint8)


def resized(picture: Array) -> Array:
    """Return a picture of the usual network's size: bilinear with antialiasing."""
    return np.asarray(PillowImage.fromarray(picture).resize((SIDE, SIDE), PillowImage.Resampling.BILINEAR))


def through_jpeg(picture: Array) -> Array:
    """Return a picture after JPEG at quality 90."""
    buffer = io.BytesIO()
    PillowImage.fromarray(picture).save(buffer, "JPEG", quality=QUALITY)
    return np.asarray(PillowImage.open(buffer))


def _compared(left: Array, wanted: Array) -> list[float]:
    reference = wanted.astype(np.float64)
    energy = float(np.square(left).mean() / np.square(reference).mean())
    if left.shape != reference.shape:
        small = PillowImage.fromarray(wanted).resize(left.shape[::-1], PillowImage.Resampling.BILINEAR)
        reference = np.asarray(small, np.float64)
    together = float((left * reference).mean())
    length = float(np.sqrt(np.square(left).mean() * np.square(reference).mean()))
    return [together / length if length else 0.0, energy]


def _table(epsilon: float, found: Mapping[str, Mapping[str, list[float]]]) -> str:
    steps = list(next(iter(found.values())))
    rows = [
        [label, *(f"{values[step][0]:.2f}/{values[step][1]:.2f}" for step in steps)]
        for label, values in found.items()
    ]
    if epsilon == EPSILONS[0]:
        rows += [[*earlier, *["-"] * (len(steps) + 1 - len(earlier))] for earlier in EARLIER]
    return f"### {epsilon:g}/255\n\n" + report.markdown_table(["change", *steps], rows)
