"""Batch normalisation statistics over training images, with the weights fixed ("precise BN").

The ResNet paper recomputes them on the training set after pretraining and fixes them in detection (appendix A).
"""

from collections.abc import Iterable

import torch
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn


def estimate_norm_statistics(model: nn.Module, batches: Iterable[torch.Tensor], iterations: int) -> int:
    """Replace the running averages of every batch normalisation by the statistics over `iterations` batches.

    Args:
        model: in the mode in which it is trained afterwards; its training mode is restored.
        batches: normalised images `(N, 3, H, W)` on the model's device, at least `iterations` of them.

    Returns:
        The number of layers estimated; 0 if the network has none, and then no batch is read.
    """
    was_training = model.training
    model.train()
    layers = get_bn_modules(model)
    if layers:
        with torch.no_grad():
            update_bn_stats(model, batches, iterations)
            _average_over_processes(layers)
    model.train(was_training)
    return len(layers)


def _average_over_processes(layers: list[nn.Module]) -> None:
    """fvcore estimates in each process alone; the variance over all is the mean square less the squared mean."""
    processes = comm.get_world_size()
    if processes == 1:
        return
    for layer in layers:
        moments = torch.stack([layer.running_mean, layer.running_var + layer.running_mean**2])
        torch.distributed.all_reduce(moments)
        mean, square = moments / processes
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(square - mean**2)
