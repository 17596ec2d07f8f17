"""The training loop that pretraining and detection share."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from torch import nn

Losses = dict[str, torch.Tensor]


class NonFiniteLossError(FloatingPointError):
    """The loss is infinite or not a number."""


class Trainer(TrainerBase):
    """One iteration: take a batch, compute losses, step the optimizer, add up metrics on the device.

    A batch, and every random number drawn on the way (dropout, sampled anchors and RoIs), is a function of the seed and
    the iteration. So the state to resume from is the model, the optimizer and one integer.

    Metrics are summed on the device and read every `log_period` iterations; in between nothing waits for the device.

    Args:
        model: what is trained; on its device, wrapped for several processes already.
        optimizer: steps the model's parameters; its learning rate is set by a hook.
        batches: given the first iteration, an endless iterable of batches from there on.
        compute: given model and batch, a dict of losses (their sum is minimised) and a dict of further metrics, all
            scalar tensors.
        images_per_batch: over all processes, for the rate.
        seed: of the whole run.
        precision: "fp32", or "bf16" for autocast.
        log_period: iterations between two readings of the metrics.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Callable[[int], Iterable[Any]],
        compute: Callable[[nn.Module, Any], tuple[Losses, Losses]],
        images_per_batch: int,
        seed: int,
        precision: str = "fp32",
        log_period: int = 20,
    ):
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.images_per_batch = images_per_batch
        self.seed = seed
        self.log_period = log_period
        self._batches = batches
        self._compute = compute
        self._device = next(model.parameters()).device
        self._autocast = precision == "bf16"
        self._iterator: Iterator[Any] | None = None
        self._sums: Losses = {}
        self._count = 0
        self._waited = 0.0
        self._window_start = 0.0

    def before_train(self) -> None:
        self._iterator = iter(self._batches(self.start_iter))
        self._window_start = time.perf_counter()
        super().before_train()

    def run_step(self) -> None:
        self.model.train()
        start = time.perf_counter()
        batch = next(self._iterator)
        self._waited += time.perf_counter() - start

        seed_iteration(self.seed, self.iter, comm.get_rank())
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses, metrics = self._compute(self.model, batch)
            total = sum(losses.values())
        total.backward()
        self.optimizer.step()

        self._add({**losses, **metrics, "total_loss": total})
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 == self.max_iter:
            self.read_metrics()

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision that a forward pass runs in."""
        if not self._autocast:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _add(self, metrics: Losses) -> None:
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def read_metrics(self) -> None:
        """Average the metrics since the last reading over iterations and processes, and store them.

        The one place that waits for the device.

        Raises:
            NonFiniteLossError: the loss of an iteration since the last reading is infinite or not a number.
        """
        if self._count == 0:
            return
        values = torch.stack([v.to(self._device) for v in self._sums.values()]) / self._count
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= comm.get_world_size()
        means = dict(zip(self._sums, values.tolist(), strict=True))
        if not math.isfinite(means["total_loss"]):
            bad = ", ".join(name for name, value in means.items() if not math.isfinite(value))
            raise NonFiniteLossError(
                f"the loss became infinite or not a number within the {self._count} iterations up to {self.iter} "
                f"({bad}), at learning rate {self.optimizer.param_groups[0]['lr']:g}. Lower SOLVER.BASE_LR or lengthen "
                "SOLVER.WARMUP_ITERS, and check the data; the last checkpoint was written before."
            )
        seconds = time.perf_counter() - self._window_start
        self.storage.put_scalars(
            **means,
            images_per_second=self._count * self.images_per_batch / seconds,
            data_share=self._waited / seconds,
            smoothing_hint=False,
        )
        self._sums, self._count, self._waited = {}, 0, 0.0
        self._window_start = time.perf_counter()

    def after_step(self) -> None:
        start = time.perf_counter()
        super().after_step()
        # Evaluations and checkpoints are not part of the rate at which images are trained on.
        self._window_start += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model and the iteration."""
        return {"optimizer": self.optimizer.state_dict(), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the optimizer's state, but with the parameter groups' settings of this run."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Make every random number of this iteration, on every device, a function of seed, iteration and rank."""
    word = np.random.SeedSequence((seed, iteration, rank)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(word))
