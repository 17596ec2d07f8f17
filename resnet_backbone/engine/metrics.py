"""Training metrics: summed on the device, averaged and read periodically."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm


class MetricSums:
    """Sums of metrics since the last reading, kept on the device.

    The metric names must be the same in every iteration.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._names: tuple[str, ...] = ()
        self._sums: torch.Tensor | None = None
        self.count = 0  # iterations, counted by the caller: replaying a graph runs no Python

    def add(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Add the mean over a batch's micro-batches, in place and without waiting for the device."""
        names = tuple(micro_batches[0])
        values = [torch.stack([m[name].detach().float().to(self._device) for name in names]) for m in micro_batches]
        mean = values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)
        if self._sums is None:
            self._names, self._sums = names, torch.zeros_like(mean)
        elif names != self._names:
            raise ValueError(f"the metrics were {', '.join(self._names)} and are {', '.join(names)} now")
        self._sums += mean

    def share(self) -> None:
        """Average the sums over processes, so that the checkpoint, which one process writes, covers all of them."""
        if self.count and comm.get_world_size() > 1:
            dist.all_reduce(self._sums)
            self._sums /= comm.get_world_size()

    def read(self) -> dict[str, float]:
        """Return the means over iterations and processes since the last reading, and reset; waits for the device."""
        self.share()
        means = dict(zip(self._names, (self._sums / self.count).tolist(), strict=True))
        self._sums.zero_()
        self.count = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums of a partial window; empty right after a reading."""
        return {"names": list(self._names), "sums": self._sums.cpu(), "count": self.count} if self.count else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._names, self.count = tuple(state["names"]), state["count"]
        self._sums = state["sums"].to(self._device)


class Throughput:
    """Training throughput in images, and the fraction of time spent waiting for data.

    Evaluations and checkpoints are excluded.
    """

    def __init__(self, images_per_batch: int):
        self._images_per_batch = images_per_batch
        self.restart()

    def restart(self) -> None:
        """Start measuring from now."""
        self._iterations = 0
        self._waited = 0.0
        self._start = time.perf_counter()

    def count_iteration(self, waited: float) -> None:
        """Count a finished iteration that spent `waited` seconds waiting for its batch."""
        self._iterations += 1
        self._waited += waited

    def leave_out(self, seconds: float) -> None:
        """Exclude `seconds` that were spent on something else."""
        self._start += seconds

    def read(self) -> dict[str, float]:
        """Return `images_per_second` over all processes and `data_share`, and reset."""
        seconds = time.perf_counter() - self._start
        found = {
            "images_per_second": self._iterations * self._images_per_batch / seconds,
            "data_share": self._waited / seconds,
        }
        self.restart()
        return found
