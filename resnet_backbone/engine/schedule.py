"""Learning rate over iterations, linear rescaling for another batch size, and the table of what was resolved."""

import itertools

import torch
from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler, ParamScheduler
from tabulate import tabulate

from resnet_backbone.engine.config import COMMAND_LINE, ConfigError, get_key, origin, set_key

SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")
WARMUP_METHODS = ("linear", "constant")


def rescale_for_batch(cfg: CfgNode) -> None:
    """Adapt the schedule to IMS_PER_BATCH by the linear rule (Goyal et al., arXiv 1706.02677, section 2.1).

    With a batch k times SOLVER.REFERENCE_IMS_PER_BATCH, the learning rate is multiplied by k, and iterations, steps,
    warm-up and periods are divided by k (not below 1), so that the number of epochs stays. Keys set on the command line
    are the user's last word and stay as they are. REFERENCE_IMS_PER_BATCH 0 changes nothing.
    """
    reference, batch = cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if reference <= 0 or reference == batch:
        return

    def rescaled(count: int) -> int:
        return max(1, round(count * reference / batch)) if count > 0 else count

    new = {
        "SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * batch / reference,
        "SOLVER.MAX_ITER": rescaled(cfg.SOLVER.MAX_ITER),
        "SOLVER.STEPS": tuple(rescaled(step) for step in cfg.SOLVER.STEPS),
        "SOLVER.WARMUP_ITERS": rescaled(cfg.SOLVER.WARMUP_ITERS),
        "SOLVER.CHECKPOINT_PERIOD": rescaled(cfg.SOLVER.CHECKPOINT_PERIOD),
        "TEST.EVAL_PERIOD": rescaled(cfg.TEST.EVAL_PERIOD),
    }
    for key, value in new.items():
        if origin(cfg, key) != COMMAND_LINE and get_key(cfg, key) != value:
            set_key(cfg, key, value, f"rescaled from a batch of {reference} to {batch}")
    # The rescaled configuration is written down; reading it back must not rescale it again.
    set_key(cfg, "SOLVER.REFERENCE_IMS_PER_BATCH", batch, f"rescaled from a batch of {reference} to {batch}")


def build_multiplier(cfg: CfgNode) -> ParamScheduler:
    """What the base learning rate is multiplied by, as a function of the finished share of training (0…1).

    The same functions that Detectron2's `build_lr_scheduler` makes: warm-up ends at what the schedule has there.

    Raises:
        ConfigError: an unknown name of the schedule or the warm-up, steps that are not increasing, or a cosine that the
            warm-up leaves no iteration.
    """
    total = max(cfg.SOLVER.MAX_ITER, 1)
    if cfg.SOLVER.WARMUP_METHOD not in WARMUP_METHODS:
        raise ConfigError(
            f"SOLVER.WARMUP_METHOD is {cfg.SOLVER.WARMUP_METHOD!r}, expected one of {', '.join(WARMUP_METHODS)}."
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [step for step in cfg.SOLVER.STEPS if step < total]
        if any(second <= first for first, second in itertools.pairwise([0, *steps])):
            raise ConfigError(f"SOLVER.STEPS is {cfg.SOLVER.STEPS}, expected increasing iterations above 0.")
        multiplier = MultiStepParamScheduler(
            values=[cfg.SOLVER.GAMMA**k for k in range(len(steps) + 1)], milestones=steps, num_updates=total
        )
    elif cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        if total <= cfg.SOLVER.WARMUP_ITERS:
            raise ConfigError(
                f"SOLVER.WARMUP_ITERS is {cfg.SOLVER.WARMUP_ITERS} of SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER}: the "
                "learning rate would stay near 0. Set SOLVER.WARMUP_ITERS lower."
            )
        multiplier = CosineParamScheduler(1.0, 0.0)
    else:
        raise ConfigError(
            f"SOLVER.LR_SCHEDULER_NAME is {cfg.SOLVER.LR_SCHEDULER_NAME!r}, expected one of {', '.join(SCHEDULES)}."
        )
    if cfg.SOLVER.WARMUP_ITERS <= 0:
        return multiplier
    return WarmupParamScheduler(
        multiplier, cfg.SOLVER.WARMUP_FACTOR, min(cfg.SOLVER.WARMUP_ITERS / total, 1.0), cfg.SOLVER.WARMUP_METHOD
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: ParamScheduler, share: float) -> None:
    """Give every parameter group its base rate times the multiplier at `share` (0…1) of the training."""
    factor = multiplier(share)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def describe_schedule(cfg: CfgNode, images: int, world_size: int) -> str:
    """A table of the resolved schedule: each value with where it came from.

    Args:
        images: number of training images, for the number of epochs.
        world_size: number of processes that share a batch.
    """
    keys = [
        "SOLVER.IMS_PER_BATCH",
        "SOLVER.BASE_LR",
        "SOLVER.MAX_ITER",
        "SOLVER.LR_SCHEDULER_NAME",
        "SOLVER.STEPS",
        "SOLVER.GAMMA",
        "SOLVER.WARMUP_ITERS",
        "SOLVER.MOMENTUM",
        "SOLVER.WEIGHT_DECAY",
        "SOLVER.CHECKPOINT_PERIOD",
        "TEST.EVAL_PERIOD",
    ]
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        keys = [key for key in keys if key not in ("SOLVER.STEPS", "SOLVER.GAMMA")]
    rows = [(key, get_key(cfg, key), origin(cfg, key) or "default") for key in keys]
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images
    rows.append(("epochs", f"{epochs:.2f}", f"{images:,} training images"))
    processes = f"{world_size} process" + ("es" if world_size > 1 else "")
    rows.append(("images a process", cfg.SOLVER.IMS_PER_BATCH // world_size, processes))
    return tabulate(rows, headers=("schedule", "value", "from"), disable_numparse=True)
