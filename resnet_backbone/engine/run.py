"""A run from configuration to final checkpoint: what pretraining and detection have in common."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from resnet_backbone.data.workers import explained_deaths
from resnet_backbone.engine.allocator import keep_freed_memory
from resnet_backbone.engine.config import ConfigError, origin, set_key
from resnet_backbone.engine.lock import check_still_there
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.output import FINAL, LAST, open_output, read_last_checkpoint, write_config
from resnet_backbone.engine.schedule import check_schedule, rescale_for_batch
from resnet_backbone.engine.train import TrainingTask, check_batch, check_solver, choose_seed, train
from resnet_backbone.weights import Checkpoint, Metadata, write_checkpoint, write_json

logger = logging.getLogger(__name__)


class Task(TrainingTask, Protocol):
    """What pretraining and detection do differently, on top of what the loop needs."""

    def check(self, *, eval_only: bool) -> None:
        """Reject invalid configurations; a cheap call, before anything is read or written."""

    def build(self, last: Checkpoint | None, *, eval_only: bool) -> nn.Module:
        """Open the data and build the model on its device, with the weights that the run starts from.

        Preprocessing that a checkpoint cannot record is rejected now, not at the first checkpoint.

        Args:
            last: the checkpoint to resume from; None for a new run, which starts from MODEL.WEIGHTS.
        """

    def try_evaluation(self, model: nn.Module) -> None:
        """Dry run: evaluate on two images, so that a broken evaluation fails now and not after hours.

        Like `evaluate`, it does nothing if DATASETS.TEST is empty.
        """

    def finish(self, model: nn.Module) -> None:
        """Finalize the trained model once, after the last iteration."""

    def headline(self, results: dict[str, Any]) -> dict[str, float]:
        """The evaluation results to store in the final checkpoint."""


def run(cfg: CfgNode, task: Task, *, resume: bool = False, eval_only: bool = False) -> dict[str, Any]:
    """Train, evaluate, write `model_final.pth`; return the metrics, on the main process.

    With an empty DATASETS.TEST nothing is evaluated, and there are no metrics.

    Args:
        cfg: loaded by `engine.config.load_config`; the same object that the task holds.
        resume: continue from the last checkpoint in OUTPUT_DIR, or start from MODEL.WEIGHTS if there is none.
        eval_only: evaluate the starting weights on DATASETS.TEST and write no checkpoint.

    Raises:
        InputError: the configuration has an unusable value; raised before the first iteration.
        NonFiniteLossError: training diverged.
        Interrupted: a signal asked to stop; everything is saved.
    """
    check_solver(cfg)
    check_batch(cfg)
    if not eval_only:
        check_schedule(cfg)
    if eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty, so --eval-only has nothing to evaluate. Name a data set.")
    task.check(eval_only=eval_only)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    elif cfg.MODEL.DEVICE != "cuda":
        torch.cuda.set_device(cfg.MODEL.DEVICE)
    with open_output(cfg, resume=resume, eval_only=eval_only) as folder, explained_deaths():
        return _run(cfg, task, folder, resume=resume, eval_only=eval_only)


def _run(cfg: CfgNode, task: Task, folder: Path, *, resume: bool, eval_only: bool) -> dict[str, Any]:
    rescale_for_batch(cfg)
    if not cfg.DATASETS.TEST:
        logger.info("DATASETS.TEST is empty: no evaluation, and so no best checkpoint")
        set_key(cfg, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST is empty")
    last = read_last_checkpoint(folder) if resume else None
    if last is not None and not eval_only:
        _check_length(cfg, last)
    choose_seed(cfg, last)
    torch.manual_seed(cfg.SEED)
    if eval_only and last is not None and last.trainer and cfg.SOLVER.EMA_DECAY > 0:
        last = replace(last, model=last.trainer.get("average", last.model))  # which a run evaluates
    model = task.build(last, eval_only=eval_only)
    if last is not None and not eval_only:
        _check_classes(last.metadata.class_names, task.metadata(0).class_names)
    task.try_evaluation(model)
    if eval_only:
        return task.evaluate(model)
    write_config(cfg, folder)
    trained, iterations = train(cfg, task, model, build_optimizer(cfg, model), folder=folder, resume_from=last)
    task.finish(trained)
    results = task.evaluate(trained)
    if comm.is_main_process():
        _write_final(folder, trained, task.metadata(iterations, **task.headline(results)), results)
    comm.synchronize()
    return results


def _check_length(cfg: CfgNode, last: Checkpoint) -> None:
    """Reject a resumed run that would end before it begins, and describe the longer one's weights as its own."""
    done = 0 if last.iteration is None else last.iteration + 1
    if done > cfg.SOLVER.MAX_ITER:
        raise ConfigError(
            f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER} ({origin(cfg, 'SOLVER.MAX_ITER') or 'default'}), but the run to "
            f"resume has done {done} iterations. Set it to {done} or more, or write an earlier checkpoint's name into "
            f"{LAST}, or choose another OUTPUT_DIR."
        )


def _check_classes(before: Sequence[str], now: Sequence[str]) -> None:
    """Reject a resumed run whose labels would mean other classes."""
    if before and list(before) != list(now):
        changed = next(((a, b) for a, b in zip(before, now) if a != b), None)
        words = f"the first that differs was {changed[0]} and is {changed[1]}" if changed else "the first are the same"
        raise ConfigError(
            f"the run to resume was started with {len(before)} classes, and the data have {len(now)}: {words}. Resume "
            "on the same data, or start a new run in another OUTPUT_DIR."
        )


def _write_final(folder: Path, model: nn.Module, metadata: Metadata, results: dict[str, Any]) -> None:
    check_still_there(folder)
    write_checkpoint(folder / FINAL, Checkpoint(model.state_dict(), metadata))
    write_json(folder / "results.json", results)
    logger.info("wrote %s: %s", folder / FINAL, metadata.describe())
