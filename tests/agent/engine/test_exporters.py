"""What torch writes, with either exporter and at any admitted opset, becomes an oracle."""

from __future__ import annotations

import io
import warnings

import pytest

from medveil.agent.engine import open_oracle

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.train


def exported(*, dynamo: bool, opset: int) -> bytes:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.SiLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 8, 3, stride=2, padding=1),
        torch.nn.GroupNorm(2, 8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    ).eval()
    file, images = io.BytesIO(), torch.rand(2, 1, 14, 14)
    batch: dict[str, object] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "external_data": False, "verbose": False}
        if dynamo
        else {"dynamic_axes": {"image": {0: "batch"}, "logits": {0: "batch"}}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        torch.onnx.export(
            net,
            (images,),
            file,
            dynamo=dynamo,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits"],
            **batch,
        )
    return file.getvalue()


@pytest.mark.parametrize(("dynamo", "opset"), [(False, 13), (False, 17), (True, 18), (True, 20), (True, 22)])
def test_what_torch_exports_is_admitted_and_proves_itself(dynamo: bool, opset: int) -> None:
    data = exported(dynamo=dynamo, opset=opset)
    oracle = open_oracle([("torch", data, None)], device="cpu", threads=1, memory_budget_bytes=1 << 30)
    assert (oracle.input_shape, oracle.classes) == ((1, 14, 14), 3)
