"""Iterative box refinement (ResNet paper, appendix B): regions that are predicted once more, from where they moved."""

import torch
from detectron2.structures import Boxes
from torch import Tensor


def regressed_regions(boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Return the boxes to pool again, `(R', 4)`: `best_boxes`, clipped to the image.

    Boxes that are not finite or have no area are left out.

    Args:
        boxes, scores: see `best_boxes`.
        image_size: height and width.
    """
    regressed = best_boxes(boxes, scores)
    clipped = Boxes(regressed[regressed.isfinite().all(dim=1) & scores.isfinite().all(dim=1)])
    clipped.clip(image_size)
    return clipped[clipped.nonempty()].tensor


def best_boxes(boxes: Tensor, scores: Tensor) -> Tensor:
    """Return the regressed box of each region's best class, `(R, 4)`, even of a region that is rather background.

    Args:
        boxes: one for each class, `(R, 4K)`, or one for all classes, `(R, 4)`.
        scores: one for each class and one for the background, `(R, K + 1)`.
    """
    by_class = boxes.unflatten(1, (-1, 4))
    if by_class.shape[1] == 1:
        return by_class[:, 0]
    best = scores[:, :-1].argmax(dim=1)
    return by_class[torch.arange(len(best), device=best.device), best]
