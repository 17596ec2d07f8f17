"""Training loop hooks: learning rate, checkpoints, evaluation, metrics."""

import difflib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.common.param_scheduler import ParamScheduler

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.schedule import Plateau, WarmUpUntil, set_learning_rate

logger = logging.getLogger(__name__)


def check_metric(metric: str, results: Mapping[str, float]) -> None:
    """Raise ConfigError if an evaluation's results, by name, lack the metric that selects the best checkpoint."""
    if metric not in results:
        near = difflib.get_close_matches(metric, results, n=1, cutoff=0.0)[0]
        raise ConfigError(f"TEST.BEST_METRIC is {metric}, which the evaluation does not give; the nearest is {near}.")


class LearningRate(HookBase):
    """Set the learning rate before each iteration, from the iteration number and the metrics so far.

    Without `plateau` and `warm_up` the hook is stateless, so resuming needs no state and a changed schedule takes
    effect immediately.
    """

    def __init__(
        self, multiplier: ParamScheduler, *, plateau: Plateau | None = None, warm_up: WarmUpUntil | None = None
    ):
        self.multiplier = multiplier
        self.plateau = plateau
        self.warm_up = warm_up

    def before_step(self) -> None:
        factor = self.multiplier(self.trainer.iter / self.trainer.max_iter)
        if self.plateau is not None:
            factor *= self.plateau.factor
        if self.warm_up is not None:
            factor *= self.warm_up.factor
        rate = set_learning_rate(self.trainer.optimizer, factor)
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)

    def after_step(self) -> None:
        if self.warm_up is not None:
            value, iteration = self.trainer.storage.latest().get(self.warm_up.metric, (0.0, -1))
            if iteration == self.trainer.iter:
                self.warm_up.update(value)


class Checkpoints(HookBase):
    """Call `save(iteration)` every `period` iterations and after the last one, on the main process."""

    def __init__(self, save: Callable[[int], None], period: int):
        self._save = save
        self.period = period
        self._saved = -1

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period > 0 and done % self.period == 0):
            self.save(self.trainer.iter)

    def save(self, iteration: int, *, again: bool = False) -> None:
        """Save the state after `iteration`, unless already saved and not to be saved `again`.

        Call it in all processes.
        """
        if iteration == self._saved and not again:
            return
        self.trainer.check_finite()
        self.trainer.share_metrics()
        with self.trainer.norm_statistics.averaged():
            if comm.is_main_process():
                self._save(iteration)
        self._saved = iteration
        comm.synchronize()


class Evaluation(HookBase):
    """Evaluate every `period` iterations, except after the last: the end of the run evaluates what it saves.

    Evaluation happens at the start of the next iteration, that is, after the checkpoint. A run killed while evaluating
    evaluates again when resumed, and everything that depends on the result is as if it had never been killed.

    Args:
        evaluate: returns metrics for the log.
        metric: the metric (higher is better) that selects the best weights and detects a plateau.
        save_best: called on the main process with all metrics whenever `metric` reaches a new best.
        patience: the run is finished after so many evaluations in a row without a new best; 0: never.

    Attributes:
        best: the best `metric` so far; None before the first.
        waited: number of evaluations since then.
        evaluated: number of iterations that were done at the latest evaluation.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict],
        period: int,
        *,
        metric: str = "",
        save_best: Callable[[dict[str, float]], None] | None = None,
        plateau: Plateau | None = None,
        patience: int = 0,
    ):
        self._evaluate = evaluate
        self.period = period
        self.metric = metric
        self.best: float | None = None
        self.waited = 0
        self.evaluated = -1
        self._patience = patience
        self._save_best = save_best
        self._plateau = plateau

    def finishes_after(self, iterations: int) -> bool:
        """Return whether the run is finished with the evaluation after so many iterations; log why."""
        if not 0 < self._patience <= self.waited or iterations != self.evaluated:
            return False
        logger.info(
            "the run is finished after %d iterations: %s has not risen above %s in %d evaluations (TEST.PATIENCE %d)",
            iterations,
            self.metric,
            "nothing" if self.best is None else f"{self.best:.4g}",
            self.waited,
            self._patience,
        )
        return True

    def before_step(self) -> None:
        if self.period <= 0 or self.trainer.iter == 0 or self.trainer.iter % self.period:
            return
        if self.evaluated == self.trainer.iter:  # the run was finished here, and goes on with more patience
            return
        self.trainer.check_finite()  # else evaluators fail on NaN boxes with errors of their own
        with self.trainer.norm_statistics.averaged():
            self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        results = flatten_results_dict(self._evaluate())
        results = {name: float(value) for name, value in results.items()}
        self.trainer.store(results)
        if comm.is_main_process() and self.metric and results:
            check_metric(self.metric, results)
        # Detectron2's evaluators return results on the main process only.
        score = comm.all_gather(results.get(self.metric))[0]
        if score is None:
            return
        if self._plateau is not None:
            self._plateau.update(score)
        self.evaluated, self.waited = self.trainer.iter, self.waited + 1
        if score > (-math.inf if self.best is None else self.best):  # False for NaN
            self.best, self.waited = score, 0
            if self._save_best is not None and comm.is_main_process():
                self._save_best(results)
        self.trainer.finished = self.finishes_after(self.trainer.iter)
        comm.synchronize()

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best, "waited": self.waited, "evaluated": self.evaluated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        # A checkpoint written before these were kept has none of them.
        self.waited, self.evaluated = state.get("waited", 0), state.get("evaluated", -1)


class Writers(HookBase):
    """Call every writer after an iteration that measured something, on the main process.

    Values stored in every iteration (the learning rate, Detectron2's anchor and RoI counts) don't trigger a write,
    since each write also syncs a file.
    """

    def __init__(self, writers: list[EventWriter]):
        self.writers = writers
        self._last = -1

    def after_step(self) -> None:
        self._write()

    def after_train(self) -> None:
        self._write()  # an evaluation may be unwritten because the next iteration failed
        for writer in self.writers:
            writer.close()

    def _write(self) -> None:
        if self.trainer.last_measured > self._last:
            self._last = self.trainer.last_measured
            for writer in self.writers:
                writer.write()
