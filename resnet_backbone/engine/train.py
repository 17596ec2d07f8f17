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
from resnet_backbone.engine.config import ConfigError, origin, set_key
from resnet_backbone.engine.launch import unwrap, wrap_for_processes
from resnet_backbone.engine.output import keep_metrics_before, save_training_checkpoint
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

    Raises:
        ConfigError: a SOLVER key has a value that the loop cannot use; before the first iteration.
        CheckpointError: `resume_from` is of another model.
        InputError: the metadata has an impossible entry.
        NonFiniteLossError: training diverged.
    """
    check_solver(cfg)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
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

    metadata(start)  # an impossible entry is found now, not at the first checkpoint

    def save(iteration: int) -> None:
        checkpoint = Checkpoint(
            unwrap(trainer.model).state_dict(), metadata(iteration + 1), iteration, trainer.state_dict()
        )
        save_training_checkpoint(folder, checkpoint)

    progress = hooks.Progress(cfg.SOLVER.MAX_ITER, start)
    trainer.register_hooks(
        [
            hooks.LearningRate(build_multiplier(cfg)),
            hooks.Checkpoints(save, cfg.SOLVER.CHECKPOINT_PERIOD),
            hooks.Evaluation(evaluate, cfg.TEST.EVAL_PERIOD),
        ]
    )
    if comm.is_main_process():
        keep_metrics_before(folder, start)
        writers = [progress, JSONWriter(str(folder / "metrics.json")), TensorboardXWriter(str(folder))]
        trainer.register_hooks([hooks.Writers(writers, cfg.SOLVER.LOG_PERIOD)])
    trainer.train(start, cfg.SOLVER.MAX_ITER)


def choose_seed(cfg: CfgNode, resume_from: Checkpoint | None) -> None:
    """Settle cfg.SEED: the resumed run's, the user's, or (below 0) a new one that all processes share.

    Raises:
        ConfigError: the user's seed is not the resumed run's.
    """
    if resume_from is not None and resume_from.trainer is not None:
        seed = resume_from.trainer["seed"]
        if cfg.SEED not in (seed, -1):
            raise ConfigError(
                f"SEED is {cfg.SEED} ({origin(cfg, 'SEED')}), but the run to resume was started with {seed}. Set SEED "
                f"to {seed} or -1, or start a new run in another OUTPUT_DIR."
            )
        set_key(cfg, "SEED", seed, "resumed run")
    elif cfg.SEED < 0:
        set_key(cfg, "SEED", comm.all_gather(secrets.randbelow(2**31))[0], "drawn")


def check_solver(cfg: CfgNode) -> None:
    """Refuse a precision that the loop does not have and numbers of iterations that it cannot count."""
    for key, lowest in (("MAX_ITER", 0), ("LOG_PERIOD", 1)):
        if cfg.SOLVER[key] < lowest:
            raise ConfigError(f"SOLVER.{key} is {cfg.SOLVER[key]}, expected at least {lowest}.")
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION not in ("fp32", "bf16"):
        raise ConfigError(f"SOLVER.AMP.PRECISION is {cfg.SOLVER.AMP.PRECISION!r}, expected fp32 or bf16.")


def check_batch(cfg: CfgNode) -> None:
    """Refuse a batch that is empty or does not divide by the number of processes."""
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, expected at least 1.")
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which does not divide by {processes} processes."
        )


def _resume(trainer: Trainer, checkpoint: Checkpoint) -> int:
    """Load model and optimizer; return the next iteration."""
    if checkpoint.iteration is None or checkpoint.trainer is None:
        raise CheckpointError("cannot resume: the checkpoint holds weights only, no optimizer state.")
    model = unwrap(trainer.model)
    if unknown := sorted(set(checkpoint.model) - set(model.state_dict())):
        raise CheckpointError(
            f"cannot resume: the last checkpoint has {len(unknown)} tensors that the model does not have ({unknown[0]} "
            "…). Set the network that the run was started with, or start a new run in another OUTPUT_DIR."
        )
    load_state(model, checkpoint.model, part="model", source="the last checkpoint")
    try:
        trainer.load_state_dict(checkpoint.trainer)
    except ValueError as error:
        raise CheckpointError(
            f"cannot resume: the optimizer's state does not fit ({error}). Freeze what was frozen when the run was "
            "started, or start a new run in another OUTPUT_DIR with MODEL.WEIGHTS."
        ) from error
    logger.info("resumed: the next iteration is %d", checkpoint.iteration + 1)
    return checkpoint.iteration + 1
