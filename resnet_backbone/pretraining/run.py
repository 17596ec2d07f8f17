"""Pretrain a classifier by the configuration, end to end."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from torch import nn

from resnet_backbone.data.classification import evaluation_loader, train_loader
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.sources import open_source
from resnet_backbone.data.transforms import EvalTransform, TrainTransform
from resnet_backbone.engine.config import ConfigError, network_arguments
from resnet_backbone.engine.output import FINAL, open_output, read_last_checkpoint, versions, write_config
from resnet_backbone.engine.precise_bn import estimate_norm_statistics
from resnet_backbone.engine.schedule import rescale_for_batch
from resnet_backbone.engine.train import check_batch, choose_seed, train
from resnet_backbone.networks import build_network
from resnet_backbone.networks import network_arguments as arguments_of
from resnet_backbone.pretraining.evaluation import evaluate_classifier
from resnet_backbone.weights import Checkpoint, Metadata, load_state, read_checkpoint, write_checkpoint, write_json

logger = logging.getLogger(__name__)


def run(cfg: CfgNode, *, resume: bool = False, eval_only: bool = False) -> dict[str, float]:
    """Train, compute precise BN statistics, evaluate, write `model_final.pth`; return top-1 and top-5 in per cent.

    With SOLVER.MAX_ITER 0 the result is the initialised network with BN statistics from training images.

    Args:
        cfg: of `get_config()`, loaded by `engine.config.load_config`.
        resume: go on from the last checkpoint in OUTPUT_DIR.
        eval_only: evaluate MODEL.WEIGHTS on DATASETS.TEST and write nothing but the log.

    Raises:
        InputError: something in the configuration cannot be used; found before the first iteration.
    """
    check_batch(cfg)
    folder = open_output(cfg, resume=resume or eval_only)
    rescale_for_batch(cfg)
    last = read_last_checkpoint(folder) if resume else None
    choose_seed(cfg, last)
    torch.manual_seed(cfg.SEED)

    source, test_source = _open_sources(cfg)
    num_classes = cfg.MODEL.NETWORK.NUM_CLASSES or len(source.class_names)
    arguments = network_arguments(cfg, arguments_of(cfg.MODEL.NETWORK.NAME))
    model = build_network(cfg.MODEL.NETWORK.NAME, num_classes, **arguments)
    model = model.to(cfg.MODEL.DEVICE, memory_format=torch.channels_last)
    prepare = Normalise(cfg)
    if cfg.MODEL.WEIGHTS and last is None:
        weights = read_checkpoint(cfg.MODEL.WEIGHTS)
        logger.info("%s: %s", cfg.MODEL.WEIGHTS, weights.metadata.describe())
        logger.info(load_state(model, weights.model, part="network", source=cfg.MODEL.WEIGHTS))

    batches = _BatchFactory(cfg, source)
    evaluate = _Evaluator(cfg, model, test_source, prepare)
    evaluate.try_two_images()
    if eval_only:
        return evaluate()
    write_config(cfg, folder)

    def metadata(iterations: int, norm_statistics: str = "running", **origin: Any) -> Metadata:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return Metadata(
            kind="classifier",
            architecture=cfg.MODEL.NETWORK.NAME,
            arguments=arguments,
            channel_order=cfg.INPUT.FORMAT,
            pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
            pixel_std=tuple(cfg.MODEL.PIXEL_STD),
            norm_statistics=norm_statistics if norms else "none",
            norm_epsilon=norms[0].eps if norms else None,
            class_names=tuple(source.class_names),
            crop=tuple(cfg.INPUT.CROP.SIZE),
            origin={
                "written_by": versions(),
                "dataset": str(cfg.DATASETS.TRAIN[0]),
                "iterations": iterations,
                "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
                "seed": cfg.SEED,
                **origin,
            },
        )

    def compute(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]):
        images, labels = prepare(batch[0]), batch[1].to(cfg.MODEL.DEVICE, non_blocking=True)
        logits = model(images)
        wrong = (logits.detach().argmax(dim=1) != labels).float().mean()
        return {"loss_cls": F.cross_entropy(logits.float(), labels)}, {"top1_error": 100 * wrong}

    train(
        cfg,
        model=model,
        optimizer=build_optimizer(cfg, model),
        batches=batches,
        compute=compute,
        evaluate=evaluate,
        metadata=metadata,
        num_images=len(source),
        folder=folder,
        resume_from=last,
    )

    norm_statistics = "running" if cfg.SOLVER.MAX_ITER else "never"
    if cfg.TEST.PRECISE_BN.ENABLED:
        iterations = cfg.TEST.PRECISE_BN.NUM_ITER
        images = (prepare(images) for images, _ in itertools.islice(batches(0), iterations))
        if layers := estimate_norm_statistics(model, images, iterations):
            norm_statistics = "precise"
            logger.info("precise BN: %d layers over %d batches", layers, iterations)
    results = evaluate()
    if comm.is_main_process():
        final = metadata(cfg.SOLVER.MAX_ITER, norm_statistics, top1=results["top1"], top5=results["top5"])
        write_checkpoint(folder / FINAL, Checkpoint(model.state_dict(), final))
        write_json(folder / "results.json", results)
        logger.info("wrote %s: %s", folder / FINAL, final.describe())
    comm.synchronize()
    return results


class Normalise:
    """From uint8 images `(N, 3, H, W)` to the network's input: on the device, less the mean, by the deviation."""

    def __init__(self, cfg: CfgNode):
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.mean = torch.tensor(cfg.MODEL.PIXEL_MEAN, device=self.device).view(3, 1, 1)
        self.scale = 1 / torch.tensor(cfg.MODEL.PIXEL_STD, device=self.device).view(3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device, non_blocking=True).to(memory_format=torch.channels_last)
        return (images.float() - self.mean) * self.scale


class _BatchFactory:
    """Training batches of this process from any iteration on."""

    def __init__(self, cfg: CfgNode, source: ClassificationSource):
        crop = tuple(cfg.INPUT.CROP.SIZE)
        self._cfg = cfg
        self._source = source
        self._transform = TrainTransform(
            short_side=(min(cfg.INPUT.MIN_SIZE_TRAIN), max(cfg.INPUT.MIN_SIZE_TRAIN)),
            crop=crop,
            crop_type=cfg.INPUT.CROP.TYPE,
            flip=0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0,
            pca_std=cfg.INPUT.PCA_COLOR_STD,
            channel_order=cfg.INPUT.FORMAT,
        )

    def __call__(self, start_iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(
            train_loader(
                self._source,
                self._transform,
                batch_size=self._cfg.SOLVER.IMS_PER_BATCH,
                seed=self._cfg.SEED,
                start_iteration=start_iteration,
                workers=self._cfg.DATALOADER.NUM_WORKERS,
                rank=comm.get_rank(),
                world_size=comm.get_world_size(),
                pin_memory=self._cfg.MODEL.DEVICE.startswith("cuda"),
            )
        )


class _Evaluator:
    """Accuracy on DATASETS.TEST, and the same on two images to find out early whether it will work."""

    def __init__(self, cfg: CfgNode, model: nn.Module, source: ClassificationSource, prepare: Normalise):
        self._cfg = cfg
        self._model = model
        self._source = source
        self._prepare = prepare
        self._transform = EvalTransform(
            short_side=cfg.INPUT.MIN_SIZE_TEST, crop=tuple(cfg.INPUT.CROP.SIZE), channel_order=cfg.INPUT.FORMAT
        )

    def __call__(self) -> dict[str, float]:
        results = evaluate_classifier(self._model, self._loader(self._cfg.DATALOADER.NUM_WORKERS), self._prepare)
        logger.info("top-1 %.2f %%, top-5 %.2f %% of %d images", results["top1"], results["top5"], results["images"])
        return results

    def try_two_images(self) -> None:
        images, labels = next(iter(self._loader(workers=0)))
        evaluate_classifier(self._model, [(images[:2], labels[:2])], self._prepare)

    def _loader(self, workers: int):
        return evaluation_loader(
            self._source,
            self._transform,
            batch_size=self._cfg.TEST.IMS_PER_BATCH or self._cfg.SOLVER.IMS_PER_BATCH,
            workers=workers,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )


def _open_sources(cfg: CfgNode) -> tuple[ClassificationSource, ClassificationSource]:
    """Training and test data, checked against each other and the configuration."""
    for key, names in (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        if len(names) != 1:
            raise ConfigError(
                f"{key} is {names or 'empty'}, expected one entry: a folder of class folders, a quoted shard pattern such "
                "as 'train-{000000..000007}.tar', or imagenet_train."
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
    logger.info("%s: %d images, %d classes", cfg.DATASETS.TRAIN[0], len(source), len(source.class_names))
    logger.info("%s: %d images", cfg.DATASETS.TEST[0], len(test_source))
    return source, test_source
