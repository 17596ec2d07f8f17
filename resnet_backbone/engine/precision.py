"""The precision of a forward pass: float32, or lower with autocast."""

import contextlib

import torch
from detectron2.config import CfgNode

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *AUTOCAST_TYPES)


def precision_of(cfg: CfgNode) -> str:
    """The entry of PRECISIONS that SOLVER.AMP selects."""
    return cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "fp32"


def autocast(
    precision: str, device: torch.device | str, *, cache_enabled: bool = True
) -> contextlib.AbstractContextManager:
    """A context that runs its body on `device` in one of PRECISIONS.

    Args:
        cache_enabled: cache the low-precision weights until the outermost context exits.
    """
    if precision not in AUTOCAST_TYPES:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=AUTOCAST_TYPES[precision], cache_enabled=cache_enabled)
