"""Pretrain a classifier by the configuration, end to end."""

import itertools
import logging

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.sources import open_source
from resnet_backbone.data.subset import hold_out
from resnet_backbone.engine.config import ConfigError, fill_from_metadata, origin, set_key
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.output import FINAL, open_output, read_last_checkpoint, versions, write_config
from resnet_backbone.engine.precise_bn import estimate_norm_statistics
from resnet_backbone.engine.precision import precision_of
from resnet_backbone.engine.pretrained import command_line_overrides, read_with_overrides
from resnet_backbone.engine.schedule import rescale_for_batch
from resnet_backbone.engine.train import check_batch, check_solver, choose_seed, train
from resnet_backbone.networks import FrozenBatchNorm2d
from resnet_backbone.pretraining.batches import Normalise, TrainBatches, crop_size
from resnet_backbone.pretraining.evaluation import Evaluator, load_ensemble
from resnet_backbone.pretraining.losses import ClassificationLosses
from resnet_backbone.pretraining.network import build_classifier
from resnet_backbone.weights import Checkpoint, Metadata, load_state, write_checkpoint, write_json

logger = logging.getLogger(__name__)


def run(cfg: CfgNode, *, resume: bool = False, eval_only: bool = False) -> dict[str, float]:
    """Train, compute precise BN statistics, evaluate, write `model_final.pth`; return top-1 and top-5 in per cent.

    With SOLVER.MAX_ITER 0 the result is the initialised network with BN statistics from training images.

    Args:
        cfg: of `get_config()`, loaded by `engine.config.load_config`.
        resume: go on from the last checkpoint in OUTPUT_DIR, or from MODEL.WEIGHTS where there is none.
        eval_only: evaluate on DATASETS.TEST what a run would start from, and write nothing but the log.

    Raises:
        InputError: something in the configuration cannot be used; found before the first iteration.
    """
    check_batch(cfg)
    check_solver(cfg)
    if cfg.TEST.ENSEMBLE and not eval_only:
        raise ConfigError(
            f"TEST.ENSEMBLE names {len(cfg.TEST.ENSEMBLE)} networks, but a training run tests the one that it trains. "
            "Add --eval-only, or leave TEST.ENSEMBLE empty."
        )
    folder = open_output(cfg, resume=resume or eval_only)
    rescale_for_batch(cfg)
    last = read_last_checkpoint(folder) if resume else None
    choose_seed(cfg, last)
    torch.manual_seed(cfg.SEED)

    source, test_source = _open_sources(cfg)
    weights = _read_weights(cfg, last, test_source, eval_only=eval_only)
    model, arguments = _build_model(cfg, weights, len(source.class_names))
    norms = [m for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d))]
    loaded_statistics = "never" if weights is None else weights.metadata.norm_statistics
    del weights  # a copy of the network and of the optimizer's state

    def metadata(iterations: int, *, precise: bool = False, **results: float) -> Metadata:
        statistics = loaded_statistics
        if precise:
            statistics = "precise"
        elif iterations and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norms):
            statistics = "running"
        return Metadata(
            kind="classifier",
            architecture=cfg.MODEL.NETWORK.NAME,
            arguments=arguments,
            channel_order=cfg.INPUT.FORMAT,
            pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
            pixel_std=tuple(cfg.MODEL.PIXEL_STD),
            norm_statistics=statistics if norms else "none",
            norm_epsilon=norms[0].eps if norms else None,
            class_names=tuple(source.class_names),
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

    metadata(0)  # refuses now, not at the first checkpoint, a preprocessing that no checkpoint could state
    prepare = Normalise(cfg)
    batches = TrainBatches(cfg, source)
    evaluate = Evaluator(cfg, test_source, prepare, ensemble=load_ensemble(cfg, test_source.class_names))
    evaluate.try_two_images(model)
    if eval_only:
        return evaluate(model)
    write_config(cfg, folder)

    losses = ClassificationLosses(cfg, batches.images_of)
    trained = train(
        cfg,
        model=model,
        optimizer=build_optimizer(cfg, model),
        batches=batches,
        compute=losses,
        evaluate=evaluate,
        metadata=metadata,
        num_images=len(source),
        folder=folder,
        resume_from=last,
        best_metric="top1",
        names=batches.names,
        compiled=losses,
    )

    precise = False
    if cfg.TEST.PRECISE_BN.ENABLED:
        iterations = cfg.TEST.PRECISE_BN.NUM_ITER
        images = (prepare(batches.images_of(batch)[0]) for batch in itertools.islice(batches(0), iterations))
        if layers := estimate_norm_statistics(trained, images, iterations, precision=precision_of(cfg)):
            precise = True
            logger.info("precise BN: %d layers over %d batches", layers, iterations)
    results = evaluate(trained)
    if comm.is_main_process():
        final = metadata(cfg.SOLVER.MAX_ITER, precise=precise, top1=results["top1"], top5=results["top5"])
        write_checkpoint(folder / FINAL, Checkpoint(trained.state_dict(), final))
        write_json(folder / "results.json", results)
        logger.info("wrote %s: %s", folder / FINAL, final.describe())
    comm.synchronize()
    return results


def _open_sources(cfg: CfgNode) -> tuple[ClassificationSource, ClassificationSource]:
    """Training and test data, checked against each other and the configuration."""
    for key, names in (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        if len(names) != 1:
            raise ConfigError(
                f"{key} is {names or 'empty'}, expected one entry: a folder of class folders, a quoted shard pattern "
                "such as 'train-{000000..000007}.tar', imagenet_train or cifar10_train."
            )
    source, test_source = open_source(cfg.DATASETS.TRAIN[0]), open_source(cfg.DATASETS.TEST[0])
    if list(source.class_names) != list(test_source.class_names):
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
    tested = cfg.DATASETS.TEST[0]
    if cfg.DATASETS.HOLD_OUT:
        source, test_source = hold_out(source, cfg.DATASETS.HOLD_OUT)
        tested = f"held out of {cfg.DATASETS.TRAIN[0]}"
    logger.info("%s: %d images, %d classes", cfg.DATASETS.TRAIN[0], len(source), len(source.class_names))
    logger.info("%s: %d images", tested, len(test_source))
    return source, test_source


def _read_weights(
    cfg: CfgNode, last: Checkpoint | None, test_source: ClassificationSource, *, eval_only: bool
) -> Checkpoint | None:
    """What the network starts from, its preprocessing entered into `cfg`; None for random weights."""
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
    if "pool5" in weights.metadata.arguments and origin(cfg, "MODEL.NETWORK.POOL5") is None:
        # Who sets it may: the same weights serve larger crops with the pooling and smaller ones without.
        set_key(cfg, "MODEL.NETWORK.POOL5", weights.metadata.arguments["pool5"], f"metadata of {file}")
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
    """The network on its device, with the weights that it starts from, and the arguments that it was built with."""
    model, arguments = build_classifier(cfg, num_classes)
    if weights is not None:
        file = cfg.MODEL.WEIGHTS if weights.trainer is None else "the last checkpoint"
        logger.info(load_state(model, weights.model, part="network", source=file))
    elif any(isinstance(module, FrozenBatchNorm2d) for module in model.modules()):
        raise ConfigError(
            f"MODEL.RESNETS.NORM is FrozenBN ({origin(cfg, 'MODEL.RESNETS.NORM') or 'default'}), which on random "
            "weights is the identity and is never trained. Set it to BN."
        )
    return model.to(cfg.MODEL.DEVICE, memory_format=torch.channels_last), arguments
