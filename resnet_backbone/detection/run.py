"""Train or evaluate a detector by the configuration, end to end."""

import contextlib
import difflib
import logging
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
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
from resnet_backbone.detection.pretrained import (
    check_frozen_norms,
    forget_pretrained,
    is_frozen_norm,
    read_pretrained,
)
from resnet_backbone.engine.config import (
    ConfigError,
    fill_from_metadata,
    get_key,
    network_arguments,
    origin,
    set_key,
)
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.output import FINAL, LAST, open_output, read_last_checkpoint, versions, write_config
from resnet_backbone.engine.schedule import rescale_for_batch
from resnet_backbone.engine.train import check_batch, check_solver, choose_seed, train
from resnet_backbone.networks import accepted_arguments
from resnet_backbone.weights import (
    Checkpoint,
    CheckpointError,
    Metadata,
    load_state,
    read_checkpoint,
    write_checkpoint,
    write_json,
)

logger = logging.getLogger(__name__)

OWN_BACKBONES = ("build_network_backbone", "build_network_fpn_backbone", "build_network_retinanet_fpn_backbone")
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

    weights, file = _read_weights(cfg, last, folder)
    _check_datasets(cfg, training=not eval_only)
    if eval_only:
        _check_evaluable(cfg, weights, file)
    model = _build_model(cfg, weights, file)
    logger.info(describe_frozen(model))
    source = None if weights is None else weights.metadata
    del weights  # a copy of the model and of the optimizer's state
    forget_pretrained()

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


def _is_own(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in OWN_BACKBONES


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
    cfg: CfgNode, model: nn.Module, source: Metadata | None, iterations: int, results: Mapping[str, float]
) -> Metadata:
    """What a checkpoint of this detector says about itself.

    Args:
        source: of the weights that training started from, where they had any.
        iterations: finished ones.
        results: of the evaluation.
    """
    own = _is_own(cfg)
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
        arguments=network_arguments(cfg, accepted_arguments(cfg.MODEL.NETWORK.NAME)) if own else _stock_arguments(cfg),
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


def _stock_arguments(cfg: CfgNode) -> dict[str, Any]:
    """What metadata says of a backbone that Detectron2 built from its own keys."""
    return {"width": cfg.MODEL.NETWORK.WIDTH, "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1}
