"""Metrics of training: summed on the device, read and averaged now and then."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm


class MetricSums:
    """Sums of metrics over the iterations since the last reading, kept on the device.

    The names of the metrics are the same in each iteration.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._names: tuple[str, ...] = ()
        self._sums: torch.Tensor | None = None
        self.count = 0  # of iterations, counted by the host: a graph's replay runs no Python

    def add(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Add the means over a batch's micro-batches, in place; nothing here waits for the device."""
        names = tuple(micro_batches[0])
        values = [torch.stack([m[name].detach().float().to(self._device) for name in names]) for m in micro_batches]
        mean = values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)
        if self._sums is None:
            self._names, self._sums = names, torch.zeros_like(mean)
        elif names != self._names:
            raise ValueError(f"the metrics were {', '.join(self._names)} and are {', '.join(names)} now")
        self._sums += mean

    def share(self) -> None:
        """Give every process the mean of their sums, so that a checkpoint, which one writes, holds them all."""
        if self.count and comm.get_world_size() > 1:
            dist.all_reduce(self._sums)
            self._sums /= comm.get_world_size()

    def read(self) -> dict[str, float]:
        """The means over iterations and processes since the last reading; waits for the device and starts anew."""
        self.share()
        means = dict(zip(self._names, (self._sums / self.count).tolist(), strict=True))
        self._sums.zero_()
        self.count = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums of a window that is not full; empty right after a reading."""
        return {"names": list(self._names), "sums": self._sums.cpu(), "count": self.count} if self.count else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._names, self.count = tuple(state["names"]), state["count"]
        self._sums = state["sums"].to(self._device)


class Throughput:
    """The rate at which images are trained on, and the share of the time that is spent waiting for data.

    Evaluations and checkpoints are left out.
    """

    def __init__(self, images_per_batch: int):
        self._images_per_batch = images_per_batch
        self.restart()

    def restart(self) -> None:
        """Measure from here on."""
        self._iterations = 0
        self._waited = 0.0
        self._start = time.perf_counter()

    def count_iteration(self, waited: float) -> None:
        """An iteration is done, of which so many seconds were spent waiting for its batch."""
        self._iterations += 1
        self._waited += waited

    def leave_out(self, seconds: float) -> None:
        """Something else took so long."""
        self._start += seconds

    def read(self) -> dict[str, float]:
        """`images_per_second` over all processes, and `data_share`; starts anew."""
        seconds = time.perf_counter() - self._start
        found = {
            "images_per_second": self._iterations * self._images_per_batch / seconds,
            "data_share": self._waited / seconds,
        }
        self.restart()
        return found
