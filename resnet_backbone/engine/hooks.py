"""Hooks of the training loop: learning rate, checkpoints, progress."""

import datetime
import logging
import time
from collections.abc import Callable

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from fvcore.common.param_scheduler import ParamScheduler

from resnet_backbone.engine.schedule import set_learning_rate

logger = logging.getLogger(__name__)


class LearningRate(HookBase):
    """Set the learning rate before each iteration, as a function of the iteration alone.

    Nothing is accumulated, so a resumed run needs no scheduler state, and a changed schedule takes effect at once.
    """

    def __init__(self, multiplier: ParamScheduler):
        self.multiplier = multiplier

    def before_step(self) -> None:
        set_learning_rate(self.trainer.optimizer, self.multiplier, self.trainer.iter / self.trainer.max_iter)
        self.trainer.storage.put_scalar("lr", self.trainer.optimizer.param_groups[0]["lr"], smoothing_hint=False)


class Checkpoints(HookBase):
    """Call `save(iteration)` every `period` iterations and after the last one, on the main process."""

    def __init__(self, save: Callable[[int], None], period: int):
        self.save = save
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period > 0 and done % self.period == 0):
            self.trainer.check_finite()
            if comm.is_main_process():
                self.save(self.trainer.iter)
            comm.synchronize()


class Evaluation(HookBase):
    """Evaluate every `period` iterations, but not after the last: the run's end evaluates what it saves."""

    def __init__(self, evaluate: Callable[[], dict], period: int):
        self.evaluate = evaluate
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self.trainer.check_finite()  # evaluators fail in their own words on boxes that are not numbers
            results = flatten_results_dict(self.evaluate())
            self.trainer.storage.put_scalars(**{k: float(v) for k, v in results.items()}, smoothing_hint=False)
            comm.synchronize()


class Writers(HookBase):
    """Let every writer write the metrics each `period` iterations and at the end, on the main process."""

    def __init__(self, writers: list[EventWriter], period: int):
        self.writers = writers
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            for writer in self.writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self.writers:
            writer.write()  # what was stored since, where training stopped early
            writer.close()


class Progress(EventWriter):
    """One line of progress: time left, losses, images per second, the share of time spent waiting for data.

    Written once for each reading of the metrics. The time left counts evaluations and checkpoints in.
    """

    def __init__(self, max_iter: int, start_iter: int):
        self.max_iter = max_iter
        self._start_iter = start_iter
        self._start_time = time.perf_counter()
        self._last = start_iter

    def write(self) -> None:
        stored = get_event_storage().latest()
        done = stored["images_per_second"][1] + 1 if "images_per_second" in stored else self._last
        if done == self._last:
            return
        self._last = done
        seconds = (time.perf_counter() - self._start_time) / (done - self._start_iter)
        latest = {name: value for name, (value, _) in stored.items()}
        losses = [f"{name} {value:.3f}" for name, value in latest.items() if "loss" in name]
        others = [f"{name} {latest[name]:.3g}" for name in ("top1_error", "lr") if name in latest]
        rate = f"{latest['images_per_second']:.4g} images/s, waiting for data {latest['data_share']:.0%}"
        left = datetime.timedelta(seconds=round(seconds * (self.max_iter - done)))
        logger.info("  ".join([f"{done}/{self.max_iter}", f"left {left}", *losses, *others, rate]))
