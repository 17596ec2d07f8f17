"""A training step as one CUDA graph: recorded once, then started by a single call."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch

EAGER_STEPS = 3  # on a stream of their own, as torch asks for before a recording


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect garbage now, so that its memory is free, and not while recording, which frees nothing on a GPU.

    torch does neither by itself: a cycle of dead tensors holds their memory besides the graph's own pool, and its
    collection in the middle of a recording would be an error.
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
    """Run `step(batch)` as it is for a few iterations, then record it and replay the recording from there on.

    Every run of it is a real step of training; the recording itself executes nothing.

    Args:
        step: changes its tensors in place, waits for nothing, and takes tensors of the same shapes each time. What
            changes between two steps besides the batch must be a tensor too (the learning rate).
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
