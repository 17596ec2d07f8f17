"""The training loss of a classifier."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from resnet_backbone.engine.nonfinite import Losses

ImagesOf = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


class ClassificationLosses:
    """Compute the cross entropy of a network on a batch and, for the log, the training error in percent.

    Args:
        images_of: turns a batch into images `(n, 3, H, W)` uint8 and labels `(n,)` on the device.
        normalize: turns these images into the network's input.
        label_smoothing: the fraction of a label's weight that is spread over all classes.
    """

    def __init__(
        self, *, images_of: ImagesOf, normalize: Callable[[torch.Tensor], torch.Tensor], label_smoothing: float = 0.0
    ):
        self._images_of = images_of
        self._normalize = normalize
        self._label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Losses, Losses]:
        images, labels = self._images_of(batch)
        return self._step(model, images, labels)

    def compile(self) -> None:
        """Compile everything from uint8 images to loss together; the network itself stays uncompiled for other uses."""
        self._step = torch.compile(self._step)

    def _step(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[Losses, Losses]:
        logits = model(self._normalize(images)).float()
        wrong = (logits.detach().argmax(dim=1) != labels).float().mean()
        loss = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        return {"loss_cls": loss}, {"top1_error": 100 * wrong}
