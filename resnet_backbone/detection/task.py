"""The detector as a task: Detectron2's model with our networks or its own, by the configuration."""

import contextlib
import logging
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import (
    build_model,
)
from detectron2.modeling.backbone import FPN
from torch import nn

from resnet_backbone.detection.backbone import NetworkBackbone
from resnet_backbone.detection.checks import check_classifiers_keys, check_datasets, check_evaluable, check_names
from resnet_backbone.detection.evaluation import evaluate, try_two_images
from resnet_backbone.detection.loader import TrainBatches
from resnet_backbone.detection.precision import keep_boxes_in_float32
from resnet_backbone.detection.pretrained import (
    check_frozen_norms,
    forget_pretrained,
    is_frozen_norm,
    read_pretrained,
)
from resnet_backbone.engine import run as engine_run
from resnet_backbone.engine.config import ConfigError, origin, set_key
from resnet_backbone.engine.network_config import arguments_from_config, fill_from_metadata
from resnet_backbone.engine.nonfinite import Losses
from resnet_backbone.engine.output import LAST, versions
from resnet_backbone.networks import accepted_arguments
from resnet_backbone.weights import (
    Checkpoint,
    CheckpointError,
    Metadata,
    load_state,
    read_checkpoint,
)

logger = logging.getLogger(__name__)

OWN_BACKBONES = ("build_network_backbone", "build_network_fpn_backbone", "build_network_retinanet_fpn_backbone")


def run(cfg: CfgNode, *, resume: bool = False, eval_only: bool = False) -> dict[str, Any]:
    """Train a detector by the configuration (`engine.run.run`); return the metrics, `{"bbox": {"AP": …}}`.

    A stock Detectron2 configuration works too.
    """
    return engine_run.run(cfg, Detection(cfg), resume=resume, eval_only=eval_only)


class Detection:
    """Training a detector as a task of `engine.run`."""

    best_metric = "bbox/AP"

    def __init__(self, cfg: CfgNode):
        self._cfg = cfg
        self._folder = Path(cfg.OUTPUT_DIR)

    def check(self, *, eval_only: bool) -> None:
        check_names(self._cfg)
        check_classifiers_keys(self._cfg)

    def build(self, last: Checkpoint | None, *, eval_only: bool) -> nn.Module:
        cfg = self._cfg
        weights, file = _read_weights(cfg, last, self._folder)
        check_datasets(cfg, training=not eval_only)
        if eval_only:
            check_evaluable(cfg, weights, file)
        else:
            self._batches = TrainBatches(cfg)
            self.num_images = self._batches.num_images
        model = _build_model(cfg, weights, file)
        logger.info(describe_frozen(model))
        self._norms = [
            m for m in model.modules() if is_frozen_norm(m) or isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        self._pretrained_by = None if weights is None else weights.metadata
        forget_pretrained()
        self.metadata(0)
        return model

    def try_evaluation(self, model: nn.Module) -> None:
        try_two_images(self._cfg, model)

    def batches(self, start_iteration: int) -> Iterable[Any]:
        return self._batches(start_iteration)

    def losses(self, model: nn.Module, batch: Any) -> tuple[Losses, Losses]:
        return model(batch), {}

    def compile(self, model: nn.Module) -> None:
        model.backbone.compile()

    def image_names(self, iteration: int) -> Sequence[str]:
        return self._batches.names(iteration)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        return evaluate(self._cfg, model, self._folder)

    def metadata(self, iterations: int, **results: float) -> Metadata:
        return _describe(self._cfg, self._norms, self._pretrained_by, iterations, results)

    def finish(self, model: nn.Module) -> None:
        """Nothing."""

    def headline(self, results: dict[str, Any]) -> dict[str, float]:
        boxes = results.get("bbox", {})
        return {name: boxes[name] for name in ("AP", "AP50") if name in boxes}


def describe_frozen(model: nn.Module) -> str:
    """One line for the log: which stages and how many tensors and norms of the model are not trained."""
    parameters = list(model.parameters())
    still = sum(not p.requires_grad for p in parameters)
    norms = sum(is_frozen_norm(module) for module in model.modules())
    backbone = getattr(model, "backbone", model)
    backbone = backbone.bottom_up if isinstance(backbone, FPN) else backbone
    if isinstance(backbone, NetworkBackbone):
        network = backbone.network
        stages = {name: nn.ModuleList(network.stage_modules(name)) for name in network.stage_names}
    else:
        stages = dict(backbone.named_children())
    frozen = [name for name, stage in stages.items() if _is_frozen(stage)]
    return (
        f"frozen: {'stages ' + ', '.join(frozen) if frozen else 'no stage'}; {still} of {len(parameters)} parameter "
        f"tensors; {norms} batch normalisations with fixed statistics, scale and bias"
    )


def _is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters, and none of them is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)


def _is_own(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in OWN_BACKBONES


def _read_weights(cfg: CfgNode, last: Checkpoint | None, folder: Path) -> tuple[Checkpoint | None, str]:
    """The weights that this run starts from, their metadata entered into `cfg`, and the file's name.

    None for random weights, and for anything but this project's checkpoints with one of Detectron2's backbones, which
    Detectron2 itself loads.
    """
    file = str(folder / (folder / LAST).read_text().strip()) if last else cfg.MODEL.WEIGHTS
    weights = last
    if _is_own(cfg):
        _follow_depth(cfg)
        if weights is None and file:
            weights = read_pretrained(cfg)
        if weights is not None:
            fill_from_metadata(cfg, weights.metadata, file)
    elif weights is None and file:
        with contextlib.suppress(CheckpointError):
            weights = read_checkpoint(file)
    if not _is_own(cfg) and weights is not None:
        if weights.metadata.kind == "classifier":
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, but {file} was written by tools/pretrain.py for "
                f"one of {', '.join(OWN_BACKBONES)}. Set MODEL.BACKBONE.NAME to it."
            )
        if weights.metadata.architecture != cfg.MODEL.BACKBONE.NAME:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, but {file} holds a detector with "
                f"{weights.metadata.architecture}. Give the configuration that it was trained with."
            )
        # A stock backbone has no name and width in MODEL.NETWORK; the preprocessing is what remains to agree.
        preprocessing = replace(weights.metadata, architecture=cfg.MODEL.NETWORK.NAME, arguments=_stock_arguments(cfg))
        fill_from_metadata(cfg, preprocessing, file)
    if weights is not None:
        logger.info("%s: %s", file, weights.metadata.describe())
    return weights, file


def _follow_depth(cfg: CfgNode) -> None:
    """A stock configuration says RESNETS.DEPTH where this package's says NETWORK.NAME, which by default is another."""
    depth = origin(cfg, "MODEL.RESNETS.DEPTH")
    if depth is not None and origin(cfg, "MODEL.NETWORK.NAME") is None:
        set_key(cfg, "MODEL.NETWORK.NAME", f"resnet{cfg.MODEL.RESNETS.DEPTH}", f"MODEL.RESNETS.DEPTH of {depth}")


def _build_model(cfg: CfgNode, weights: Checkpoint | None, file: str) -> nn.Module:
    """The detector on its device, with all weights that it starts from."""
    building = cfg.clone()
    building.defrost()
    detector = weights is not None and weights.metadata.kind == "detector"
    if detector:  # loaded as a whole below: the builders need not read it again for their parts
        building.MODEL.WEIGHTS = ""
        building.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN = True
    try:
        model = build_model(building)
    except (KeyError, AssertionError) as error:
        raise ConfigError(
            f"Detectron2 cannot build this configuration ({type(error).__name__}: {error}). Check that "
            "MODEL.{RPN,ROI_HEADS,FPN}.IN_FEATURES name features of the backbone "
            f"({cfg.MODEL.BACKBONE.NAME}, MODEL.RESNETS.OUT_FEATURES {', '.join(cfg.MODEL.RESNETS.OUT_FEATURES)})."
        ) from error
    if detector:
        allowed = cfg.MODEL.NETWORK.ALLOW_MISSING
        logger.info(load_state(model, weights.model, part="detector", source=file, may_miss=allowed))
        check_frozen_norms(cfg, model, weights, part="the detector")
    elif not _is_own(cfg):
        if not file:
            check_frozen_norms(cfg, model, None, part="the detector")
        _load_with_detectron2(model, file)
    if cfg.SOLVER.AMP.ENABLED:
        keep_boxes_in_float32(model)
    return model.to(memory_format=torch.channels_last)  # the layout that convolutions run fastest in


def _load_with_detectron2(model: nn.Module, file: str) -> None:
    """Load one of Detectron2's own formats by Detectron2's own rules."""
    try:
        DetectionCheckpointer(model).load(file)
    except (OSError, AssertionError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"MODEL.WEIGHTS {file} cannot be loaded by Detectron2 ({detail}).") from error


def _describe(
    cfg: CfgNode, norms: Sequence[nn.Module], source: Metadata | None, iterations: int, results: Mapping[str, float]
) -> Metadata:
    """What a checkpoint of this detector says about itself.

    Args:
        norms: of the model.
        source: of the weights that training started from, where they had any.
        iterations: finished ones.
        results: of the evaluation.
    """
    own = _is_own(cfg)
    if not norms:
        statistics = "none"
    elif iterations and not any(is_frozen_norm(m) for m in norms):
        statistics = "running"
    elif source is not None:
        statistics = source.norm_statistics
    else:
        statistics = "running" if cfg.MODEL.WEIGHTS else "never"  # weights of Detectron2's formats have been trained
    # A resumed run's checkpoint is a detector itself, and knows what it was pretrained by.
    pretrained = {}
    if source is not None:
        pretrained = source.origin if source.kind == "classifier" else source.origin.get("pretrained", {})
    return Metadata(
        kind="detector",
        architecture=cfg.MODEL.NETWORK.NAME if own else cfg.MODEL.BACKBONE.NAME,
        arguments=_own_arguments(cfg) if own else _stock_arguments(cfg),
        channel_order=cfg.INPUT.FORMAT,
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
        norm_statistics=statistics,
        norm_epsilon=norms[0].eps if norms else None,
        class_names=tuple(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", ()))
        if cfg.DATASETS.TRAIN
        else (),
        origin={
            "written_by": versions(),
            "dataset": ", ".join(cfg.DATASETS.TRAIN),
            "iterations": iterations,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "seed": cfg.SEED,
            "pretrained": dict(pretrained),
            **results,
        },
    )


def _own_arguments(cfg: CfgNode) -> dict[str, Any]:
    return arguments_from_config(cfg, accepted_arguments(cfg.MODEL.NETWORK.NAME))


def _stock_arguments(cfg: CfgNode) -> dict[str, Any]:
    """What metadata says of a backbone that Detectron2 built from its own keys."""
    return {"width": cfg.MODEL.NETWORK.WIDTH, "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1}
