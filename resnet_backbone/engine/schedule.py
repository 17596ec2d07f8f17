"""The learning rate schedule, its linear rescaling for another batch size, and a table of the resolved values."""

import itertools
import logging
import math
from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from tabulate import tabulate

from resnet_backbone.engine.config import COMMAND_LINE, ConfigError, get_key, origin, said, set_key

logger = logging.getLogger(__name__)

SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupPlateauLR")
WARMUP_METHODS = ("linear", "constant")


def rescale_for_batch(cfg: CfgNode) -> None:
    """Adapt the schedule to IMS_PER_BATCH by the linear rule (Goyal et al., arXiv 1706.02677, section 2.1).

    For a batch k times SOLVER.REFERENCE_IMS_PER_BATCH, multiply the learning rate by k and divide iterations, steps,
    warm-up and periods by k (to at least 1), which keeps the number of epochs. Keys set on the command line are never
    changed. REFERENCE_IMS_PER_BATCH 0 turns rescaling off.
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
    # The rescaled configuration is saved; loading it must not rescale it again.
    set_key(cfg, "SOLVER.REFERENCE_IMS_PER_BATCH", batch, f"rescaled from a batch of {reference} to {batch}")


def build_multiplier(cfg: CfgNode) -> ParamScheduler:
    """The factor on the base learning rate, as a function of training progress (0…1).

    Matches Detectron2's `build_lr_scheduler`: warm-up ends at the schedule's value at that point.

    Raises:
        ConfigError: an unknown schedule or warm-up method, steps that are not increasing, or a warm-up that leaves no
            iterations for the cosine.
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
    elif cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPlateauLR":
        if cfg.TEST.EVAL_PERIOD <= 0:
            raise ConfigError(
                "SOLVER.LR_SCHEDULER_NAME is WarmupPlateauLR, which follows the evaluations, but TEST.EVAL_PERIOD is "
                f"{cfg.TEST.EVAL_PERIOD} ({origin(cfg, 'TEST.EVAL_PERIOD') or 'default'}). Set it to the number of "
                "iterations between two, with DATASETS.TEST to evaluate on."
            )
        # 1 throughout; `Plateau` does the rest. (fvcore's constant schedule has no value at the end of a warm-up that
        # lasts as long as the run.)
        multiplier = MultiStepParamScheduler(values=[1.0], milestones=[], num_updates=total)
    else:
        raise ConfigError(
            f"SOLVER.LR_SCHEDULER_NAME is {cfg.SOLVER.LR_SCHEDULER_NAME!r}, expected one of {', '.join(SCHEDULES)}."
        )
    if cfg.SOLVER.WARMUP_ITERS <= 0 or cfg.SOLVER.WARMUP_UNTIL_ERROR > 0:
        return multiplier
    return WarmupParamScheduler(
        multiplier, cfg.SOLVER.WARMUP_FACTOR, min(cfg.SOLVER.WARMUP_ITERS / total, 1.0), cfg.SOLVER.WARMUP_METHOD
    )


def check_schedule(cfg: CfgNode) -> None:
    """Raise what `build_multiplier` will raise after `rescale_for_batch`, without changing `cfg`.

    Raises:
        ConfigError: also if TEST.PATIENCE has no evaluations to count.
    """
    rescaled = cfg.clone()
    rescaled.defrost()
    rescale_for_batch(rescaled)
    if rescaled.SOLVER.MAX_ITER > 0:
        build_multiplier(rescaled)
    if cfg.TEST.PATIENCE > 0 and (cfg.TEST.EVAL_PERIOD <= 0 or not cfg.DATASETS.TEST):
        found = said(cfg, "TEST.EVAL_PERIOD") if cfg.DATASETS.TEST else "DATASETS.TEST is empty"
        raise ConfigError(
            f"{said(cfg, 'TEST.PATIENCE')}, which counts evaluations during training, but {found}. Set "
            "TEST.EVAL_PERIOD to the number of iterations between two, with DATASETS.TEST to evaluate on, or "
            "TEST.PATIENCE to 0."
        )


class Plateau:
    """Divide the learning rate when a metric stops improving ("when the error plateaus", ResNet paper, section 3.4).

    Same rule as torch's `ReduceLROnPlateau` (mode "max", threshold mode "abs"), as a factor.

    Args:
        gamma: multiplies the factor at each plateau.
        patience: number of measurements without improvement to tolerate.
        threshold: smallest change that counts as an improvement, in the metric's unit.
    """

    def __init__(self, *, gamma: float, patience: int, threshold: float):
        self._gamma = gamma
        self._patience = patience
        self._threshold = threshold
        self._drops = 0
        self._best = -math.inf
        self._waited = 0

    @property
    def factor(self) -> float:
        return self._gamma**self._drops

    def update(self, score: float) -> None:
        """Record the next measurement (higher is better)."""
        if score > self._best + self._threshold:
            self._best, self._waited = score, 0
        else:
            self._waited += 1
        if self._waited > self._patience:
            self._drops, self._waited = self._drops + 1, 0
            logger.info("the metric has not risen above %.2f: learning rate × %g", self._best, self.factor)

    def state_dict(self) -> dict[str, float]:
        return {"drops": self._drops, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._drops, self._best, self._waited = state["drops"], state["best"], state["waited"]


class WarmUpUntil:
    """Train at a low rate until the training error is below a limit (ResNet paper, section 4.2, for 110 layers).

    Args:
        metric: name of the training error, in percent.
        limit: warm-up ends for good once the error falls below this.
        low: the factor until then.
    """

    def __init__(self, *, metric: str, limit: float, low: float):
        self.metric = metric
        self._limit = limit
        self._low = low
        self._over = False

    @property
    def factor(self) -> float:
        return 1.0 if self._over else self._low

    def update(self, error: float) -> None:
        if not self._over and error < self._limit:
            self._over = True
            logger.info("%s is %.1f, below %g: warm-up is over", self.metric, error, self._limit)

    def state_dict(self) -> dict[str, bool]:
        return {"over": self._over}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        self._over = state["over"]


def build_plateau(cfg: CfgNode) -> Plateau | None:
    """A Plateau from SOLVER.PLATEAU_PATIENCE, PLATEAU_THRESHOLD and GAMMA; None for other schedules."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupPlateauLR":
        return None
    return Plateau(gamma=cfg.SOLVER.GAMMA, patience=cfg.SOLVER.PLATEAU_PATIENCE, threshold=cfg.SOLVER.PLATEAU_THRESHOLD)


def build_warm_up(cfg: CfgNode) -> WarmUpUntil | None:
    """A WarmUpUntil from SOLVER.WARMUP_UNTIL_ERROR and WARMUP_FACTOR; None if warm-up counts iterations."""
    if cfg.SOLVER.WARMUP_UNTIL_ERROR <= 0:
        return None
    return WarmUpUntil(metric="top1_error", limit=cfg.SOLVER.WARMUP_UNTIL_ERROR, low=cfg.SOLVER.WARMUP_FACTOR)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every parameter group to its base rate times `factor`; return the first group's rate.

    A tensor rate (for CUDA graphs, which record addresses) is updated in place.
    """
    for group in optimizer.param_groups:
        if "initial_lr" not in group:  # once: reading a tensor from a GPU waits for it
            group["initial_lr"] = float(group["lr"])
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return optimizer.param_groups[0]["initial_lr"] * factor


def describe_schedule(cfg: CfgNode, images: int, world_size: int) -> str:
    """A table of the resolved schedule, with the origin of each value.

    Args:
        images: number of training images, to compute epochs.
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
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPlateauLR":
        keys += ["SOLVER.GAMMA", "SOLVER.PLATEAU_PATIENCE", "SOLVER.PLATEAU_THRESHOLD"]
    keys += [f"SOLVER.{name}" for name in ("WARMUP_UNTIL_ERROR", "EMA_DECAY") if cfg.SOLVER[name] > 0]
    keys += ["TEST.PATIENCE"] if cfg.TEST.PATIENCE > 0 else []
    keys += ["SOLVER.ACCUMULATE"] if cfg.SOLVER.ACCUMULATE > 1 else []
    rows = [(key, get_key(cfg, key), origin(cfg, key) or "default") for key in keys]
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images
    rows.append(("epochs", f"{epochs:.2f}", f"{images:,} training images"))
    processes = f"{world_size} process" + ("es" if world_size > 1 else "")
    rows.append(("images a process", cfg.SOLVER.IMS_PER_BATCH // world_size, processes))
    return tabulate(rows, headers=("schedule", "value", "from"), disable_numparse=True)
