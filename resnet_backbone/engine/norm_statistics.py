"""Batch norm's running statistics in several processes: each has its own, evaluations and checkpoints see the mean."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn


class NormStatistics:
    """The running statistics of some models that processes train together.

    Each process updates its own from its own images, since agreeing on them in every iteration would cost a broadcast.
    `averaged` puts the mean over processes in their place for a while. Each process's own values go into checkpoints,
    so that a resumed run ends in the same bits. SyncBatchNorm's are the same everywhere.

    Args:
        models: the trained network, and the moving average of its weights if there is one.
    """

    def __init__(self, models: Sequence[nn.Module]):
        norms = [
            module
            for model in models
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        ]
        self._buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        self._own: list[torch.Tensor] | None = None

    def average(self) -> None:
        """Replace the statistics with their mean over processes; call it in all of them."""
        if comm.get_world_size() > 1 and self._buffers:
            mean = self._flat().double()
            torch.distributed.all_reduce(mean)
            self._put(mean / comm.get_world_size())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the mean over processes in the place of the statistics; enter it in all processes."""
        if comm.get_world_size() == 1 or not self._buffers:
            yield
            return
        own = self._flat()
        self._own = [torch.empty_like(own) for _ in range(comm.get_world_size())]
        torch.distributed.all_gather(self._own, own)
        try:
            self.average()
            yield
        finally:
            self._put(own)
            self._own = None

    def state_dict(self) -> dict[str, Any]:
        """Return every process's own statistics, inside `averaged`.

        Empty with one process, or without batch norm.
        """
        return {} if self._own is None else {"own": torch.stack(self._own).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this process's own statistics; with another number of processes, keep the mean that the models hold.

        The trained network's come first: a moving average may have come or gone since they were saved.
        """
        own = state["own"]
        if len(own) == comm.get_world_size():
            values = self._flat().to(own.dtype).cpu()
            both = min(len(values), own.shape[1])
            values[:both] = own[comm.get_rank(), :both]
            self._put(values)

    def _flat(self) -> torch.Tensor:
        return torch.cat([buffer.flatten() for buffer in self._buffers])

    def _put(self, values: torch.Tensor) -> None:
        sizes = [buffer.numel() for buffer in self._buffers]
        with torch.no_grad():
            for buffer, part in zip(self._buffers, values.split(sizes), strict=True):
                buffer.copy_(part.view_as(buffer))
