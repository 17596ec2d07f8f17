"""A classifier by the configuration: built, and trained on whatever is handed out."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from resnet_backbone.engine.config import network_arguments
from resnet_backbone.engine.config_errors import as_config_error
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.train import train
from resnet_backbone.networks import build_network
from resnet_backbone.networks import network_arguments as arguments_of
from resnet_backbone.pretraining.losses import ClassificationLosses, ImagesOf
from resnet_backbone.pretraining.preprocessing import build_normalize
from resnet_backbone.weights import Metadata


def build_classifier(cfg: CfgNode, num_classes: int) -> tuple[nn.Module, dict[str, bool | float | str]]:
    """The network on the CPU, with random weights, and the arguments that it was built with.

    Raises:
        ConfigError: MODEL.NETWORK has a value that the network cannot use.
    """
    name = cfg.MODEL.NETWORK.NAME
    with as_config_error("MODEL.NETWORK"):
        arguments = network_arguments(cfg, arguments_of(name))
        return build_network(name, num_classes, **arguments), arguments


def train_new(
    cfg: CfgNode,
    num_classes: int,
    feed: Callable[[nn.Module, torch.optim.Optimizer, ClassificationLosses], Iterable[Any]],
    images_of: ImagesOf,
    folder: Path,
) -> None:
    """Train a new network on what `feed(model, optimizer, losses)` hands out, with all hooks: to measure, not to keep.

    Args:
        images_of: from a batch to images `(n, 3, H, W)` uint8 and labels `(n,)` on the device.
        folder: for metrics.json and what else a run writes.
    """
    model, arguments = build_classifier(cfg, num_classes)
    model = model.to(cfg.MODEL.DEVICE, memory_format=torch.channels_last)
    optimizer = build_optimizer(cfg, model)
    losses = ClassificationLosses(
        images_of=images_of, normalize=build_normalize(cfg), label_smoothing=cfg.SOLVER.LABEL_SMOOTHING
    )

    def metadata(_iterations: int) -> Metadata:
        return Metadata(
            kind="classifier",
            architecture=cfg.MODEL.NETWORK.NAME,
            arguments=arguments,
            channel_order=cfg.INPUT.FORMAT,
            pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
            pixel_std=tuple(cfg.MODEL.PIXEL_STD),
            norm_statistics="never",
            norm_epsilon=None,
            class_names=(),
        )

    train(
        cfg,
        model=model,
        optimizer=optimizer,
        batches=lambda _start: feed(model, optimizer, losses),
        compute=losses,
        evaluate=lambda _model: {},
        metadata=metadata,
        num_images=cfg.SOLVER.IMS_PER_BATCH,
        folder=folder,
        resume_from=None,
        compiled=losses,
    )
