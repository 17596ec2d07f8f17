"""Non-maximum suppression that stops at the number of boxes wanted."""

import torch
from torch import Tensor
from torchvision.ops import boxes as reference

# torchvision shifts the classes of fewer boxes apart, which can change the last bit of an overlap.
FEW = 1000


def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, *, top: int) -> Tensor:
    """Return the indices of the first `top` boxes that torchvision's `batched_nms` keeps, by descending score.

    Whether a box is kept depends on better ones alone, so the worst need not be looked at: on a CPU, suppression runs
    on twice as many boxes as are wanted, and on twice as many again until that is enough.

    Args:
        boxes: `(N, 4)` corners.
        scores: `(N,)`.
        classes: `(N,)` integers; boxes of different classes do not suppress each other.
        threshold: overlap (IoU) above which the worse box goes.
    """
    if boxes.is_cuda or len(boxes) <= max(FEW, 2 * top):
        return reference.batched_nms(boxes, scores, classes, threshold)[:top]
    order = scores.argsort(descending=True, stable=True)
    size = 2 * top
    while True:
        part = order[:size]
        kept = _nms_by_class(boxes[part], scores[part], classes[part], threshold)
        if len(kept) >= top or size >= len(order):
            return part[kept[:top]]
        size *= 2


def _nms_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Return the kept indices in ascending order."""
    kept = torch.zeros_like(classes, dtype=torch.bool)
    for each in classes.unique():
        mine = (classes == each).nonzero()[:, 0]
        kept[mine[reference.nms(boxes[mine], scores[mine], threshold)]] = True
    return kept.nonzero()[:, 0]
