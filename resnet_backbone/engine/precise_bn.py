"""Batch normalization statistics over training images with fixed weights ("precise BN").

The ResNet paper recomputes them on the training set after pretraining and freezes them in detection (appendix A).
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.precision import autocast, precision_of

logger = logging.getLogger(__name__)


def finish_norm_statistics(cfg: CfgNode, model: nn.Module, batches: Iterable[Any]) -> bool:
    """With TEST.PRECISE_BN, estimate a trained model's statistics over training batches, in the training's precision.

    Returns:
        Whether the model has batch normalizations and they were estimated.
    """
    precise_bn = cfg.TEST.PRECISE_BN
    if not precise_bn.ENABLED:
        return False
    layers = estimate_norm_statistics(model, batches, precise_bn.NUM_ITER, precision=precision_of(cfg))
    if layers:
        logger.info("precise BN: %d layers over %d batches", layers, precise_bn.NUM_ITER)
    return bool(layers)


def estimate_norm_statistics(
    model: nn.Module, batches: Iterable[Any], iterations: int, *, precision: str = "fp32"
) -> int:
    """Replace every batch normalization's running averages with the statistics over `iterations` batches.

    The mean is taken over all values of all batches and processes, and the variance is the biased one around that mean
    (divided by N, not N - 1). In these forward passes, each batch is normalized by its own statistics (Wu, Johnson,
    arXiv 2105.07576, section 3 and appendix).

    Args:
        model: the model; its train or eval mode is restored afterwards.
        batches: what the model takes, such as normalized images `(N, 3, H, W)` on its device; at least `iterations`.
        precision: precision of the forward passes, as in training. The statistics are always in float32.

    Returns:
        The number of layers estimated; 0 if the network has none, in which case no batch is read.

    Raises:
        ConfigError: `iterations` is below 1.
    """
    if iterations < 1:
        raise ConfigError(f"TEST.PRECISE_BN.NUM_ITER is {iterations}, expected at least one batch.")
    was_training = model.training
    model.train()
    layers = get_bn_modules(model)
    if layers:
        with torch.no_grad():
            with (
                autocast(precision, next(model.parameters()).device),
                torch.compiler.set_stance("force_eager"),  # without gradients, it would be compiled anew
            ):
                update_bn_stats(model, batches, iterations)
            _average_over_processes(layers)
            for layer in layers:  # rounding can push a constant channel just below zero
                layer.running_var.clamp_(min=0)
    model.train(was_training)
    return len(layers)


def _average_over_processes(layers: list[nn.Module]) -> None:
    """Combine fvcore's per-process estimates; the overall variance is the mean square minus the squared mean.

    Every process has seen the same number of values. Double precision, since the two terms may be nearly equal.
    """
    processes = comm.get_world_size()
    if processes == 1:
        return
    for layer in layers:
        mean, variance = layer.running_mean.double(), layer.running_var.double()
        moments = torch.stack([mean, variance + mean**2])
        torch.distributed.all_reduce(moments)
        mean, square = moments / processes
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(square - mean**2)
