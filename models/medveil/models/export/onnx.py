"""Export a net as a plain forward ONNX graph: image in, logits out, batch open, one file, nothing external."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from medveil.models.errors import RefusedError

__all__ = ["IMAGE", "LOGITS", "OPSET", "bare", "quiet", "to_onnx"]

IMAGE = "image"
LOGITS = "logits"
OPSET = 20
"""The opset that medveil's own gradient graphs are written in (`medveil.models.autodiff`)."""

# float32 nets of this size agree with torch to about 1e-6; a graph that is off by more is another function.
_TOLERANCE = 1e-4
_CHECK_BATCHES = (1, 3)


def to_onnx(net: nn.Module, input_shape: tuple[int, ...], *, trainable: bool = False) -> bytes:
    """Return the net's evaluation-mode forward pass as ONNX bytes, checked in onnxruntime against torch.

    Args:
        net: ``(N, *input_shape)`` to logits ``(N, K)``.
        input_shape: ``(C, H, W)``.
        trainable: keep batch norms as nodes and parameters under their torch names, for training steps in ONNX.
            Otherwise batch norms are folded into the convolutions before them, which is smaller and faster.

    Raises:
        RefusedError: "export": onnxruntime computes something else than torch.
    """
    net = copy.deepcopy(net).eval().float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with quiet():
        program = torch.onnx.export(
            net,
            (torch.zeros(2, *input_shape),),
            input_names=[IMAGE],
            output_names=[LOGITS],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            optimize=not trainable,
            verbose=False,
        )
    assert program is not None  # noqa: S101 (torch's signature: None only when it writes a file itself)
    model = program.model_proto
    model = bare(model)
    _check(model, net, input_shape)
    return bytes(model.SerializeToString(deterministic=True))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporter from talking: its notes are about its own future, not about this graph."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def bare(model: onnx.ModelProto, *, name: str = "surrogate") -> onnx.ModelProto:
    """Return the graph without what the exporter noted down: source paths, stack traces, value types, versions."""
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    stripped.producer_name, stripped.producer_version, stripped.doc_string = "medveil", "", ""
    del stripped.metadata_props[:]
    graph = stripped.graph
    graph.name, graph.doc_string = name, ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    # Only the default domain is in use; a second entry would be an invitation.
    used = {node.domain for node in graph.node}
    for entry in [e for e in stripped.opset_import if e.domain not in used]:
        stripped.opset_import.remove(entry)
    _inline(graph)
    return stripped


def _inline(graph: onnx.GraphProto) -> None:
    """Store every weight as raw little-endian bytes inside the file."""
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.raw_data:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))


def _check(model: onnx.ModelProto, net: nn.Module, input_shape: tuple[int, ...]) -> None:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for batch in _CHECK_BATCHES:
        images = rng.random((batch, *input_shape), np.float32)
        (answered,) = session.run([LOGITS], {IMAGE: images})
        with torch.no_grad():
            expected = net(torch.from_numpy(images)).numpy()
        if not np.allclose(answered, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise RefusedError("export", "The exported graph does not compute what the net computes.")
