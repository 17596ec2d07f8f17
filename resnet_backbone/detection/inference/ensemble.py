"""An ensemble (ResNet paper, appendix B): proposals of all detectors united, predictions for each region averaged."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor

from resnet_backbone.detection.inference.multiscale import Predictions


class Member(NamedTuple):
    """A detector besides the first one.

    Attributes:
        model: with the same classes.
        scale: of the images that it takes, compared with those of the first.
        swapped: whether it takes BGR where the first takes RGB, or the other way round.
    """

    model: GeneralizedRCNN
    scale: float = 1.0
    swapped: bool = False


def unite(proposals: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each image's regions `(R, 4)`, those of all detectors.

    Args:
        proposals: of each detector, the regions in each image.
    """
    return [torch.cat(of_image) for of_image in zip(*proposals, strict=True)]


def average(predictions: Sequence[Sequence[Predictions]]) -> list[Predictions]:
    """Return each image's mean boxes and mean scores, region by region.

    Where one detector has a box for each class and another one for all, each class gets the latter's.

    Args:
        predictions: of each detector, boxes and scores of each image's regions.
    """
    means = []
    for of_image in zip(*predictions, strict=True):
        boxes, scores = zip(*of_image, strict=True)
        columns = max(each.shape[1] for each in boxes)
        boxes = [each if each.shape[1] == columns else each.repeat(1, columns // 4) for each in boxes]
        means.append((torch.stack(boxes).mean(dim=0), torch.stack(scores).mean(dim=0)))
    return means
