"""Triton's kernels, where a device has them."""

import functools
import importlib
import logging
import os
import shutil
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def kernels_for(tensor: Tensor, module: str, what: str) -> ModuleType | None:
    """Import the module of `ops` with the kernels for a tensor; None on a CPU, in double precision, without Triton.

    Triton needs a C compiler. Kernels run on the current device: call them within `torch.cuda.device_of(tensor)`.

    Args:
        what: the operation, for the log line that says once that something is missing.
    """
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return None
    try:
        found = importlib.import_module(f"resnet_backbone.ops.{module}")
    except ImportError:
        _say_slower(what, "Triton is not installed", "pip install triton")
        return None
    if not _has_compiler():
        _say_slower(what, "Triton finds no C compiler", "install gcc, or set CC")
        return None
    return found


@functools.cache
def _has_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


@functools.cache
def _say_slower(what: str, reason: str, advice: str) -> None:
    logger.warning("%s: %s takes its slower path on this GPU (%s)", reason, what, advice)
