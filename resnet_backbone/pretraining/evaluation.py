"""Accuracy of a classifier or an ensemble."""

import contextlib
import datetime
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from resnet_backbone.data.classification import evaluation_loader
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.resident import ResidentEvaluation
from resnet_backbone.data.sampler import EvaluationSampler
from resnet_backbone.data.transforms import EvalTransform
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.precision import autocast, precision_of
from resnet_backbone.networks import build_network
from resnet_backbone.pretraining.multi_crop import (
    CropGroup,
    EvaluationCrops,
    build_evaluation_crops,
    collate,
    log_probabilities,
)
from resnet_backbone.pretraining.preprocessing import Normalize, crop_size
from resnet_backbone.weights import Metadata, MissingMetadata, load_state, read_weights

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
# Limit on the size of one load of images with multiple crops or scales; a worker holds several loads.
LOAD_BYTES = 64 * 2**20


class Member(NamedTuple):
    """A classifier and its preprocessing, from uint8 images in INPUT.FORMAT order to its input on its device."""

    model: nn.Module
    prepare: Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def evaluate_classifier(
    members: Sequence[Member],
    batches: Iterable[tuple[torch.Tensor | Sequence[CropGroup], torch.Tensor]],
    *,
    dense: bool = False,
    max_pixels: int | None = None,
    precision: str = "fp32",
    images: int = 0,
) -> dict[str, float]:
    """Return the accuracy over all images of all processes; each image counts once.

    An image's prediction is the mean softmax probability over members and crops.

    Args:
        members: run in eval mode, then restored to their previous mode; on the same device, with the same classes.
        batches: this process's images, `(N, 3, H, W)` uint8 or groups of their crops, and labels `(N,)`.
        dense, max_pixels: see `log_probabilities`.
        precision: "fp32", or "bf16" or "fp16" for autocast. Probabilities are always computed in float64.
        images: number of images in `batches`, for progress logs.

    Returns:
        "top1" and "top5" in percent, "test_loss" (the mean cross entropy) and "images" (the number counted).
    """
    device = next(members[0].model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with contextlib.ExitStack() as stack:
        for model, _ in members:
            stack.enter_context(_eval_mode(model))
        stack.enter_context(autocast(precision, device))
        for crops, labels in _with_progress(batches, images):
            groups = [CropGroup(crops, torch.arange(len(crops)))] if isinstance(crops, torch.Tensor) else crops
            predictions = [
                log_probabilities(model, prepare, groups, len(labels), dense=dense, max_pixels=max_pixels)
                for model, prepare in members
            ]
            predicted = torch.stack(predictions).logsumexp(0) - math.log(len(members))
            labels = labels.to(device, non_blocking=True)
            best = predicted.topk(min(5, predicted.shape[1]), dim=1).indices == labels[:, None]
            loss = -predicted.gather(1, labels[:, None])
            sums += torch.stack([best[:, 0].sum(), best.sum(), loss.sum(), torch.tensor(len(labels), device=device)])
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(sums)
    top1, top5, loss, count = sums.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "test_loss": loss / count, "images": count}


class Evaluator:
    """Measure accuracy on a data set, or try its first two images to fail early.

    Args:
        source: the images.
        prepare: turns them into the evaluated network's input.
        ensemble: additional classifiers whose predictions are averaged with the network's (`load_ensemble`).
        crops: the crops to take from each image.
        max_pixels: maximum pixels per forward pass (see `log_probabilities`).
        batch_size: number of images that this process loads at once.
        workers: number of worker processes.
        device: the networks' device.
        keep_on_device: load the images once and keep them on the device; needs `crops` to give one crop of fixed size.
        precision: "fp32", "bf16" or "fp16".
        rank, world_size: determine this process's share of the images.
    """

    def __init__(
        self,
        *,
        source: ClassificationSource,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        ensemble: Sequence[Member] = (),
        crops: EvaluationCrops,
        max_pixels: int,
        batch_size: int,
        workers: int,
        device: torch.device | str,
        keep_on_device: bool,
        precision: str,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._source = source
        self._prepare = prepare
        self._ensemble = list(ensemble)
        self._crops = crops
        self._max_pixels = max_pixels
        self._batch_size = batch_size
        self._workers = workers
        self._device = torch.device(device)
        self._keep_on_device = keep_on_device
        self._precision = precision
        self._share = {"rank": rank, "world_size": world_size}
        self._kept: ResidentEvaluation | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Evaluate the network, together with the ensemble if there is one."""
        images = EvaluationSampler(len(self._source), batch_size=1, **self._share)
        with torch.compiler.set_stance("force_eager"):  # shapes differ from training
            results = self._evaluate(model, self._batches(), images=len(images))
        logger.info(
            "top-1 %.2f%%, top-5 %.2f%%, cross entropy %.4f of %d images (%s, %s%s)",
            *results.values(),
            self._crops.description,
            self._precision,
            f", {1 + len(self._ensemble)} networks" if self._ensemble else "",
        )
        return results

    def try_two_images(self, model: nn.Module) -> None:
        """Evaluate two images in this process, to find problems before training."""
        # Processes without images take part too: the others wait for their counts.
        self._evaluate(model, itertools.islice(self._loader(2, workers=0), 1))

    def _batches(self) -> Iterable:
        if not self._keep_on_device:
            return self._loader(self._batch_size, self._workers)
        if self._kept is None:
            self._kept = ResidentEvaluation(
                self._source, self._crops.transform, batch_size=self._batch_size, device=self._device, **self._share
            )
        return self._kept

    def _evaluate(self, model: nn.Module, batches: Iterable, images: int = 0) -> dict[str, float]:
        return evaluate_classifier(
            [Member(model, self._prepare), *self._ensemble],
            batches,
            dense=self._crops.dense,
            max_pixels=self._max_pixels,
            precision=self._precision,
            images=images,
        )

    def _loader(self, batch_size: int, workers: int) -> DataLoader:
        return evaluation_loader(
            self._source,
            self._crops.transform,
            batch_size=batch_size,
            workers=workers,
            pin_memory=self._device.type == "cuda",
            collate_samples=collate,
            **self._share,
        )


def build_evaluator(
    cfg: CfgNode,
    source: ClassificationSource,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    *,
    ensemble: Sequence[Member] = (),
) -> Evaluator:
    """Return the evaluator configured by INPUT and TEST, for this process's share of `source`.

    Args:
        prepare: turns images in INPUT.FORMAT order into the evaluated network's input.
        ensemble: see `Evaluator`.

    Raises:
        ConfigError: a key of INPUT or TEST has an unusable value.
    """
    crops = build_evaluation_crops(cfg)
    height, width = crop_size(cfg)
    world_size = comm.get_world_size()
    # TEST.IMS_PER_BATCH is the total over all processes.
    batch_size = max(1, (cfg.TEST.IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH) // world_size)
    max_pixels = batch_size * height * width
    if crops.pixels > height * width:
        batch_size = min(batch_size, max(1, LOAD_BYTES // (3 * crops.pixels)))
    return Evaluator(
        source=source,
        prepare=prepare,
        ensemble=ensemble,
        crops=crops,
        max_pixels=max_pixels,
        batch_size=batch_size,
        workers=cfg.DATALOADER.NUM_WORKERS,
        device=cfg.MODEL.DEVICE,
        keep_on_device=cfg.DATALOADER.PIPELINE == "resident" and type(crops.transform) is EvalTransform,
        precision=precision_of(cfg),
        rank=comm.get_rank(),
        world_size=world_size,
    )


def load_ensemble(cfg: CfgNode, class_names: Sequence[str]) -> list[Member]:
    """Load the classifiers in TEST.ENSEMBLE onto MODEL.DEVICE, each built and preprocessed according to its metadata.

    Raises:
        ConfigError: a file is not a classifier of `class_names`, or does not describe its preprocessing.
        CheckpointError: a file cannot be read.
    """
    channel_order, device = cfg.INPUT.FORMAT, cfg.MODEL.DEVICE
    members = []
    for file in cfg.TEST.ENSEMBLE:
        try:
            weights = read_weights(file).checkpoint
        except MissingMetadata as error:
            raise ConfigError(
                f"TEST.ENSEMBLE: {error.fact} Convert the file with tools/convert_weights.py, which takes the rest as "
                "flags."
            ) from error
        metadata = weights.metadata
        logger.info("%s: %s", file, metadata.describe())
        if metadata.kind != "classifier":
            raise ConfigError(f"TEST.ENSEMBLE: {file} holds a {metadata.kind}, expected a classifier.")
        theirs = list(metadata.class_names)
        if "converted_from" in metadata.origin and len(theirs) == len(class_names):
            logger.info("%s does not name its classes; they are taken for those of DATASETS.TEST, in their order", file)
        elif difference := _difference(theirs, list(class_names)):
            raise ConfigError(
                f"TEST.ENSEMBLE: {file} has {difference} of DATASETS.TEST. Predictions can be averaged where all "
                "networks have the same classes in the same order."
            )
        model = build_network(metadata.architecture, len(theirs), **metadata.arguments)
        logger.info(load_state(model, weights.model, part="network", source=file))
        model = model.to(device, memory_format=torch.channels_last).eval()
        members.append(Member(model, _preparation(metadata, channel_order=channel_order, device=device)))
    return members


def _preparation(
    metadata: Metadata, *, channel_order: str, device: torch.device | str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the preprocessing of the network that `metadata` describes, for images in the given channel order."""
    normalize = Normalize(mean=metadata.pixel_mean, std=metadata.pixel_std, device=device)
    if metadata.channel_order == channel_order:
        return normalize
    return lambda images: normalize(images.flip(1))


def _difference(theirs: list[str], ours: list[str]) -> str:
    """Describe how two lists of class names differ; empty if they do not."""
    if len(theirs) != len(ours):
        return f"{len(theirs)} classes, not the {len(ours)}"
    for number, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        if one != other:
            return f"{one!r} as class {number}, not the {other!r}"
    return ""


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _with_progress(batches: Iterable[tuple], images: int) -> Iterator[tuple]:
    """Yield the batches; about every 10 seconds, log how many of `images` are done and the estimated time left."""
    start = last = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[1])
        now = time.monotonic()
        if comm.is_main_process() and now - last >= PROGRESS_SECONDS and done < images:
            last = now
            eta = datetime.timedelta(seconds=round((now - start) / done * (images - done)))
            logger.info("evaluation: %d of %d images of this process, eta %s", done, images, eta)
