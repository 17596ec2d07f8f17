"""Build a classifier from the configuration, describe it, and train it on a given feed."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from resnet_backbone.engine.config import as_config_error
from resnet_backbone.engine.network_config import configured_network, network_name
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.output import versions
from resnet_backbone.engine.train import train
from resnet_backbone.networks import build_network
from resnet_backbone.pretraining.losses import ClassificationLosses, ImagesOf
from resnet_backbone.pretraining.preprocessing import build_normalize, crop_size
from resnet_backbone.weights import Metadata


def build_classifier(cfg: CfgNode, num_classes: int) -> tuple[nn.Module, dict[str, bool | float | str]]:
    """Return the network, on the CPU with random weights, and the arguments it was built with.

    Raises:
        ConfigError: MODEL.NETWORK has a value that the network cannot use.
    """
    with as_config_error("MODEL.NETWORK"):
        name, arguments = configured_network(cfg)
        return build_network(name, num_classes, **arguments), arguments


def describe_classifier(
    cfg: CfgNode,
    arguments: dict[str, bool | float | str],
    *,
    norm_statistics: str,
    norm_epsilon: float | None,
    class_names: Sequence[str],
    iterations: int,
    **results: float,
) -> Metadata:
    """Return the metadata of a classifier's checkpoint.

    Args:
        arguments: the arguments the network was built with.
        iterations: number of completed iterations.
        results: evaluation results by name.
    """
    return Metadata(
        kind="classifier",
        architecture=network_name(cfg),
        arguments=arguments,
        channel_order=cfg.INPUT.FORMAT,
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
        norm_statistics=norm_statistics,
        norm_epsilon=norm_epsilon,
        class_names=tuple(class_names),
        crop=crop_size(cfg),
        origin={
            "written_by": versions(),
            "dataset": str(cfg.DATASETS.TRAIN[0]),
            "iterations": iterations,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "seed": cfg.SEED,
            **results,
        },
    )


Feed = Callable[[nn.Module, torch.optim.Optimizer, ClassificationLosses], Iterable[Any]]


def train_new(cfg: CfgNode, num_classes: int, feed: Feed, images_of: ImagesOf, folder: Path) -> None:
    """Train a new network, with all hooks, on batches from `feed(model, optimizer, losses)`, only for measurement.

    Args:
        images_of: turns a batch into images `(n, 3, H, W)` uint8 and labels `(n,)` on the device.
        folder: folder for metrics.json and the run's other output.
    """
    model, arguments = build_classifier(cfg, num_classes)
    model = model.to(cfg.MODEL.DEVICE, memory_format=torch.channels_last)
    optimizer = build_optimizer(cfg, model)
    losses = ClassificationLosses(
        images_of=images_of, normalize=build_normalize(cfg), label_smoothing=cfg.SOLVER.LABEL_SMOOTHING
    )
    task = _Measured(cfg, arguments, losses, lambda: feed(model, optimizer, losses))
    train(cfg, task, model, optimizer, folder=folder, resume_from=None)


class _Measured:
    """The training loop's task for a network that is trained only to measure its speed."""

    best_metric = ""

    def __init__(
        self,
        cfg: CfgNode,
        arguments: dict[str, bool | float | str],
        losses: ClassificationLosses,
        feed: Callable[[], Iterable[Any]],
    ):
        self.losses = losses
        self.num_images = cfg.SOLVER.IMS_PER_BATCH
        self._cfg = cfg
        self._arguments = arguments
        self._feed = feed

    def batches(self, start_iteration: int) -> Iterable[Any]:
        return self._feed()

    def compile(self, model: nn.Module) -> None:
        self.losses.compile()

    def image_names(self, iteration: int) -> Sequence[str]:
        return ()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def metadata(self, iterations: int, **results: float) -> Metadata:
        return describe_classifier(
            self._cfg,
            self._arguments,
            norm_statistics="never",
            norm_epsilon=None,
            class_names=(),
            iterations=iterations,
            **results,
        )
