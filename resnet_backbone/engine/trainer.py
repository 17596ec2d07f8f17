"""The training loop that pretraining and detection share."""

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from resnet_backbone.engine.launch import unwrap
from resnet_backbone.errors import InputError

logger = logging.getLogger(__name__)

Losses = dict[str, torch.Tensor]


class NonFiniteLossError(InputError, FloatingPointError):
    """The loss or a weight is infinite or not a number: almost always, the learning rate is too high."""


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

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations from `start_iter` up to, not including, `max_iter`, with the hooks around each.

        As Detectron2's, but an InputError, which is meant for the user, leaves no stack trace in the log.
        """
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter += 1  # hooks tell by it in after_train that training came to its end
            except InputError:
                raise
            except Exception:
                logger.exception("training stopped at iteration %d", self.iter)
                raise
            finally:
                self.after_train()

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
        means = self._average()
        seconds = time.perf_counter() - self._window_start
        self.storage.put_scalars(
            **means,
            images_per_second=self._count * self.images_per_batch / seconds,
            data_share=self._waited / seconds,
            smoothing_hint=False,
        )
        self._sums, self._count, self._waited = {}, 0, 0.0
        self._window_start = time.perf_counter()

    def check_finite(self) -> None:
        """Find out whether the weights are worth keeping; the metrics go on being added up.

        A loss that is not a number is noticed at the next reading of the metrics, and a gradient that is not a number
        an iteration later. So this is asked before weights are saved or evaluated, in all processes.

        Raises:
            NonFiniteLossError: a loss since the last reading, or a weight, is infinite or not a number.
        """
        if self._count:
            self._average()
        state = {name: t for name, t in unwrap(self.model).state_dict().items() if t.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
        if not all(finite):
            bad = [name for name, is_finite in zip(state, finite, strict=True) if not is_finite]
            raise self._non_finite(f"{len(bad)} of {len(state)} tensors of the model ({bad[0]} …)")

    def _average(self) -> dict[str, float]:
        values = torch.stack([v.to(self._device) for v in self._sums.values()]) / self._count
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= comm.get_world_size()
        means = dict(zip(self._sums, values.tolist(), strict=True))
        if not math.isfinite(means["total_loss"]):
            bad = ", ".join(name for name, value in means.items() if not math.isfinite(value))
            raise self._non_finite(f"the loss ({bad})")
        return means

    def _non_finite(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{what} became infinite or not a number by iteration {self.iter}, within the last {max(self._count, 1)}, "
            f"at learning rate {self.optimizer.param_groups[0]['lr']:g}. Lower SOLVER.BASE_LR or lengthen "
            "SOLVER.WARMUP_ITERS, and check the data. No checkpoint was written since."
        )

    def after_step(self) -> None:
        start = time.perf_counter()
        super().after_step()
        # Evaluations and checkpoints are not part of the rate at which images are trained on.
        self._window_start += time.perf_counter() - start

    def after_train(self) -> None:
        super().after_train()
        self._iterator = None  # ends the loader's workers

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model and the iteration."""
        return {"optimizer": self.optimizer.state_dict(), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the optimizer's state, but with the parameter groups' settings of this run."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            # The file's settings must go altogether: its initial_lr would outlive a changed SOLVER.BASE_LR.
            parameters = group["params"]
            group.clear()
            group.update(own, params=parameters)


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Make every random number of this iteration, on every device, a function of seed, iteration and rank."""
    words = [int(word) for word in np.random.SeedSequence((seed, iteration, rank)).generate_state(2, np.uint64)]
    torch.manual_seed(words[0])
    random.seed(words[1])
    np.random.seed(words[1] % 2**32)
