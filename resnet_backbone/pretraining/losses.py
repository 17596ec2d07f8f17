"""What a classifier is trained by."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from resnet_backbone.engine.nonfinite import Losses

ImagesOf = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


class ClassificationLosses:
    """Compute, from a network and a batch, the cross entropy and, for the log, the training error in percent.

    Args:
        images_of: from a batch to images `(n, 3, H, W)` uint8 and labels `(n,)` on the device.
        normalize: from such images to the network's input.
        label_smoothing: the share of a label that is spread over all classes.
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
        """Compile all from the uint8 images to the loss as one; the network itself stays as it is for other uses."""
        self._step = torch.compile(self._step)

    def _step(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[Losses, Losses]:
        logits = model(self._normalize(images)).float()
        wrong = (logits.detach().argmax(dim=1) != labels).float().mean()
        loss = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        return {"loss_cls": loss}, {"top1_error": 100 * wrong}
