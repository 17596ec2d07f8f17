"""Train a model by the configuration: what pretraining and detection both call."""

import logging
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from torch import nn

from resnet_backbone.engine import hooks
from resnet_backbone.engine.config import ConfigError, set_key
from resnet_backbone.engine.launch import unwrap, wrap_for_processes
from resnet_backbone.engine.output import save_training_checkpoint
from resnet_backbone.engine.schedule import build_multiplier, describe_schedule
from resnet_backbone.engine.trainer import Losses, Trainer
from resnet_backbone.weights import Checkpoint, CheckpointError, Metadata, load_state

logger = logging.getLogger(__name__)


def train(
    cfg: CfgNode,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Any]],
    compute: Callable[[nn.Module, Any], tuple[Losses, Losses]],
    evaluate: Callable[[], dict[str, Any]],
    metadata: Callable[[int], Metadata],
    num_images: int,
    folder: Path,
    resume_from: Checkpoint | None,
) -> None:
    """Train `model` in place for SOLVER.MAX_ITER iterations, from `resume_from` on where it is given.

    Args:
        batches: given an iteration, the batches of this process from there on.
        compute: given model and batch, losses and further metrics.
        evaluate: called each TEST.EVAL_PERIOD iterations (not after the last one); returns metrics for the log.
        metadata: given the number of finished iterations, what a checkpoint says about itself.
        num_images: of the training set, to print the number of epochs.
        folder: for checkpoints, metrics.json and TensorBoard.
    """
    check_precision(cfg)
    logger.info("\n%s", describe_schedule(cfg, num_images, comm.get_world_size()))
    trainer = Trainer(
        model=wrap_for_processes(model),
        optimizer=optimizer,
        batches=batches,
        compute=compute,
        images_per_batch=cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "fp32",
        log_period=cfg.SOLVER.LOG_PERIOD,
    )
    start = 0 if resume_from is None else _resume(trainer, resume_from)
    if start >= cfg.SOLVER.MAX_ITER:
        logger.info("all %d iterations are done", cfg.SOLVER.MAX_ITER)
        return

    def save(iteration: int) -> None:
        checkpoint = Checkpoint(unwrap(trainer.model).state_dict(), metadata(iteration + 1), iteration, trainer.state_dict())
        save_training_checkpoint(folder, checkpoint)

    progress = hooks.Progress(cfg.SOLVER.MAX_ITER, start)
    trainer.register_hooks(
        [
            hooks.LearningRate(build_multiplier(cfg)),
            hooks.Evaluation(evaluate, cfg.TEST.EVAL_PERIOD),
            hooks.Checkpoints(save, cfg.SOLVER.CHECKPOINT_PERIOD),
        ]
    )
    if comm.is_main_process():
        writers = [progress, JSONWriter(str(folder / "metrics.json")), TensorboardXWriter(str(folder))]
        trainer.register_hooks([hooks.Writers(writers, cfg.SOLVER.LOG_PERIOD)])
    trainer.train(start, cfg.SOLVER.MAX_ITER)


def choose_seed(cfg: CfgNode, resume_from: Checkpoint | None) -> None:
    """Settle cfg.SEED: the resumed run's, the user's, or (below 0) a new one that all processes share."""
    if resume_from is not None and resume_from.trainer is not None:
        set_key(cfg, "SEED", resume_from.trainer["seed"], "resumed run")
    elif cfg.SEED < 0:
        set_key(cfg, "SEED", comm.all_gather(secrets.randbelow(2**31))[0], "drawn")


def check_precision(cfg: CfgNode) -> None:
    """Refuse a SOLVER.AMP.PRECISION that the loop does not have."""
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION not in ("fp32", "bf16"):
        raise ConfigError(f"SOLVER.AMP.PRECISION is {cfg.SOLVER.AMP.PRECISION!r}, expected fp32 or bf16.")


def check_batch(cfg: CfgNode) -> None:
    """Refuse a batch that does not divide by the number of processes."""
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which does not divide by {processes} processes."
        )


def _resume(trainer: Trainer, checkpoint: Checkpoint) -> int:
    if checkpoint.iteration is None or checkpoint.trainer is None:
        raise CheckpointError("cannot resume: the checkpoint holds weights only, no optimizer state.")
    load_state(unwrap(trainer.model), checkpoint.model, part="model", source="the last checkpoint")
    trainer.load_state_dict(checkpoint.trainer)
    logger.info("resumed: the next iteration is %d", checkpoint.iteration + 1)
    return checkpoint.iteration + 1
