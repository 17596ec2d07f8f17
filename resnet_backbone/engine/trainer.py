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

from resnet_backbone.data.workers import explained_deaths
from resnet_backbone.engine.distributed import lost_another_process, reduce_gradients, unwrap
from resnet_backbone.engine.ema import MovingAverage
from resnet_backbone.engine.graph import GraphedStep
from resnet_backbone.engine.metrics import MetricSums, Throughput
from resnet_backbone.engine.nonfinite import Diagnosis, Losses, NonFiniteGuard, check_weights
from resnet_backbone.engine.norm_statistics import NormStatistics
from resnet_backbone.engine.precision import autocast
from resnet_backbone.errors import InputError, Interrupted, os_error

logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Any], tuple[Losses, Losses]]

LOWEST_LOSS_SCALE = 2.0**-14  # 30 halvings below torch's initial scale: no scale makes such gradients finite


class Trainer(TrainerBase):
    """Each iteration, take a batch, compute losses, step the optimizer and accumulate metrics on the device.

    Each batch, and every random number drawn along the way (dropout, sampled anchors and RoIs), is a function of the
    seed and the iteration. So the resume state is the model, the optimizer, one integer, and state derived from these
    (the moving average, the loss scale, the metric sums so far).

    Metrics are summed on the device and read every `log_period` iterations; nothing waits for the device in between. A
    non-finite loss or gradient stops all updates on the device immediately (`nonfinite.py`), and the run at the next
    reading.

    Detectron2's hooks work: `before_train`, `before_step`, `after_backward` (if the hook has it; once per iteration,
    before the optimizer step, but not when a CUDA graph is replayed), `after_step`, `after_train`.

    Attributes:
        last_measured: the latest iteration that measured something (`store`); -1 before the first.
        finished: for a hook to set in `before_step`: the run ends before this iteration.
        wait: calls its argument, which fetches the next batch; to be replaced by something that a signal can interrupt.
        norm_statistics: batch norm's running statistics, each process's own outside of its context `averaged`.

    Args:
        model: the model to train, on its device and already wrapped for several processes.
        optimizer: updates the model's parameters; a hook sets its learning rate. Unless it is fused, each step waits
            for the device.
        batches: maps the first iteration to an endless iterable of batches from there on. A batch holds this process's
            images, as a list or as a tuple of tensors and lists.
        loss_fn: maps model and batch to a dict of losses (means over the batch; their sum is minimized) and a dict of
            extra metrics, all scalar tensors, with the same names each time.
        images_per_batch: batch size over all processes, for the throughput.
        seed: seed of the whole run.
        precision: "fp32", "bf16" for autocast, or "fp16" for autocast with dynamic loss scaling.
        log_period: iterations between metrics readings.
        accumulate: micro-batches per step, computed in sequence to save memory. The gradient is that of the whole
            batch, except that batch norm sees one micro-batch at a time.
        average: moving average of the weights, updated after each step.
        cuda_graph: capture the step as one CUDA graph. `batches` must then yield tuples of tensors of constant shapes,
            and `loss_fn` must not wait for the device.
        names: maps an iteration to the names of this process's images, for messages.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Callable[[int], Iterable[Any]],
        loss_fn: LossFunction,
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
        self.seed = seed
        self.log_period = log_period
        self.accumulate = accumulate
        self.average = average
        self.last_measured = -1
        self.finished = False
        self.wait: Callable[[Callable[[], Any]], Any] = lambda fetch: fetch()
        self._batches = batches
        self._loss_fn = loss_fn
        self._device = next(model.parameters()).device
        self._precision = precision
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self._guard = NonFiniteGuard(unwrap(model), gradients=precision != "fp16")
        self._diagnosis = Diagnosis(unwrap(model), replay=self._replay, names=names, rate_at=self._rate_at)
        self._metrics = MetricSums(self._device)
        self._throughput = Throughput(images_per_batch)
        self.norm_statistics = NormStatistics([unwrap(model)] + ([] if average is None else [average.model]))
        self._graph = GraphedStep(self._step) if cuda_graph else None
        self._iterator: Iterator[Any] | None = None
        self._batch: Any = None
        self._waited = 0.0  # seconds that this iteration waited for its batch

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run iterations `start_iter` up to but excluding `max_iter`, or until `finished`, with hooks around each.

        Afterwards `iter` is the number of iterations that are done. Like Detectron2's, but errors meant for the user
        leave no stack trace in the log.
        """
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                with explained_deaths():
                    self.before_train()
                    for self.iter in range(start_iter, max_iter):
                        self.before_step()
                        if self.finished:
                            break
                        self.run_step()
                        self.after_step()
                    else:
                        self.iter += 1  # tells hooks in after_train that training finished
            except (InputError, Interrupted):
                raise
            except Exception as error:
                if lost_another_process(error):  # which says why
                    logger.error("training stopped at iteration %d: the connection to another process broke", self.iter)
                elif os_error(error) is None:  # a disk's error needs no stack trace (`disk.write_errors`)
                    logger.exception("training stopped at iteration %d", self.iter)
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        super().before_train()
        self._guard.begin()
        self._iterator = iter(self._batches(self.start_iter))
        self._throughput.restart()

    def before_step(self) -> None:
        """Fetch the batch, then call the hooks: a wait that is left leaves nothing of the iteration behind."""
        start = time.perf_counter()
        self._batch = self.wait(lambda: next(self._iterator))
        self._waited = time.perf_counter() - start
        with self._outside_of_the_rate():
            super().before_step()

    def run_step(self) -> None:
        if not self.model.training:
            self.model.train()
        batch, self._batch = self._batch, None  # its memory is free once the step is done with it
        seed_iteration(self.seed, self.iter, comm.get_rank(), self._device)
        try:
            (self._step if self._graph is None else self._graph)(batch)
        except FloatingPointError as error:  # how Detectron2 rejects NaN boxes
            raise self._diagnosis.of_this_process(self.iter) from error
        self._metrics.count += 1
        self._throughput.count_iteration(self._waited)
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 == self.max_iter:
            self.read_metrics()

    def _step(self, batch: Any) -> None:
        """The part of an iteration that runs on the device; nothing here waits for it."""
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = split(batch, self.accumulate)
        metrics = []
        for number, micro_batch in enumerate(micro_batches, start=1):
            with reduce_gradients(self.model, now=number == len(micro_batches)):
                with self.autocast():
                    losses, others = self._loss_fn(self.model, micro_batch)
                    total = sum(losses.values())
                self._backward(total, total / len(micro_batches) if len(micro_batches) > 1 else total)
            metrics.append({**losses, **others, "total_loss": total})
        self._metrics.add(metrics)
        self._scaler.unscale_(self.optimizer)
        self.after_backward()
        self._guard.judge(sum(m["total_loss"].detach() for m in metrics))
        self._update()
        if self.average is not None:
            self.average.update()

    def _backward(self, total: torch.Tensor, share: torch.Tensor) -> None:
        """Accumulate the gradient of a micro-batch's share of the loss."""
        if self._scaler.is_enabled():
            # A non-finite gradient makes the scaler skip the step. Force one for a bad loss, which need not cause one
            # by itself, and for every step after it.
            bad = (self._guard.stopped > 0) | ~total.detach().isfinite()
            share = self._scaler.scale(share * torch.where(bad, math.nan, 1.0))
        share.backward()

    def after_backward(self) -> None:
        """Let hooks see the gradients; later Detectron2 versions have this hook, 0.6 does not."""
        for hook in self._hooks:
            if hasattr(hook, "after_backward"):
                hook.after_backward()

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
        """The autocast context for a forward pass."""
        # A graph must itself contain the conversion of the weights to lower precision.
        return autocast(self._precision, self._device, cache_enabled=self._graph is None)

    def read_metrics(self) -> None:
        """Average the metrics since the last reading over iterations and processes, and store them.

        The only place that waits for the device.

        Raises:
            NonFiniteLossError: since the last reading, a loss or gradient was infinite or NaN; with a loss scale, a
                gradient counts only if it is so at any scale.
        """
        if not self._metrics.count:
            return
        self._check_guard()
        scale = self._scaler.get_scale()
        if scale < LOWEST_LOSS_SCALE:
            raise self._diagnosis.of_all(self.iter)
        measured = {**self._metrics.read(), **self._throughput.read()}
        if self._scaler.is_enabled():
            measured["loss_scale"] = scale
        self.store(measured)

    def store(self, measured: dict[str, float]) -> None:
        """Store measurements, for the writers to write after this iteration."""
        self.storage.put_scalars(**measured, smoothing_hint=False)
        self.last_measured = self.iter

    def share_metrics(self) -> None:
        """Average the metrics over processes, so that the checkpoint, which one process writes, covers all of them."""
        self._metrics.share()

    @contextlib.contextmanager
    def _outside_of_the_rate(self) -> Iterator[None]:
        """Exclude evaluations and checkpoints from the training throughput."""
        start = time.perf_counter()
        yield
        self._throughput.leave_out(time.perf_counter() - start)

    def check_finite(self) -> None:
        """Check that the weights are worth keeping; called in all processes before they are saved or evaluated.

        Raises:
            NonFiniteLossError: a loss or gradient since the last reading, or a weight, is infinite or NaN.
        """
        self._check_guard()
        check_weights(unwrap(self.model), self.iter)

    def _check_guard(self) -> None:
        """Raise NonFiniteLossError in all processes if an iteration was bad."""
        first = int(self._guard.first_bad)
        if first >= 0:
            raise self._diagnosis.of_all(self.start_iter + first)

    def _replay(self, iteration: int) -> tuple[list[Any], Callable[[Any], Losses]]:
        """An iteration's micro-batches and a function from one to its losses, with the original random numbers."""
        batch = next(iter(self._batches(iteration)))
        seed_iteration(self.seed, iteration, comm.get_rank(), self._device)

        def losses_of(micro_batch: Any) -> Losses:
            with self.autocast():
                return self._loss_fn(unwrap(self.model), micro_batch)[0]

        return split(batch, self.accumulate), losses_of

    def _rate_at(self, iteration: int) -> float:
        history = self.storage.histories().get("lr")
        rates = {} if history is None else {stamp: value for value, stamp in history.values()}
        return rates.get(iteration, float(self.optimizer.param_groups[0]["lr"]))

    def after_step(self) -> None:
        with self._outside_of_the_rate():
            super().after_step()

    def after_train(self) -> None:
        super().after_train()
        self._iterator = None  # stops the loader's workers

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume, besides the model and the iteration."""
        state = {"optimizer": self.optimizer.state_dict(), "seed": self.seed}
        if self._scaler.is_enabled():
            state["scaler"] = self._scaler.state_dict()
        if self.average is not None:
            state["average"] = self.average.state_dict()
        for name, part in (("metrics", self._metrics), ("norm_statistics", self.norm_statistics)):
            if value := part.state_dict():
                state[name] = value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state, but keep this run's parameter group settings."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            # Drop all settings from the file: its initial_lr would override a changed SOLVER.BASE_LR.
            parameters = group["params"]
            group.clear()
            group.update(own, params=parameters)
        if "scaler" in state:
            self._scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"] if "average" in state else unwrap(self.model).state_dict())
        for name, part in (("metrics", self._metrics), ("norm_statistics", self.norm_statistics)):
            if name in state:
                part.load_state_dict(state[name])


def split(batch: Any, parts: int) -> list[Any]:
    """Split a batch (a list, or a tuple of tensors and lists) into equal micro-batches, in order."""
    if parts == 1:
        return [batch]
    if isinstance(batch, list):
        return [batch[i * len(batch) // parts : (i + 1) * len(batch) // parts] for i in range(parts)]
    columns = [entry.chunk(parts) if isinstance(entry, torch.Tensor) else split(entry, parts) for entry in batch]
    rows = zip(*columns, strict=True)
    return [type(batch)(*row) if hasattr(batch, "_fields") else tuple(row) for row in rows]


def seed_iteration(seed: int, iteration: int, rank: int, device: torch.device | str = "cpu") -> None:
    """Make every random number of this iteration, on the CPU and on `device`, a function of seed, iteration and rank.

    The numbers match `torch.manual_seed`, which we don't call: it seeds every device type that torch was built for,
    which takes longer than everything else the loop does in an iteration.
    """
    words = [int(word) for word in np.random.SeedSequence((seed, iteration, rank)).generate_state(2, np.uint64)]
    torch.default_generator.manual_seed(words[0])
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(words[0])
    random.seed(words[1])
    np.random.seed(words[1] % 2**32)
