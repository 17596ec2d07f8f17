"""The training loop that pretraining and detection share."""

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from resnet_backbone.engine.ema import MovingAverage
from resnet_backbone.engine.graph import GraphedStep
from resnet_backbone.engine.guard import NonFiniteGuard
from resnet_backbone.engine.launch import unwrap
from resnet_backbone.engine.nonfinite import find_cause
from resnet_backbone.engine.precision import autocast
from resnet_backbone.errors import InputError, Interrupted

logger = logging.getLogger(__name__)

Losses = dict[str, torch.Tensor]

LOWEST_LOSS_SCALE = 2.0**-14  # 30 halvings below where torch starts: no scale makes such gradients finite


class NonFiniteLossError(InputError, FloatingPointError):
    """The loss or a weight is infinite or not a number: almost always, the learning rate is too high."""


class Trainer(TrainerBase):
    """One iteration: take a batch, compute losses, step the optimizer, add up metrics on the device.

    A batch, and every random number drawn on the way (dropout, sampled anchors and RoIs), is a function of the seed and
    the iteration. So the state to resume from is the model, the optimizer and one integer, and what follows from these
    (the moving average, the loss scale, the metrics added up so far).

    Metrics are summed on the device and read every `log_period` iterations; in between nothing waits for the device. A
    loss or gradient that is not finite stops all updates on the device at once (`guard.py`), and the run at the next
    reading.

    Attributes:
        last_measured: the newest iteration in which something was measured (`store`); -1 before the first.

    Args:
        model: what is trained; on its device, wrapped for several processes already.
        optimizer: steps the model's parameters; its learning rate is set by a hook. Where it is not fused, each step
            waits for the device.
        batches: given the first iteration, an endless iterable of batches from there on. A batch is a list, or a tuple
            of tensors and lists, of this process's images.
        compute: given model and batch, a dict of losses (means over the batch; their sum is minimised) and a dict of
            further metrics, all scalar tensors, the same names each time.
        images_per_batch: over all processes, for the rate.
        seed: of the whole run.
        precision: "fp32", "bf16" for autocast, or "fp16" for autocast with a loss scale that adapts itself.
        log_period: iterations between two readings of the metrics.
        accumulate: parts of a batch that are computed one after the other before a step, to save memory. The gradient
            is that of the whole batch, except that batch norm sees one part at a time.
        average: of the weights, updated after each step.
        cuda_graph: record the step as one CUDA graph. `batches` gives tuples of tensors of the same shapes then, and
            `compute` waits for nothing.
        names: given an iteration, what to call its images (of this process), for messages.
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
        accumulate: int = 1,
        average: MovingAverage | None = None,
        cuda_graph: bool = False,
        names: Callable[[int], Sequence[str]] | None = None,
    ):
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.images_per_batch = images_per_batch
        self.seed = seed
        self.log_period = log_period
        self.accumulate = accumulate
        self.average = average
        self.last_measured = -1
        self._batches = batches
        self._compute = compute
        self._names = names
        self._device = next(model.parameters()).device
        self._precision = precision
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self._guard = NonFiniteGuard(unwrap(model), gradients=precision != "fp16")
        self._graph = GraphedStep(self._step) if cuda_graph else None
        self._iterator: Iterator[Any] | None = None
        self._metric_names: tuple[str, ...] = ()
        self._sums: torch.Tensor | None = None
        self._count = 0
        self._start_window()

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations from `start_iter` up to, not including, `max_iter`, with the hooks around each.

        As Detectron2's, but what is meant for the user leaves no stack trace in the log.
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
            except (InputError, Interrupted):
                raise
            except Exception:
                logger.exception("training stopped at iteration %d", self.iter)
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        super().before_train()
        self._guard.begin()
        self._iterator = iter(self._batches(self.start_iter))
        self._start_window()

    def before_step(self) -> None:
        start = time.perf_counter()
        super().before_step()
        self._leave_out(time.perf_counter() - start)

    def run_step(self) -> None:
        if not self.model.training:
            self.model.train()
        start = time.perf_counter()
        batch = next(self._iterator)
        self._waited += time.perf_counter() - start

        seed_iteration(self.seed, self.iter, comm.get_rank(), self._device)
        try:
            (self._step if self._graph is None else self._graph)(batch)
        except FloatingPointError as error:  # by which Detectron2 refuses boxes that are not numbers
            raise self._bad_iteration(self.iter, [self._second_look(self.iter)]) from error
        self._count += 1
        self._timed += 1
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 == self.max_iter:
            self.read_metrics()

    def _step(self, batch: Any) -> None:
        """Everything of an iteration that happens on the device; nothing here waits for it."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = split(batch, self.accumulate)
        values = []
        for number, part in enumerate(parts, start=1):
            with self._reduction(last=number == len(parts)):
                with self.autocast():
                    losses, metrics = self._compute(self.model, part)
                    total = sum(losses.values())
                mean = total / len(parts) if len(parts) > 1 else total
                if self._scaler.is_enabled():
                    # A gradient that is not finite is the scaler's sign to skip: for a bad loss, which need not give
                    # one by itself, and for all that comes after it.
                    bad = (self._guard.stopped > 0) | ~total.detach().isfinite()
                    mean = self._scaler.scale(mean * torch.where(bad, math.nan, 1.0))
                mean.backward()
            values.append({**losses, **metrics, "total_loss": total})
        self._add(values)
        self._scaler.unscale_(self.optimizer)
        self._guard.judge(sum(value["total_loss"].detach() for value in values))
        self._update()
        if self.average is not None:
            self.average.update()

    def _reduction(self, *, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over the processes once, with the last part."""
        several = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.no_sync() if several and not last else contextlib.nullcontext()

    def _update(self) -> None:
        if self._scaler.is_enabled():
            self._scaler.step(self.optimizer)
            self._scaler.update()
        elif self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = self._guard.stopped
            self.optimizer.step()
        elif not self._guard.stopped.item():
            self.optimizer.step()

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision that a forward pass runs in."""
        # A graph must hold the weights' conversion to the narrow type itself.
        return autocast(self._precision, self._device, cache_enabled=self._graph is None)

    def _add(self, parts: list[Losses]) -> None:
        """Add the means over a batch's parts to the sums over iterations, in place."""
        names = tuple(parts[0])
        values = [torch.stack([part[name].detach().float().to(self._device) for name in names]) for part in parts]
        mean = values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)
        if self._sums is None:
            self._metric_names, self._sums = names, torch.zeros_like(mean)
        elif names != self._metric_names:
            raise ValueError(f"the metrics were {', '.join(self._metric_names)} and are {', '.join(names)} now")
        self._sums += mean

    def read_metrics(self) -> None:
        """Average the metrics since the last reading over iterations and processes, and store them.

        The one place that waits for the device.

        Raises:
            NonFiniteLossError: the loss or a gradient of an iteration since the last reading is infinite or not a
                number; with a loss scale, a gradient is so whatever the scale.
        """
        if self._count == 0:
            return
        self._check_guard()
        scale = self._scaler.get_scale()
        if scale < LOWEST_LOSS_SCALE:
            raise self._bad_iteration(self.iter, comm.all_gather(self._second_look(self.iter)))
        self.share_metrics()
        values = self._sums / self._count
        seconds = time.perf_counter() - self._window_start
        measured = dict(zip(self._metric_names, values.tolist(), strict=True))
        measured["images_per_second"] = self._timed * self.images_per_batch / seconds
        measured["data_share"] = self._waited / seconds
        if self._scaler.is_enabled():
            measured["loss_scale"] = scale
        self.store(measured)
        self._sums.zero_()
        self._count = 0
        self._start_window()

    def store(self, measured: dict[str, float]) -> None:
        """Store what was measured, for the writers to write after this iteration."""
        self.storage.put_scalars(**measured, smoothing_hint=False)
        self.last_measured = self.iter

    def share_metrics(self) -> None:
        """Give every process the mean of their sums, so that a checkpoint, which one writes, holds them all."""
        if self._count and comm.get_world_size() > 1:
            torch.distributed.all_reduce(self._sums)
            self._sums /= comm.get_world_size()

    def _start_window(self) -> None:
        """Begin to measure the rate anew."""
        self._timed = 0
        self._waited = 0.0
        self._window_start = time.perf_counter()

    def _leave_out(self, seconds: float) -> None:
        """Evaluations and checkpoints are not part of the rate at which images are trained on."""
        self._window_start += seconds

    def check_finite(self) -> None:
        """Find out whether the weights are worth keeping; asked before they are saved or evaluated, in all processes.

        Raises:
            NonFiniteLossError: a loss or gradient since the last reading, or a weight, is infinite or not a number.
        """
        self._check_guard()
        state = {name: t for name, t in unwrap(self.model).state_dict().items() if t.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
        if not all(finite):
            bad = [name for name, is_finite in zip(state, finite, strict=True) if not is_finite]
            raise NonFiniteLossError(
                f"{len(bad)} of {len(state)} tensors of the model ({bad[0]} …) are infinite or not a number after "
                f"iteration {self.iter}, with finite losses. Lower SOLVER.BASE_LR. No checkpoint was written since."
            )

    def _check_guard(self) -> None:
        """Raise NonFiniteLossError if an iteration was bad, in all processes."""
        first = int(self._guard.first_bad)
        if first >= 0:
            iteration = self.start_iter + first
            raise self._bad_iteration(iteration, comm.all_gather(self._second_look(iteration)))

    def _second_look(self, iteration: int) -> tuple[str, list[str]]:
        """The cause, and the names of this process's images."""
        return self._find_cause(iteration), [] if self._names is None else list(self._names(iteration))

    def _bad_iteration(self, iteration: int, found: list[tuple[str, list[str]]]) -> NonFiniteLossError:
        """What to raise, by the second looks of all processes, or of one."""
        # The process that has a cause knows the image; the others only got its gradient.
        cause, names = next(((c, n) for c, n in found if not c.startswith("nothing")), found[0])
        rate = self._rate_at(iteration)
        logger.error("images of iteration %d: %s", iteration, ", ".join(names) or "unknown")
        few = ", ".join(names[:4]) + (f" and {len(names) - 4} more (in the log)" if len(names) > 4 else "")
        return NonFiniteLossError(
            f"iteration {iteration} gave a loss or gradient that is infinite or not a number, at learning rate "
            f"{rate:g}. It appeared first in {cause}. {f'Its images: {few}. ' if names else ''}Nothing of it reached "
            "the weights, and the last checkpoint stays. Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or clip "
            "gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), and check the data."
        )

    def _find_cause(self, iteration: int) -> str:
        """Run a bad iteration again, with the weights that it began with: since it, none have changed."""
        model = unwrap(self.model)
        batch = next(iter(self._batches(iteration)))
        seed_iteration(self.seed, iteration, comm.get_rank(), self._device)

        def losses_of(part: Any) -> Losses:
            with self.autocast():
                return self._compute(model, part)[0]

        model.train()
        with torch.compiler.set_stance("force_eager"):  # compiled, it has no layers to look at
            return find_cause(model, split(batch, self.accumulate), losses_of)

    def _rate_at(self, iteration: int) -> float:
        history = self.storage.histories().get("lr")
        rates = {} if history is None else {stamp: value for value, stamp in history.values()}
        return rates.get(iteration, float(self.optimizer.param_groups[0]["lr"]))

    def after_step(self) -> None:
        start = time.perf_counter()
        super().after_step()
        self._leave_out(time.perf_counter() - start)

    def after_train(self) -> None:
        super().after_train()
        self._iterator = None  # ends the loader's workers

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model and the iteration."""
        state = {"optimizer": self.optimizer.state_dict(), "seed": self.seed}
        if self._scaler.is_enabled():
            state["scaler"] = self._scaler.state_dict()
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self._count:
            state["metrics"] = {"names": list(self._metric_names), "sums": self._sums.cpu(), "count": self._count}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the optimizer's state, but with the parameter groups' settings of this run."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            # The file's settings must go altogether: its initial_lr would outlive a changed SOLVER.BASE_LR.
            parameters = group["params"]
            group.clear()
            group.update(own, params=parameters)
        if "scaler" in state:
            self._scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"] if "average" in state else unwrap(self.model).state_dict())
        if "metrics" in state:
            window = state["metrics"]
            self._metric_names, self._count = tuple(window["names"]), window["count"]
            self._sums = window["sums"].to(self._device)


def split(batch: Any, parts: int) -> list[Any]:
    """A batch (a list, or a tuple of tensors and lists) in equal parts, in order."""
    if parts == 1:
        return [batch]
    if isinstance(batch, list):
        return [batch[i * len(batch) // parts : (i + 1) * len(batch) // parts] for i in range(parts)]
    columns = [entry.chunk(parts) if isinstance(entry, torch.Tensor) else split(entry, parts) for entry in batch]
    rows = zip(*columns, strict=True)
    return [type(batch)(*row) if hasattr(batch, "_fields") else tuple(row) for row in rows]


def seed_iteration(seed: int, iteration: int, rank: int, device: torch.device | str = "cpu") -> None:
    """Make every random number of this iteration, on the CPU and on `device`, a function of seed, iteration and rank.

    The numbers are those that `torch.manual_seed` gives. It is not called, since it seeds every kind of device that
    torch was built for, which takes longer than all else that the loop does in an iteration.
    """
    words = [int(word) for word in np.random.SeedSequence((seed, iteration, rank)).generate_state(2, np.uint64)]
    torch.default_generator.manual_seed(words[0])
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(words[0])
    random.seed(words[1])
    np.random.seed(words[1] % 2**32)
