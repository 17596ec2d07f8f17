"""Train or evaluate a detector by the configuration, end to end."""

import logging
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from torch import nn

from resnet_backbone.detection import datasets
from resnet_backbone.detection.backbone import NetworkBackbone
from resnet_backbone.detection.evaluation import evaluate, try_two_images
from resnet_backbone.detection.loader import TrainBatches
from resnet_backbone.detection.pretrained import check_frozen_norms
from resnet_backbone.engine.config import ConfigError, fill_from_metadata, network_arguments
from resnet_backbone.engine.output import FINAL, LAST, open_output, read_last_checkpoint, versions, write_config
from resnet_backbone.engine.schedule import rescale_for_batch
from resnet_backbone.engine.train import check_batch, choose_seed, train
from resnet_backbone.networks import network_arguments as arguments_of
from resnet_backbone.weights import Checkpoint, CheckpointError, Metadata, load_state, read_checkpoint
from resnet_backbone.weights import write_checkpoint, write_json

logger = logging.getLogger(__name__)

OWN_BACKBONES = ("build_network_backbone", "build_network_fpn_backbone", "build_network_retinanet_fpn_backbone")


def run(cfg: CfgNode, *, resume: bool = False, eval_only: bool = False) -> dict[str, Any]:
    """Train, evaluate, write `model_final.pth`; return the metrics, `{"bbox": {"AP": …}}`.

    Args:
        cfg: of `get_config()`, loaded by `engine.config.load_config`. A stock Detectron2 configuration works too.
        resume: go on from the last checkpoint in OUTPUT_DIR.
        eval_only: evaluate MODEL.WEIGHTS on DATASETS.TEST and write nothing but the log and the detections.

    Raises:
        InputError: something in the configuration cannot be used; found before the first iteration.
    """
    check_batch(cfg)
    folder = open_output(cfg, resume=resume or eval_only)
    rescale_for_batch(cfg)
    last = read_last_checkpoint(folder) if resume else None
    choose_seed(cfg, last)
    torch.manual_seed(cfg.SEED)

    weights = _read_weights(cfg, last)
    file = str(folder / (folder / LAST).read_text().strip()) if last else cfg.MODEL.WEIGHTS
    if weights is not None:
        logger.info("%s: %s", file, weights.metadata.describe())
        if _is_own(cfg):
            fill_from_metadata(cfg, weights.metadata, file)
    _check_datasets(cfg, training=not eval_only)
    model = _build_model(cfg, weights, file)
    logger.info(describe_frozen(model))
    try_two_images(cfg, model)
    if eval_only:
        return evaluate(cfg, model, folder)
    write_config(cfg, folder)

    batches = TrainBatches(cfg)

    def metadata(iterations: int, **origin: Any) -> Metadata:
        return _describe(cfg, weights, iterations, **origin)

    train(
        cfg,
        model=model,
        optimizer=build_optimizer(cfg, model),
        batches=batches,
        compute=lambda model, batch: (model(batch), {}),
        evaluate=lambda: evaluate(cfg, model, folder),
        metadata=metadata,
        num_images=batches.num_images,
        folder=folder,
        resume_from=last,
    )

    results = evaluate(cfg, model, folder)
    if comm.is_main_process():
        metrics = results.get("bbox", {})
        final = metadata(cfg.SOLVER.MAX_ITER, **{key: metrics[key] for key in ("AP", "AP50") if key in metrics})
        write_checkpoint(folder / FINAL, Checkpoint(model.state_dict(), final))
        write_json(folder / "results.json", results)
        logger.info("wrote %s: %s", folder / FINAL, final.describe())
    comm.synchronize()
    return results


def describe_frozen(model: nn.Module) -> str:
    """One line for the log: which stages and how many tensors and norms of the backbone are not trained."""
    parameters = list(model.parameters())
    still = sum(not p.requires_grad for p in parameters)
    backbone = model.backbone.bottom_up if isinstance(getattr(model, "backbone", None), FPN) else model.backbone
    if not isinstance(backbone, NetworkBackbone):
        return f"frozen: {still} of {len(parameters)} parameter tensors"
    network = backbone.network
    stages = [
        name
        for name in network.stage_names
        if not any(p.requires_grad for module in network.stage_modules(name) for p in module.parameters())
    ]
    norms = sum("Frozen" in type(m).__name__ for m in model.modules())
    return (
        f"frozen: {'stages ' + ', '.join(stages) if stages else 'no stage'}; {still} of {len(parameters)} parameter tensors; "
        f"{norms} batch normalisations with fixed statistics, scale and bias"
    )


def _is_own(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in OWN_BACKBONES


def _read_weights(cfg: CfgNode, last: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that this run starts from, where it is one of the project's."""
    if last is not None or not cfg.MODEL.WEIGHTS:
        return last
    if _is_own(cfg):
        return read_checkpoint(cfg.MODEL.WEIGHTS)
    try:
        weights = read_checkpoint(cfg.MODEL.WEIGHTS)
    except CheckpointError:
        return None  # Detectron2's own backbone with weights of Detectron2's own formats
    if weights.metadata.kind == "classifier":
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, but {cfg.MODEL.WEIGHTS} was written by tools/pretrain.py for "
            f"one of {', '.join(OWN_BACKBONES)}. Set MODEL.BACKBONE.NAME to it."
        )
    return weights


def _check_datasets(cfg: CfgNode, *, training: bool) -> None:
    wanted = (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST))
    for key, entries in wanted if training else wanted[1:]:
        if not entries:
            raise ConfigError(f"{key} is empty. Give a registered name, FILE.json, or FILE.json:IMAGES.")
        for entry in entries:
            logger.info("%s: %d images", entry, len(datasets.check(cfg, entry)))
    if training:
        datasets.check_same_classes(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)


def _build_model(cfg: CfgNode, weights: Checkpoint | None, file: str) -> nn.Module:
    """The detector on its device, with all weights that it starts from."""
    building = cfg.clone()
    building.MODEL.WEIGHTS = file
    model = build_model(building)
    if weights is not None and weights.metadata.kind == "detector":
        allowed = cfg.MODEL.NETWORK.ALLOW_MISSING
        logger.info(load_state(model, weights.model, part="detector", source=file, may_miss=allowed))
    elif not _is_own(cfg):
        if not cfg.MODEL.WEIGHTS:
            check_frozen_norms(cfg, model, None, part="the model")
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def _describe(cfg: CfgNode, weights: Checkpoint | None, iterations: int, **origin: Any) -> Metadata:
    """What a checkpoint of this detector says about itself."""
    source = weights.metadata if weights is not None else None
    own = _is_own(cfg)
    return Metadata(
        kind="detector",
        architecture=cfg.MODEL.NETWORK.NAME if own else cfg.MODEL.BACKBONE.NAME,
        arguments=dict(source.arguments) if source else network_arguments(cfg, arguments_of(cfg.MODEL.NETWORK.NAME)) if own else {},
        channel_order=cfg.INPUT.FORMAT,
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
        norm_statistics=source.norm_statistics if source else "running",
        norm_epsilon=source.norm_epsilon if source else 1e-5,
        class_names=tuple(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", ())),
        origin={
            "written_by": versions(),
            "dataset": ", ".join(cfg.DATASETS.TRAIN),
            "iterations": iterations,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "seed": cfg.SEED,
            "pretrained": dict(source.origin) if source and source.kind == "classifier" else {},
            **origin,
        },
    )
