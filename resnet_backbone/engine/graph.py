"""A training step as one CUDA graph: captured once, then replayed with a single call."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch

EAGER_STEPS = 3  # warm-up on a side stream, which torch requires before capture


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect garbage now to free its memory, and disable collection during capture, when it frees no GPU memory.

    torch does neither by itself. A cycle of dead tensors would hold memory on top of the graph's own pool, and
    collecting it during capture would be an error.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphedStep:
    """Run `step(batch)` eagerly for a few iterations, then capture it as a graph and replay the graph from then on.

    Every call is a real training step; the capture itself executes nothing.

    Args:
        step: updates its tensors in place, never synchronizes, and takes tensors of the same shapes each time. Anything
            else that changes between steps, such as the learning rate, must be a tensor too.
    """

    def __init__(self, step: Callable[[Sequence[torch.Tensor]], None]):
        self._step = step
        self._stream = torch.cuda.Stream()
        self._eager = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Sequence[torch.Tensor] = ()

    def __call__(self, batch: Sequence[torch.Tensor]) -> None:
        if self._eager < EAGER_STEPS:
            self._eager += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            copies = [tensor.clone() for tensor in batch]
            self._inputs = type(batch)(*copies) if hasattr(batch, "_fields") else tuple(copies)
            self._graph = torch.cuda.CUDAGraph()
            with _no_garbage(), torch.cuda.graph(self._graph):
                self._step(self._inputs)
        for kept, tensor in zip(self._inputs, batch, strict=True):
            kept.copy_(tensor, non_blocking=True)
        self._graph.replay()
