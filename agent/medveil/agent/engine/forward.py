"""Forward passes in onnxruntime: a classifier's scores, a noise generator's perturbation."""

from __future__ import annotations

import numpy as np

from medveil.agent.engine.batching import BatchRunner, open_runner
from medveil.agent.engine.runtime import Resources
from medveil.models.autodiff.admission import AdmittedGraph
from medveil.models.autodiff.emit import Builder
from medveil.models.autodiff.gradient import describe
from medveil.models.autodiff.graph import IMAGE, LOGITS, parse
from medveil.models.errors import ConfigurationError
from medveil.models.methods.oracle import FloatArray

__all__ = ["OnnxClassifier", "OnnxGenerator"]


class OnnxClassifier:
    """A model that scores images; the counterpart of ``OnnxOracle`` where no gradient is needed.

    Args:
        graph: an admitted surrogate.
        resources: what its session may use.

    Raises:
        ConfigurationError, SelfTestError: as :class:`medveil.agent.engine.batching.BatchRunner`.
    """

    def __init__(self, graph: AdmittedGraph, resources: Resources) -> None:
        self._shape = graph.input_shape
        self._runner = _open_forward(graph, graph.input_shape, resources)

    def logits(self, images: FloatArray) -> FloatArray:
        """Return ``(N, K)`` (or ``(N, K, rows, columns)``) scores for ``(N, C, ...)`` float32 images in [0, 1].

        Raises:
            ConfigurationError: ``classifier-input`` for arrays of the wrong shape or type.
            SelfTestError: ``runtime-failure``.
        """
        if images.dtype != np.float32 or images.shape[1:] != self._shape:
            public = f"The classifier takes float32 batches of shape {self._shape}; got {images.shape[1:]}."
            raise ConfigurationError("classifier-input", public)
        return self._runner.run({IMAGE: images}, (LOGITS,))[0]


class OnnxGenerator:
    """A noise generator: image (and target) in, perturbation out, in one pass.

    Args:
        graph: a graph admitted in the role ``generator``.
        resources: what its session may use.

    Raises:
        ConfigurationError, SelfTestError: as :class:`medveil.agent.engine.batching.BatchRunner`.
    """

    def __init__(self, graph: AdmittedGraph, resources: Resources) -> None:
        self._image, self._target = graph.input_shape, graph.target_shape
        planes = 0 if self._target is None else self._target[0]
        channels, *space = self._image
        self._runner = _open_forward(graph, (channels + planes, *space), resources)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(C, ...)``."""
        return self._image

    @property
    def takes_target(self) -> bool:
        """Whether the perturbation depends on the label or mask too."""
        return self._target is not None

    def perturbation(self, images: FloatArray, targets: FloatArray | None = None) -> FloatArray:
        """Return what to add to each image, before any budget is enforced.

        Args:
            images: ``(N, C, ...)`` float32 in [0, 1].
            targets: ``(N, K)`` or ``(N, K, rows, columns)`` float32, if the generator takes them.

        Returns:
            ``(N, C, ...)`` float32 in units of intensity.

        Raises:
            ConfigurationError: ``generator-input`` for arrays of the wrong shape or type, a missing target, or one
                that the generator has no use for.
            SelfTestError: ``runtime-failure``.
        """
        given = None if targets is None else targets.shape[1:]
        dtypes = {array.dtype for array in (images, targets) if array is not None}
        if images.shape[1:] != self._image or given != self._target or dtypes != {np.dtype(np.float32)}:
            public = f"The generator takes float32 images {self._image} and targets {self._target}."
            raise ConfigurationError("generator-input", public)
        return self._runner.run({IMAGE: images if targets is None else _packed(images, targets)}, (LOGITS,))[
            0
        ]


def _open_forward(graph: AdmittedGraph, image: tuple[int, ...], resources: Resources) -> BatchRunner:
    forward = parse(graph)
    builder = Builder()
    builder.include(forward)
    model = builder.build(
        "forward", [describe(IMAGE, forward.shapes[IMAGE])], [describe(LOGITS, forward.shapes[LOGITS])]
    )
    return open_runner(model, resources, inputs={IMAGE: image}, outputs=(LOGITS,))


def _packed(images: FloatArray, targets: FloatArray) -> FloatArray:
    """Append the target to the channels, as admission lets the graph read it: a class is a constant plane."""
    planes = targets.reshape(*targets.shape, *(1 for _ in range(images.ndim - targets.ndim)))
    return np.concatenate([images, np.broadcast_to(planes, (*targets.shape[:2], *images.shape[2:]))], axis=1)
