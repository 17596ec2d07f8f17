"""Classifier training as a task: from random or given weights to a checkpoint that describes its preprocessing."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from resnet_backbone.data.decode import decode, looks_whole
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.sources import open_source
from resnet_backbone.data.subset import hold_out
from resnet_backbone.engine import run as engine_run
from resnet_backbone.engine.config import ConfigError, origin
from resnet_backbone.engine.network_config import fill_adjustable, fill_from_metadata
from resnet_backbone.engine.nonfinite import Losses
from resnet_backbone.engine.precise_bn import finish_norm_statistics
from resnet_backbone.engine.pretrained import command_line_overrides, read_with_overrides
from resnet_backbone.engine.ranges import check_ranges
from resnet_backbone.engine.unread import refuse_unread
from resnet_backbone.networks import FrozenBatchNorm2d
from resnet_backbone.pretraining.config import RANGES, UNREAD, get_config
from resnet_backbone.pretraining.evaluation import build_evaluator, load_ensemble
from resnet_backbone.pretraining.losses import ClassificationLosses
from resnet_backbone.pretraining.multi_crop import build_evaluation_crops
from resnet_backbone.pretraining.network import build_classifier, describe_classifier
from resnet_backbone.pretraining.pipelines import build_pipeline
from resnet_backbone.pretraining.preprocessing import build_normalize, build_train_transform
from resnet_backbone.weights import Checkpoint, Metadata, load_state

logger = logging.getLogger(__name__)


def run(cfg: CfgNode, *, resume: bool = False, eval_only: bool = False) -> dict[str, float]:
    """Pretrain a classifier as configured (`engine.run.run`); return top-1 and top-5 in percent.

    With SOLVER.MAX_ITER 0, the result is the initialized network with BN statistics from training images.
    """
    return engine_run.run(cfg, Classification(cfg), resume=resume, eval_only=eval_only)


class Classification:
    """Pretraining as a task of `engine.run`."""

    def __init__(self, cfg: CfgNode):
        self.best_metric = cfg.TEST.BEST_METRIC or "top1"
        self._cfg = cfg
        self._precise = False

    def check(self, *, eval_only: bool) -> None:
        refuse_unread(self._cfg, get_config(), UNREAD, tool="tools/pretrain.py")
        check_ranges(self._cfg, RANGES)
        build_train_transform(self._cfg)  # for its checks, as the next one
        build_evaluation_crops(self._cfg)
        ensemble = self._cfg.TEST.ENSEMBLE
        if ensemble and not eval_only:
            raise ConfigError(
                f"TEST.ENSEMBLE names {len(ensemble)} networks, but a training run tests the one that it trains. Add "
                "--eval-only, or leave TEST.ENSEMBLE empty."
            )

    def build(self, last: Checkpoint | None, *, eval_only: bool) -> nn.Module:
        cfg = self._cfg
        source, test_source = _open_sources(cfg)
        if test_source is not None:
            _check_images_are_whole(test_source)
        weights = _read_weights(cfg, last, test_source or source, eval_only=eval_only)
        model, self._arguments = _build_model(cfg, weights, len(source.class_names))
        self._norm_statistics = "never" if weights is None else weights.metadata.norm_statistics
        norms = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
        self._norms = [module for module in model.modules() if isinstance(module, norms)]
        self._class_names = tuple(source.class_names)
        self.metadata(0)
        self._normalize = build_normalize(cfg)
        self._pipeline = build_pipeline(cfg, source)
        self._losses = ClassificationLosses(
            images_of=self._pipeline.images_of,
            normalize=self._normalize,
            label_smoothing=cfg.SOLVER.LABEL_SMOOTHING,
        )
        self._evaluator = None
        if test_source is not None:
            ensemble = load_ensemble(cfg, test_source.class_names)
            self._evaluator = build_evaluator(cfg, test_source, self._normalize, ensemble=ensemble)
        self.num_images = self._pipeline.num_images
        return model

    def try_evaluation(self, model: nn.Module) -> None:
        if self._evaluator is not None:
            self._evaluator.try_two_images(model)

    def batches(self, start_iteration: int) -> Iterable[Any]:
        return self._pipeline(start_iteration)

    def losses(self, model: nn.Module, batch: Any) -> tuple[Losses, Losses]:
        return self._losses(model, batch)

    def compile(self, model: nn.Module) -> None:
        self._losses.compile()

    def image_names(self, iteration: int) -> Sequence[str]:
        return self._pipeline.names(iteration)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {} if self._evaluator is None else self._evaluator(model)

    def metadata(self, iterations: int, **results: float) -> Metadata:
        statistics = self._norm_statistics
        if self._precise:
            statistics = "precise"
        elif iterations and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self._norms):
            statistics = "running"
        return describe_classifier(
            self._cfg,
            self._arguments,
            norm_statistics=statistics if self._norms else "none",
            norm_epsilon=self._norms[0].eps if self._norms else None,
            class_names=self._class_names,
            iterations=iterations,
            **results,
        )

    def finish(self, model: nn.Module) -> None:
        """Replace batch norm's running averages with statistics over training images (ResNet paper, appendix A)."""
        images = (self._normalize(self._pipeline.images_of(batch)[0]) for batch in self._pipeline(0))
        self._precise = finish_norm_statistics(self._cfg, model, images)

    def headline(self, results: dict[str, float]) -> dict[str, float]:
        return {name: results[name] for name in ("top1", "top5") if name in results}


def _open_sources(cfg: CfgNode) -> tuple[ClassificationSource, ClassificationSource | None]:
    """Open the training and test data, and check them against each other and the configuration.

    The test data are None if DATASETS.TEST is empty.
    """
    for key, names in (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        if len(names) != 1 and (names or key == "DATASETS.TRAIN"):
            raise ConfigError(
                f"{key} is {names or 'empty'}, expected one entry: a folder of class folders, a quoted shard pattern "
                "such as 'train-{000000..000007}.tar', imagenet_train or cifar10_train."
            )
    source = open_source(cfg.DATASETS.TRAIN[0])
    test_source = open_source(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
    if test_source is not None and list(source.class_names) != list(test_source.class_names):
        raise ConfigError(
            f"the classes of DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]} ({len(source.class_names)}: "
            f"{', '.join(source.class_names[:3])} …) and DATASETS.TEST {cfg.DATASETS.TEST[0]} "
            f"({len(test_source.class_names)}: {', '.join(test_source.class_names[:3])} …) differ."
        )
    num_classes = cfg.MODEL.NETWORK.NUM_CLASSES
    if num_classes and num_classes != len(source.class_names):
        raise ConfigError(
            f"MODEL.NETWORK.NUM_CLASSES is {num_classes}, but {cfg.DATASETS.TRAIN[0]} has {len(source.class_names)} "
            "classes. Set it to 0 to follow the data."
        )
    if cfg.DATASETS.HOLD_OUT:
        if test_source is None:
            raise ConfigError(
                f"DATASETS.HOLD_OUT is {cfg.DATASETS.HOLD_OUT}, which holds images out for the evaluation, but "
                "DATASETS.TEST is empty, so there is none. Set DATASETS.TEST, or DATASETS.HOLD_OUT to 0."
            )
        source, test_source = hold_out(source, cfg.DATASETS.HOLD_OUT)
    logger.info("%s: %d images, %d classes", cfg.DATASETS.TRAIN[0], len(source), len(source.class_names))
    if test_source is not None:
        tested = f"held out of {cfg.DATASETS.TRAIN[0]}" if cfg.DATASETS.HOLD_OUT else cfg.DATASETS.TEST[0]
        logger.info("%s: %d images", tested, len(test_source))
    return source, test_source


def _check_images_are_whole(source: ClassificationSource) -> None:
    """Raise DatasetError for a cut-off test image, which would end an evaluation hours later; training may skip it.

    Each process looks at its share, and decodes only images without an end mark.
    """
    for index in range(comm.get_rank(), len(source), comm.get_world_size()):
        ends = source.ends(index)
        if ends is not None and not looks_whole(*ends):
            decode(source.read(index), what=source.describe(index))


def _read_weights(
    cfg: CfgNode, last: Checkpoint | None, test_source: ClassificationSource, *, eval_only: bool
) -> Checkpoint | None:
    """Read the initial weights and copy their preprocessing into `cfg`; return None for random weights."""
    if last is None and not cfg.MODEL.WEIGHTS:
        if eval_only:
            raise ConfigError("MODEL.WEIGHTS is empty, so --eval-only would test random weights. Name a checkpoint.")
        return None
    weights = read_with_overrides(cfg.MODEL.WEIGHTS, command_line_overrides(cfg)) if last is None else last
    file = cfg.MODEL.WEIGHTS if last is None else f"the last checkpoint in {cfg.OUTPUT_DIR}"
    logger.info("%s: %s", file, weights.metadata.describe())
    if weights.metadata.kind != "classifier":
        raise ConfigError(
            f"{file} holds a {weights.metadata.kind}, expected a classifier. Give MODEL.WEIGHTS a file of "
            "tools/pretrain.py."
        )
    fill_from_metadata(cfg, weights.metadata, file)
    fill_adjustable(cfg, weights.metadata, file)
    theirs, ours = list(weights.metadata.class_names), list(test_source.class_names)
    if "converted_from" in weights.metadata.origin and len(theirs) == len(ours):
        logger.info("%s does not name its classes; they are taken for those of DATASETS.TEST, in their order", file)
    elif eval_only and theirs != ours:
        raise ConfigError(
            f"the {len(theirs)} classes of {file} ({', '.join(theirs[:3])} …) are not the {len(ours)} of DATASETS.TEST "
            f"{cfg.DATASETS.TEST[0]} ({', '.join(ours[:3])} …). Evaluate on data with the same class names, in the "
            "same order."
        )
    return weights


def _build_model(
    cfg: CfgNode, weights: Checkpoint | None, num_classes: int
) -> tuple[nn.Module, dict[str, bool | float | str]]:
    """Return the network on its device with its initial weights, and the arguments it was built with."""
    model, arguments = build_classifier(cfg, num_classes)
    allowed = cfg.MODEL.NETWORK.ALLOW_MISSING
    if weights is not None:
        file = cfg.MODEL.WEIGHTS if weights.trainer is None else "the last checkpoint"
        logger.info(load_state(model, weights.model, part="network", source=file, may_miss=allowed))
    elif any(isinstance(module, FrozenBatchNorm2d) for module in model.modules()):
        raise ConfigError(
            f"MODEL.RESNETS.NORM is FrozenBN ({origin(cfg, 'MODEL.RESNETS.NORM') or 'default'}), which on random "
            "weights is the identity and is never trained. Set it to BN."
        )
    return model.to(cfg.MODEL.DEVICE, memory_format=torch.channels_last), arguments
