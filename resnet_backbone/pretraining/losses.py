"""What a classifier is trained by."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from resnet_backbone.engine.trainer import Losses
from resnet_backbone.pretraining.batches import Normalise

ImagesOf = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


def classification_losses(cfg: CfgNode, images_of: ImagesOf) -> Callable[[nn.Module, Any], tuple[Losses, Losses]]:
    """The function from a network and a batch to its cross entropy and, for the log, its training error in per cent.

    Args:
        images_of: from a batch to images `(n, 3, H, W)` uint8 and labels `(n,)` on the device.
    """
    prepare = Normalise(cfg)

    def compute(model: nn.Module, batch: Any) -> tuple[Losses, Losses]:
        images, labels = images_of(batch)
        logits = model(prepare(images)).float()
        wrong = (logits.detach().argmax(dim=1) != labels).float().mean()
        loss = F.cross_entropy(logits, labels, label_smoothing=cfg.SOLVER.LABEL_SMOOTHING)
        return {"loss_cls": loss}, {"top1_error": 100 * wrong}

    return compute
