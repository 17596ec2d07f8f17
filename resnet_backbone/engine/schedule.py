"""Learning rate over iterations, linear rescaling for another batch size, and the table of what was resolved."""

import torch
from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler, ParamScheduler
from tabulate import tabulate

from resnet_backbone.engine.config import ConfigError, get_key, origin, set_key

SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")


def rescale_for_batch(cfg: CfgNode) -> None:
    """Adapt the schedule to IMS_PER_BATCH by the linear rule (Goyal et al., arXiv 1706.02677, section 2.1).

    With a batch k times SOLVER.REFERENCE_IMS_PER_BATCH, the learning rate is multiplied by k, and iterations, steps,
    warm-up and periods are divided by k, so that the number of epochs stays. Keys set on the command line are the user's
    last word and stay as they are. REFERENCE_IMS_PER_BATCH 0 changes nothing.
    """
    reference, batch = cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if reference <= 0 or reference == batch:
        return
    factor = batch / reference
    new = {
        "SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * factor,
        "SOLVER.MAX_ITER": max(1, round(cfg.SOLVER.MAX_ITER / factor)),
        "SOLVER.STEPS": tuple(round(step / factor) for step in cfg.SOLVER.STEPS),
        "SOLVER.WARMUP_ITERS": round(cfg.SOLVER.WARMUP_ITERS / factor),
        "SOLVER.CHECKPOINT_PERIOD": max(1, round(cfg.SOLVER.CHECKPOINT_PERIOD / factor)),
        "TEST.EVAL_PERIOD": round(cfg.TEST.EVAL_PERIOD / factor),
    }
    for key, value in new.items():
        if origin(cfg, key) != "command line":
            set_key(cfg, key, value, f"rescaled from a batch of {reference} to {batch}")
    # The rescaled configuration is written down; reading it back must not rescale it again.
    set_key(cfg, "SOLVER.REFERENCE_IMS_PER_BATCH", batch, f"rescaled from a batch of {reference} to {batch}")


def build_multiplier(cfg: CfgNode) -> ParamScheduler:
    """What the base learning rate is multiplied by, as a function of the finished share of training (0…1).

    Raises:
        ConfigError: an unknown SOLVER.LR_SCHEDULER_NAME, or steps that are not increasing.
    """
    total = max(cfg.SOLVER.MAX_ITER, 1)
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [step for step in cfg.SOLVER.STEPS if step < total]
        if sorted(set(steps)) != steps:
            raise ConfigError(f"SOLVER.STEPS is {cfg.SOLVER.STEPS}, expected increasing iterations.")
        multiplier = MultiStepParamScheduler(
            values=[cfg.SOLVER.GAMMA**k for k in range(len(steps) + 1)], milestones=steps, num_updates=total
        )
    elif cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
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
    rows.append(("images a process", cfg.SOLVER.IMS_PER_BATCH // world_size, f"{world_size} processes"))
    return tabulate(rows, headers=("schedule", "value", "from"), disable_numparse=True)
