"""Accuracy of a classifier."""

import itertools
import logging
from collections.abc import Callable, Iterable

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from resnet_backbone.data.classification import evaluation_loader
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.transforms import EvalTransform
from resnet_backbone.pretraining.batches import Normalise, as_config_error, crop_size

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    prepare: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in per cent over all images of all processes; each image counts once.

    Args:
        model: images to logits; evaluated in eval mode, its training mode is restored.
        batches: this process's images `(N, 3, H, W)`, uint8, and labels `(N,)`.
        prepare: from uint8 images to what the model is fed, on its device.

    Returns:
        "top1" and "top5" in per cent, and "images", how many were counted.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in batches:
        logits = model(prepare(images))
        labels = labels.to(device)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack([best[:, 0].sum(), best.sum(), torch.tensor(len(labels), device=device)])
    model.train(was_training)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(counts)
    top1, top5, images = counts.tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": images}


class Evaluator:
    """Accuracy on DATASETS.TEST, and the same on two images to find out early whether it will work."""

    def __init__(self, cfg: CfgNode, model: nn.Module, source: ClassificationSource, prepare: Normalise):
        self._cfg = cfg
        self._model = model
        self._source = source
        self._prepare = prepare
        with as_config_error("INPUT"):
            self._transform = EvalTransform(
                short_side=cfg.INPUT.MIN_SIZE_TEST, crop=crop_size(cfg), channel_order=cfg.INPUT.FORMAT
            )

    def __call__(self) -> dict[str, float]:
        # TEST.IMS_PER_BATCH counts over all processes, a loader's batch is its process's share.
        images = self._cfg.TEST.IMS_PER_BATCH or self._cfg.SOLVER.IMS_PER_BATCH
        loader = self._loader(max(1, images // comm.get_world_size()), self._cfg.DATALOADER.NUM_WORKERS)
        results = evaluate_classifier(self._model, loader, self._prepare)
        logger.info("top-1 %.2f %%, top-5 %.2f %% of %d images", results["top1"], results["top5"], results["images"])
        return results

    def try_two_images(self) -> None:
        # A process without images takes part all the same: the others wait for its counts.
        evaluate_classifier(self._model, itertools.islice(self._loader(2, workers=0), 1), self._prepare)

    def _loader(self, batch_size: int, workers: int) -> DataLoader:
        return evaluation_loader(
            self._source,
            self._transform,
            batch_size=batch_size,
            workers=workers,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            pin_memory=self._cfg.MODEL.DEVICE.startswith("cuda"),
        )
