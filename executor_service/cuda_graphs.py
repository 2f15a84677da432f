"""Model steps captured as CUDA graphs: one launch instead of hundreds, where steps are small.

Graphs are captured once, for a chosen set of sizes, largest first, so that all of them share the memory of the largest.
A step runs in the smallest graph that covers it, padded; where none does it runs eagerly.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from executor_service.batch_dimensions import BatchDimensions, decode_sizes, mixed_sizes, smallest_cover
from executor_service.input_batch import InputBatch
from executor_service.metadata.step_buffers import StepBuffers, StepInputs

logger = logging.getLogger(__name__)

_MAX_GRAPH_TOKENS = 512  # larger steps keep a device busy for longer than their launches take
_MIXED_SIZES = 4


def graph_sizes(max_tokens: int, max_rows: int) -> list[BatchDimensions]:
    """The sizes to capture for steps of up to ``max_tokens`` tokens and ``max_rows`` requests, if they are small."""
    decodes = decode_sizes(min(max_rows, _MAX_GRAPH_TOKENS))
    return decodes + mixed_sizes(min(max_tokens, _MAX_GRAPH_TOKENS), max_rows, _MIXED_SIZES)


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """Work that can be repeated on the same memory: ``replay`` reads the buffers anew and fills ``output`` again."""

    replay: Callable[[], None]
    output: Tensor


class Capturer(Protocol):
    """Makes work repeatable."""

    def capture(self, work: Callable[[], Tensor]) -> CapturedStep:
        """Run ``work`` once or more, and hold on to what it did."""

    def memory(self) -> int:
        """Bytes that this process's tensors take on the device."""


class CudaCapturer:
    """CUDA graphs, all in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Tensor]) -> CapturedStep:
        """See Capturer. The work runs once before: kernels must be compiled and libraries set up by then."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = work()
        return CapturedStep(graph.replay, output)

    def memory(self) -> int:
        """See Capturer; without what is kept for later only, which captures give back before they begin."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)


class EagerCapturer:
    """Repeats work by running it again, for devices without graphs: the same buffers, padding and choice of size."""

    def capture(self, work: Callable[[], Tensor]) -> CapturedStep:
        """See Capturer."""
        output = work()
        return CapturedStep(lambda: _refill(output, work), output)

    def memory(self) -> int:
        """See Capturer; not measured."""
        return 0


def _refill(output: Tensor, work: Callable[[], Tensor]) -> None:
    output.copy_(work())


@dataclass(slots=True)
class GraphUse:
    """How many steps have run in a graph, and how many in none since none covers them."""

    replayed: int = 0
    eager: int = 0


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What the captures cost, and what they are good for."""

    graphs: int
    seconds: float
    memory: int  # bytes
    use: GraphUse  # goes on counting


class StepGraphs:
    """Captured steps of a model, by size."""

    def __init__(
        self,
        forward: Callable[[StepInputs], Tensor],
        buffers: StepBuffers,
        sizes: Sequence[BatchDimensions],
        capturer: Capturer,
    ) -> None:
        """Capture ``forward`` for each of ``sizes``; it gives hidden states [T, hidden] and may only read the buffers
        and what never moves. Raises whatever it raises.
        """
        began, memory = time.monotonic(), capturer.memory()
        self._buffers = buffers
        self._steps: dict[BatchDimensions, CapturedStep] = {}
        self._use = GraphUse()
        buffers.clear()
        for size in sorted(sizes, reverse=True):
            inputs = buffers.view(size)
            self._steps[size] = capturer.capture(lambda inputs=inputs: forward(inputs))  # type: ignore[misc]
        self.report = CaptureReport(len(self._steps), time.monotonic() - began, capturer.memory() - memory, self._use)
        logger.info(
            "captured %d graphs in %.1f s, %.1f MiB",
            len(self._steps),
            self.report.seconds,
            self.report.memory / (1 << 20),
        )

    def run(self, batch: InputBatch) -> Tensor | None:
        """Hidden states of ``batch``, [T, hidden] with T tokens or more, valid until the next call; None where no graph
        covers it.
        """
        size = smallest_cover(self._steps, batch.dimensions)
        if size is None:
            self._use.eager += 1
            return None
        self._use.replayed += 1
        step = self._steps[size]
        self._buffers.load(batch)
        step.replay()
        return step.output
