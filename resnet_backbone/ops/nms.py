"""Non-maximum suppression that stops at the number of boxes wanted, for a batch of images."""

import torch
from torch import Tensor
from torchvision.ops import boxes as reference

from resnet_backbone.ops.kernels import kernels_for

# torchvision shifts the classes of fewer boxes apart, which can change the last bit of an overlap.
FEW = 1000


@torch.library.custom_op("resnet_backbone::nms", mutates_args=())
def nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, top: int) -> tuple[Tensor, Tensor]:
    """Return the best boxes of each image that non-maximum suppression keeps: as many as are wanted, if there are.

    On a GPU, nothing waits for the device.

    Args:
        boxes: `(N, K, 4)` corners.
        scores: `(N, K)`; boxes with a score of minus infinity do not count.
        classes: `(N, K)` integers; boxes of different classes do not suppress each other.
        threshold: overlap (IoU) above which the worse box goes.
        top: how many boxes are wanted of an image, at most K.

    Returns:
        indices `(N, top)` by descending score, and whether there is a box `(N, top)`; where not, the index is 0.
    """
    if (kernels := kernels_for(boxes, "nms_kernels", "non-maximum suppression")) is not None:
        order = scores.argsort(dim=1, descending=True, stable=True)
        ordered = boxes.gather(1, order[:, :, None].expand(-1, -1, 4)).float()
        usable, kinds = scores.gather(1, order) > -torch.inf, classes.gather(1, order)
        with torch.cuda.device_of(boxes):
            places, counts = kernels.nms(ordered, usable, kinds, threshold, top)
        there = torch.arange(top, device=boxes.device) < counts[:, None]
        return order.gather(1, places).masked_fill(~there, 0), there
    indices = torch.zeros((len(boxes), top), dtype=torch.int64, device=boxes.device)
    there = torch.zeros_like(indices, dtype=torch.bool)
    for image, (box, score, kind) in enumerate(zip(boxes, scores, classes, strict=True)):
        usable = (score > -torch.inf).nonzero()[:, 0]
        kept = usable[batched_nms(box[usable], score[usable], kind[usable], threshold, top=top)]
        indices[image, : len(kept)] = kept
        there[image, : len(kept)] = True
    return indices, there


@nms.register_fake
def _(boxes, scores, classes, threshold, top):
    indices = boxes.new_empty((len(boxes), top), dtype=torch.int64)
    return indices, torch.empty_like(indices, dtype=torch.bool)


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
