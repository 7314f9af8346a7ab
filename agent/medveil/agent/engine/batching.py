"""Many images through one session: the same bits for an image whatever batch, budget or thread count it came in.

Floating-point sums depend on their order, and onnxruntime chooses the order by the number of threads, the batch size
and even the alignment of a row in memory (measured: a batch of one sums over a ViT's tokens differently from a batch
of two; InstanceNormalization over 407 pixels differs between the first and the second image of a batch; Log and
Softplus treat the last elements of an array apart). So the work is cut in one way only:

- a call computes one *micro-batch* on one thread; the size follows from the graph alone, never from budget, thread
  count or how many images were given; the last one is filled up with zeros,
- threads work on different micro-batches at the same time, as many as the budget holds,
- a graph whose answer depends on an image's place in its micro-batch runs with micro-batches of one image. Which
  graphs those are is found by asking, once, when the session is opened: :func:`place_matters`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from onnx import ModelProto

from medveil.agent.engine.memory import GraphMemory, measure
from medveil.agent.engine.runtime import Device, Resources, open_session
from medveil.models.errors import ConfigurationError, SelfTestError
from medveil.models.methods.oracle import FloatArray

__all__ = ["BatchRunner", "aligned_copy", "choose_micro_batch", "open_runner", "place_matters"]

_MICRO_BATCH: Final[Mapping[Device, int]] = {"cpu": 8, "cuda": 32}
"""Largest micro-batch. CPU: ResNet-18 reaches 96 % of its best speed at 8, small CNNs and ViT all of it (measured at
1 to 64); every step further makes the last, filled-up one dearer. CUDA: our choice, not measured."""

_MICRO_BATCH_BYTES: Final = 256 << 20
"""Largest micro-batch in bytes (our choice): large images come in smaller ones, so that a small machine can hold one
per thread. A convolution gains nothing from a batch once one image keeps a core busy for milliseconds."""

_ALIGNMENT: Final = 64  # bytes, as onnxruntime aligns its own buffers


class BatchRunner:
    """A session that answers batches of any size, image by image, with reproducible bits.

    Args:
        model: a graph that medveil emitted, batch open on axis 0 of every input and output.
        resources: where it runs, how many micro-batches at the same time, in how much memory.
        memory: what the graph takes.
        micro_batch: images per call; a result may depend on it.

    Raises:
        ConfigurationError: ``memory-budget`` when not even one micro-batch fits, ``threads`` below one.
        SelfTestError: ``runtime-failure``.
    """

    def __init__(
        self,
        model: bytes,
        resources: Resources,
        *,
        memory: GraphMemory,
        micro_batch: int,
    ) -> None:
        if resources.threads < 1:
            raise ConfigurationError("threads", "The number of threads must be at least 1.")
        budget_bytes = resources.memory_budget_bytes
        self.micro_batch = micro_batch
        needed = memory.fixed_bytes + self.micro_batch * memory.bytes_per_image
        if needed > budget_bytes:
            mib = -(-needed // (1 << 20))
            public = f"The memory budget is too small for this model: give it at least {mib} MiB."
            raise ConfigurationError("memory-budget", public)
        fitting = (budget_bytes - memory.fixed_bytes) // max(1, self.micro_batch * memory.bytes_per_image)
        self.workers = 1 if resources.device == "cuda" else max(1, min(resources.threads, fitting))
        self._session = open_session(model, resources)
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, feeds: Mapping[str, FloatArray], outputs: Sequence[str]) -> list[FloatArray]:
        """Compute outputs for a batch of any size.

        Args:
            feeds: every input by name, each ``(N, ...)`` float32.
            outputs: names of the outputs wanted, each ``(N, ...)``.

        Returns:
            The outputs, in the order asked for; arrays of their own, owned by the caller.

        Raises:
            SelfTestError: ``runtime-failure`` when onnxruntime cannot compute.
            ConfigurationError: ``memory`` when it runs out of memory.
        """
        count = len(next(iter(feeds.values())))
        starts = range(0, count, self.micro_batch)
        if not starts:
            raise ConfigurationError("empty-batch", "A batch must hold at least one image.")

        def compute(start: int) -> list[FloatArray]:
            stop = min(start + self.micro_batch, count)
            answers = self._call({name: feeds[name][start:stop] for name in self._names}, outputs)
            return [answer[: stop - start] for answer in answers]

        if self.workers == 1 or len(starts) == 1:
            parts = [compute(start) for start in starts]
        else:
            with ThreadPoolExecutor(min(self.workers, len(starts))) as pool:
                parts = list(pool.map(compute, starts))
        # Concatenating copies: what onnxruntime hands out may be its own memory, gone with the next call.
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    def _call(self, feeds: Mapping[str, FloatArray], outputs: Sequence[str]) -> list[FloatArray]:
        filled = {name: aligned_copy(array, self.micro_batch) for name, array in feeds.items()}
        try:
            answers: list[FloatArray] = self._session.run(list(outputs), filled)
        except Exception as exc:  # onnxruntime's error classes share no root but Exception
            if isinstance(exc, MemoryError) or "allocate memory" in str(exc) or "bad_alloc" in str(exc):
                public = "The machine ran out of memory; lower the memory budget or the number of threads."
                raise ConfigurationError("memory", public, private=str(exc)) from exc
            public = "onnxruntime failed while it computed a gradient; update it or report the model."
            raise SelfTestError("runtime-failure", public, private=str(exc)) from exc
        return answers


def open_runner(
    model: ModelProto, resources: Resources, *, inputs: Mapping[str, tuple[int, ...]], outputs: Sequence[str]
) -> BatchRunner:
    """Open a session with the largest micro-batch in which an image's place does not matter.

    Args:
        model: a graph that medveil emitted, batch open on axis 0 of every input and output.
        resources: what the session may use.
        inputs: every input's name and shape for one image.
        outputs: the outputs that will be asked for.

    Raises:
        ConfigurationError, SelfTestError: as :class:`BatchRunner`.
    """
    data = model.SerializeToString(deterministic=True)
    memory = measure(model)
    size = choose_micro_batch(memory, resources.device)
    runner = BatchRunner(data, resources, memory=memory, micro_batch=size)
    if size > 1:
        rng = np.random.default_rng(_PLACE_SEED)
        feeds = {name: rng.random((size, *shape), np.float32) for name, shape in inputs.items()}
        if place_matters(runner, feeds, outputs):
            return BatchRunner(data, resources, memory=memory, micro_batch=1)
    return runner


def choose_micro_batch(memory: GraphMemory, device: Device) -> int:
    """Return the most images per call: a power of two that follows from the graph and the kind of device alone."""
    size = _MICRO_BATCH[device]
    while size > 1 and size * memory.bytes_per_image > _MICRO_BATCH_BYTES:
        size //= 2
    return size


def place_matters(runner: BatchRunner, feeds: Mapping[str, FloatArray], outputs: Sequence[str]) -> bool:
    """Ask whether an image's answer changes a bit with its place in the micro-batch, or with its neighbours.

    Args:
        runner: the session to ask.
        feeds: one micro-batch of images that differ from each other.
        outputs: the outputs to compare.
    """
    reference = runner.run(feeds, outputs)
    # Three other places for every image, odd and even (alignment has a period of sixteen floats, so a row of odd
    # length already meets another one a place further), and neighbours in another order.
    places = np.arange(len(reference[0]))
    for order in (places[::-1], np.roll(places, 1), np.roll(places, 3)):
        moved = runner.run({name: array[order] for name, array in feeds.items()}, outputs)
        if any(a[order].tobytes() != b.tobytes() for a, b in zip(reference, moved, strict=True)):
            return True
    return False


_PLACE_SEED: Final = 49  # of the images that are asked about; any number does, but always the same


def aligned_copy(array: FloatArray, count: int | None = None) -> FloatArray:
    """Copy an array to memory aligned as onnxruntime's own, filled up with zeros to ``count`` along axis 0.

    NumPy aligns to 16 bytes; a kernel that peels off unaligned floats would sum in another order each time.
    """
    shape = array.shape if count is None else (count, *array.shape[1:])
    size_bytes = math.prod(shape) * array.itemsize
    room = np.zeros(size_bytes + _ALIGNMENT, np.uint8)
    offset = -room.ctypes.data % _ALIGNMENT
    copy: FloatArray = room[offset : offset + size_bytes].view(np.float32).reshape(shape)
    copy[... if count is None else slice(len(array))] = array
    return copy
