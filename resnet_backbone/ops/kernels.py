"""Triton's kernels, where a device has them."""

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def kernels_for(tensor: Tensor, module: str, what: str) -> ModuleType | None:
    """Import the module of `ops` with the kernels for a tensor; None on a CPU, in double precision, without Triton.

    Args:
        what: the operation, for the log line that says once that Triton is missing.
    """
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return None
    try:
        return importlib.import_module(f"resnet_backbone.ops.{module}")
    except ImportError:
        _say_without_triton(what)
        return None


@functools.cache
def _say_without_triton(what: str) -> None:
    logger.warning("Triton is not installed: %s takes its slower path on this GPU (pip install triton)", what)
