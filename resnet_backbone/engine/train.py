"""Train a model from a configuration; called by both pretraining and detection."""

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter
from torch import nn

from resnet_backbone.engine import hooks
from resnet_backbone.engine.config import COMMAND_LINE, ConfigError, as_config_error, flatten, origin, said, set_key
from resnet_backbone.engine.describe import config_hash, differences, flat_config
from resnet_backbone.engine.distributed import unwrap, wrap_for_processes
from resnet_backbone.engine.ema import MovingAverage
from resnet_backbone.engine.nonfinite import Losses
from resnet_backbone.engine.output import keep_metrics_before, save_best_checkpoint, save_training_checkpoint
from resnet_backbone.engine.precision import precision_of
from resnet_backbone.engine.preemption import Preemption
from resnet_backbone.engine.ranges import RANGES, check_ranges
from resnet_backbone.engine.schedule import build_multiplier, build_plateau, build_warm_up, describe_schedule
from resnet_backbone.engine.trainer import Trainer
from resnet_backbone.engine.writers import MetricsFile, Progress, WeightsAndBiases
from resnet_backbone.networks.catalogue import find_row
from resnet_backbone.weights import Checkpoint, CheckpointError, Metadata, load_state

logger = logging.getLogger(__name__)


class TrainingTask(Protocol):
    """What the loop needs from a task.

    Attributes:
        num_images: size of the training set.
        best_metric: the evaluation metric (higher is better) that selects `model_best.pth` and drives WarmupPlateauLR.
            Empty if there is none.
    """

    num_images: int
    best_metric: str

    def batches(self, start_iteration: int) -> Iterable[Any]:
        """This process's endless batches, from `start_iteration` on."""

    def losses(self, model: nn.Module, batch: Any) -> tuple[Losses, Losses]:
        """A batch's losses, whose sum is minimized, and extra metrics for the log."""

    def compile(self, model: nn.Module) -> None:
        """Compile in place the parts that SOLVER.COMPILE covers."""

    def image_names(self, iteration: int) -> Sequence[str]:
        """The names of this process's images in an iteration; empty if they have none."""

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Metrics on DATASETS.TEST; empty if that is."""

    def metadata(self, iterations: int, **results: float) -> Metadata:
        """The metadata of a checkpoint after `iterations` iterations, with results by name."""


class Trained(NamedTuple):
    """What training gives.

    Attributes:
        model: the network to evaluate and save: the model, or with SOLVER.EMA_DECAY the moving average of its weights.
        iterations: number of iterations that are done: SOLVER.MAX_ITER, or fewer because of TEST.PATIENCE.
    """

    model: nn.Module
    iterations: int


def train(
    cfg: CfgNode,
    task: TrainingTask,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    folder: Path,
    resume_from: Checkpoint | None,
) -> Trained:
    """Train `model` in place for SOLVER.MAX_ITER iterations, continuing from `resume_from` if given.

    The task evaluates the model every TEST.EVAL_PERIOD iterations, except after the last one. With TEST.PATIENCE, the
    run ends early when that many evaluations in a row give no new best. Checkpoints, metrics.json and TensorBoard files
    go to `folder`.

    Raises:
        ConfigError: a SOLVER key has an unusable value; raised before the first iteration.
        CheckpointError: `resume_from` belongs to another model.
        InputError: the metadata has an invalid entry.
        NonFiniteLossError: training diverged.
        Interrupted: a signal asked to stop; everything is saved.
    """
    check_solver(cfg)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    logger.info("\n%s", describe_schedule(cfg, task.num_images, comm.get_world_size()))
    average = MovingAverage(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY > 0 else None
    if cfg.SOLVER.COMPILE:
        _compile(cfg, task, model)
    if cfg.SOLVER.CUDA_GRAPH:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=cfg.MODEL.DEVICE)
    trainer = Trainer(
        model=wrap_for_processes(model),
        optimizer=optimizer,
        batches=task.batches,
        loss_fn=task.losses,
        images_per_batch=cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        precision=precision_of(cfg),
        log_period=cfg.SOLVER.LOG_PERIOD,
        accumulate=cfg.SOLVER.ACCUMULATE,
        average=average,
        cuda_graph=cfg.SOLVER.CUDA_GRAPH,
        names=task.image_names,
    )

    def result() -> nn.Module:
        return model if average is None else average.model

    def save(iteration: int) -> None:
        config = flat_config(cfg)
        state = {**trainer.state_dict(), "config": config, "config_sha256": config_hash(config)}
        state |= {"num_images": task.num_images, **{name: part.state_dict() for name, part in stateful.items()}}
        checkpoint = Checkpoint(model.state_dict(), task.metadata(iteration + 1), iteration, state)
        save_training_checkpoint(folder, checkpoint, keep=cfg.SOLVER.CHECKPOINT_KEEP)

    def save_best(results: dict[str, float]) -> None:
        save_best_checkpoint(folder, Checkpoint(result().state_dict(), task.metadata(trainer.iter, **results)))

    plateau, warm_up = build_plateau(cfg), build_warm_up(cfg)
    checkpoints = hooks.Checkpoints(save, cfg.SOLVER.CHECKPOINT_PERIOD)
    preemption = Preemption(checkpoints)
    evaluation = hooks.Evaluation(
        lambda: preemption.interruptible(lambda: task.evaluate(result())),
        cfg.TEST.EVAL_PERIOD,
        metric=task.best_metric,
        save_best=save_best,
        plateau=plateau,
        patience=cfg.TEST.PATIENCE,
    )
    stateful = {"plateau": plateau, "warm_up": warm_up, "evaluation": evaluation}
    stateful = {name: part for name, part in stateful.items() if part is not None}

    start = 0
    if resume_from is not None:
        start = _resume(cfg, trainer, resume_from)
        _restore(stateful, resume_from.trainer, task)
        # What is needed is in the model and the optimizer, and the caller holds the checkpoint to the end.
        resume_from.model.clear()
        resume_from.trainer.clear()
    if start >= cfg.SOLVER.MAX_ITER:
        logger.info("all %d iterations are done", cfg.SOLVER.MAX_ITER)
    if start >= cfg.SOLVER.MAX_ITER or evaluation.finishes_after(start):
        trainer.norm_statistics.average()
        return Trained(result(), start)

    task.metadata(start)  # catch an invalid entry now, not at the first checkpoint
    # Hook order matters. Measurements after an iteration set the next one's learning rate. They are written before the
    # checkpoint, since a run resumed there does not repeat them. The checkpoint includes the state of the hooks before
    # it. Preemption comes last.
    trainer.register_hooks([evaluation, hooks.LearningRate(build_multiplier(cfg), plateau=plateau, warm_up=warm_up)])
    if comm.is_main_process():
        keep_metrics_before(folder, max(start, evaluation.evaluated + 1))
        trainer.register_hooks([hooks.Writers(_writers(cfg, folder, start))])
    trainer.register_hooks([checkpoints, preemption])
    trainer.wait = preemption.wait
    trainer.train(start, cfg.SOLVER.MAX_ITER)
    if trainer.finished:
        checkpoints.save(trainer.iter - 1, again=True)  # with the evaluation that has finished the run
    preemption.leave_if_asked()  # before an evaluation that may outlast the grace period
    trainer.norm_statistics.average()
    return Trained(result(), trainer.iter)


def _restore(parts: Mapping[str, Any], state: Mapping[str, Any], task: TrainingTask) -> None:
    """Restore the hooks' state, except for what depends on a metric that has changed since."""
    metric = state.get("evaluation", {}).get("metric", task.best_metric)
    if metric != task.best_metric:
        logger.warning(
            "TEST.BEST_METRIC was %s and is now %s: the best result, patience and plateau begin anew",
            metric,
            task.best_metric,
        )
    if state.get("num_images", task.num_images) != task.num_images:
        logger.warning(
            "the training set had %d images and has %d now, so their order is another",
            state["num_images"],
            task.num_images,
        )
    for name, part in parts.items():
        if name in state and (metric == task.best_metric or name == "warm_up"):
            part.load_state_dict(state[name])


def _compile(cfg: CfgNode, task: TrainingTask, model: nn.Module) -> None:
    """Have the task compile the model in place, at its first call; on a CPU, only if set on the command line.

    The recipes turn compilation on because they target GPUs. A CPU gains little and may have no compiler.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") or origin(cfg, "SOLVER.COMPILE") == COMMAND_LINE:
        logger.info("the first iterations compile the network, which takes a minute or more")
        task.compile(model)
    else:
        logger.info("SOLVER.COMPILE is ignored on a CPU unless it is set on the command line")


def _writers(cfg: CfgNode, folder: Path, start: int) -> list[EventWriter]:
    # No smoothing over past iterations, which a resumed run does not have.
    writers = [
        Progress(cfg.SOLVER.MAX_ITER, start),
        MetricsFile(folder / "metrics.json"),
        TensorboardXWriter(str(folder), window_size=1),
    ]
    if cfg.WANDB_PROJECT:
        writers.append(WeightsAndBiases(cfg.WANDB_PROJECT, folder, flat_config(cfg)))
    return writers


def choose_seed(cfg: CfgNode, resume_from: Checkpoint | None) -> None:
    """Set cfg.SEED to the resumed run's seed, the user's, or (if below 0) a new one that all processes share.

    Raises:
        ConfigError: the user's seed differs from the resumed run's.
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
    """Reject keys of both tools that are out of range, and what their device cannot do."""
    check_ranges(cfg, RANGES)
    if cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise ConfigError(f"{said(cfg, 'SOLVER.NESTEROV')}, but {said(cfg, 'SOLVER.MOMENTUM')}. Set it above 0.")
    if cfg.MODEL.NETWORK.NAME:
        with as_config_error("MODEL.NETWORK.NAME"):
            find_row(cfg.MODEL.NETWORK.NAME)
    _check_synchronized(cfg)
    if cfg.SOLVER.CUDA_GRAPH:
        _check_graph(cfg)


def _check_synchronized(cfg: CfgNode) -> None:
    """Reject synchronized batch norm over processes on CPUs, for which torch has none."""
    if not cfg.MODEL.DEVICE.startswith("cuda") and comm.get_world_size() > 1:
        for key, value in flatten(cfg):
            if key.endswith(".NORM") and value in ("SyncBN", "nnSyncBN"):
                raise ConfigError(
                    f"{said(cfg, key)}, which works on GPUs alone, but {said(cfg, 'MODEL.DEVICE')} with "
                    f"{comm.get_world_size()} processes. Set it to BN."
                )


def _check_graph(cfg: CfgNode) -> None:
    found = None
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        found = f"MODEL.DEVICE is {cfg.MODEL.DEVICE}"
    elif comm.get_world_size() > 1:
        found = f"there are {comm.get_world_size()} processes"
    elif precision_of(cfg) == "fp16":
        found = "SOLVER.AMP.PRECISION is fp16, whose loss scale is decided by the host"
    if found:
        raise ConfigError(f"SOLVER.CUDA_GRAPH records the step of one GPU, but {found}. Set it to False.")


def check_batch(cfg: CfgNode) -> None:
    """Reject a batch size that is not divisible by the number of processes and micro-batches."""
    images, processes, parts = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size(), cfg.SOLVER.ACCUMULATE
    if images % processes:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH is {images}, which is not divisible by {processes} processes.")
    if images // processes % parts:
        raise ConfigError(
            f"SOLVER.ACCUMULATE is {parts}, which does not divide the {images // processes} images of a process."
        )


def _resume(cfg: CfgNode, trainer: Trainer, checkpoint: Checkpoint) -> int:
    """Restore model and optimizer; return the next iteration."""
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
    for line in differences(checkpoint.trainer.get("config", {}), cfg):
        logger.warning("resumed with another configuration: %s", line)
    logger.info("resumed: the next iteration is %d", checkpoint.iteration + 1)
    return checkpoint.iteration + 1
