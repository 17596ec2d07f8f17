"""Train or evaluate a detector by the configuration, end to end."""

import difflib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from detectron2.modeling.backbone import FPN
from detectron2.utils import comm
from torch import nn

from resnet_backbone.detection import datasets
from resnet_backbone.detection.backbone import NetworkBackbone
from resnet_backbone.detection.evaluation import evaluate, try_two_images
from resnet_backbone.detection.loader import TrainBatches
from resnet_backbone.detection.precision import keep_boxes_in_float32
from resnet_backbone.detection.weights import is_frozen_norm, is_own, load_whole, offered, read, stock_arguments
from resnet_backbone.engine.config import ConfigError, get_key, network_arguments, origin
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.output import FINAL, open_output, read_last_checkpoint, versions, write_config
from resnet_backbone.engine.schedule import rescale_for_batch
from resnet_backbone.engine.train import check_batch, check_solver, choose_seed, train
from resnet_backbone.networks import network_arguments as arguments_of
from resnet_backbone.weights import Checkpoint, Metadata, write_checkpoint, write_json

logger = logging.getLogger(__name__)

REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
}


def run(cfg: CfgNode, *, resume: bool = False, eval_only: bool = False) -> dict[str, Any]:
    """Train, evaluate, write `model_final.pth`; return the metrics, `{"bbox": {"AP": …}}`, on the main process.

    Args:
        cfg: of `get_config()`, loaded by `engine.config.load_config`. A stock Detectron2 configuration works too.
        resume: go on from the last checkpoint in OUTPUT_DIR, or from MODEL.WEIGHTS where there is none.
        eval_only: evaluate on DATASETS.TEST what a run would start from; write nothing but the log and the detections.

    Raises:
        InputError: something in the configuration cannot be used; found before the first iteration.
    """
    check_batch(cfg)
    check_solver(cfg)
    _check_names(cfg)
    _check_classifiers_keys(cfg)
    folder = open_output(cfg, resume=resume or eval_only)
    rescale_for_batch(cfg)
    last = read_last_checkpoint(folder) if resume else None
    choose_seed(cfg, last)
    torch.manual_seed(cfg.SEED)

    weights, file = read(cfg, last, folder)
    _check_datasets(cfg, training=not eval_only)
    if eval_only:
        _check_evaluable(cfg, weights, file)
    model = _build_model(cfg, weights, file)
    logger.info(describe_frozen(model))
    source = None if weights is None else weights.metadata
    del weights  # a copy of the model and of the optimizer's state

    def metadata(iterations: int, **results: float) -> Metadata:
        return _describe(cfg, model, source, iterations, results)

    metadata(0)  # refuses now, not at the first checkpoint, a preprocessing that no checkpoint could state
    try_two_images(cfg, model)
    if eval_only:
        return evaluate(cfg, model, folder)
    write_config(cfg, folder)

    batches = TrainBatches(cfg)

    trained = train(
        cfg,
        model=model,
        optimizer=build_optimizer(cfg, model),
        batches=batches,
        compute=lambda model, batch: (model(batch), {}),
        evaluate=lambda model: evaluate(cfg, model, folder),
        metadata=metadata,
        num_images=batches.num_images,
        folder=folder,
        resume_from=last,
        best_metric="bbox/AP",
        names=batches.names,
        compiled=model.backbone,
    )

    results = evaluate(cfg, trained, folder)
    if comm.is_main_process():
        metrics = results.get("bbox", {})
        final = metadata(cfg.SOLVER.MAX_ITER, **{key: metrics[key] for key in ("AP", "AP50") if key in metrics})
        write_checkpoint(folder / FINAL, Checkpoint(trained.state_dict(), final))
        write_json(folder / "results.json", results)
        logger.info("wrote %s: %s", folder / FINAL, final.describe())
    comm.synchronize()
    return results


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


def _check_names(cfg: CfgNode) -> None:
    """Detectron2 looks names up while it builds; offer the nearest before anything is read."""
    for key, registry in REGISTRIES.items():
        names = [name for name, _ in registry]
        if get_key(cfg, key) and get_key(cfg, key) not in names and get_key(cfg, key) != "PrecomputedProposals":
            near = difflib.get_close_matches(get_key(cfg, key), names, n=1, cutoff=0.0)
            raise ConfigError(
                f"{key} is {get_key(cfg, key)} ({origin(cfg, key) or 'default'}), which nothing is registered as; the "
                f"nearest is {near[0]}."
            )


def _check_classifiers_keys(cfg: CfgNode) -> None:
    """Refuse what the loop can do for classifiers alone."""
    for key, off, why in (
        ("SOLVER.CUDA_GRAPH", False, "a detector's shapes change with every image, and a graph's cannot"),
        ("SOLVER.WARMUP_UNTIL_ERROR", 0.0, "a detector has no training error"),
    ):
        if get_key(cfg, key) != off:
            raise ConfigError(f"{key} is {get_key(cfg, key)} ({origin(cfg, key)}), but {why}. Set it to {off}.")


def _check_datasets(cfg: CfgNode, *, training: bool) -> None:
    wanted = (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST))
    for key, entries in wanted if training else wanted[1:]:
        if not entries:
            raise ConfigError(f"{key} is empty. Give a registered name, FILE.json, or FILE.json:IMAGES.")
        for entry in entries:
            logger.info("%s: %d images", entry, len(datasets.check(cfg, entry)))
    if training:
        datasets.check_same_classes(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)


def _check_evaluable(cfg: CfgNode, weights: Checkpoint | None, file: str) -> None:
    """Evaluating alone needs a trained detector, of the classes of the data."""
    if not file:
        raise ConfigError("MODEL.WEIGHTS is empty, so --eval-only would test random weights. Name a checkpoint.")
    if weights is None:
        return
    if weights.metadata.kind == "classifier":
        raise ConfigError(
            f"{file} holds a classifier, but --eval-only needs a detector, written by tools/train_net.py."
        )
    theirs = list(weights.metadata.class_names)
    for entry in cfg.DATASETS.TEST:
        ours = list(MetadataCatalog.get(entry).get("thing_classes", ()))
        if theirs and ours and theirs != ours:
            raise ConfigError(
                f"the {len(theirs)} classes of {file} ({', '.join(theirs[:3])} …) are not the {len(ours)} of {entry} "
                f"({', '.join(ours[:3])} …). Evaluate on data with the same categories, in the same order."
            )


def _build_model(cfg: CfgNode, weights: Checkpoint | None, file: str) -> nn.Module:
    """The detector on its device, with all weights that it starts from."""
    try:
        with offered(weights, file):
            model = build_model(cfg)
    except (KeyError, AssertionError) as error:
        raise ConfigError(
            f"Detectron2 cannot build this configuration ({type(error).__name__}: {error}). Check that "
            "MODEL.{RPN,ROI_HEADS,FPN}.IN_FEATURES name features of the backbone "
            f"({cfg.MODEL.BACKBONE.NAME}, MODEL.RESNETS.OUT_FEATURES {', '.join(cfg.MODEL.RESNETS.OUT_FEATURES)})."
        ) from error
    load_whole(cfg, model, weights, file)
    if cfg.SOLVER.AMP.ENABLED:
        keep_boxes_in_float32(model)
    return model.to(memory_format=torch.channels_last)  # the layout that convolutions run fastest in


def _describe(
    cfg: CfgNode, model: nn.Module, source: Metadata | None, iterations: int, results: Mapping[str, float]
) -> Metadata:
    """What a checkpoint of this detector says about itself.

    Args:
        source: of the weights that training started from, where they had any.
        iterations: finished ones.
        results: of the evaluation.
    """
    own = is_own(cfg)
    norms = [m for m in model.modules() if is_frozen_norm(m) or isinstance(m, nn.modules.batchnorm._BatchNorm)]
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
        arguments=network_arguments(cfg, arguments_of(cfg.MODEL.NETWORK.NAME)) if own else stock_arguments(cfg),
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
