"""Wrap a model for training in several processes."""

import contextlib

import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrap_for_processes(model: nn.Module) -> nn.Module:
    """Average gradients over processes if there is more than one."""
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def unwrap(model: nn.Module) -> nn.Module:
    """Undo `wrap_for_processes`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def lost_another_process(error: Exception) -> bool:
    """Return whether `error` is that of a collective operation whose other processes are gone."""
    return isinstance(error, torch.distributed.DistBackendError) or "/gloo/" in str(error)


def reduce_gradients(model: nn.Module, *, now: bool) -> contextlib.AbstractContextManager:
    """Average gradients over processes in this backward pass, or defer it to a later one of the same step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else contextlib.nullcontext()
