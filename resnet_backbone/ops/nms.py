"""Non-maximum suppression that stops at the number of boxes wanted, for a batch of images."""

import torch
from torch import Tensor
from torchvision.ops import boxes as reference

from resnet_backbone.ops.kernels import kernels_for

# torchvision shifts the classes of fewer boxes apart, which can change the last bit of an overlap.
FEW = 1000
# Pairs of kept and new boxes to compare at a time: their overlaps stay in a core's cache.
PAIRS = 2**18


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

    Whether a box is kept depends on better ones alone, so the worst need not be looked at. On a CPU, torchvision's
    suppression runs on twice as many boxes as are wanted. While that is not enough, a few more at a time are compared
    with those kept, and then with each other.

    Args:
        boxes: `(N, 4)` corners.
        scores: `(N,)`.
        classes: `(N,)` integers; boxes of different classes do not suppress each other.
        threshold: overlap (IoU) above which the worse box goes.
    """
    if boxes.is_cuda or len(boxes) <= max(FEW, 2 * top):
        return reference.batched_nms(boxes, scores, classes, threshold)[:top]
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    kept = torch.zeros_like(classes, dtype=torch.bool)
    start, stop, found = 0, 2 * top, 0
    while start < len(order) and found < top:
        for each in classes[start:stop].unique():
            mine = start + (classes[start:stop] == each).nonzero()[:, 0]
            if start:
                better = (kept[:start] & (classes[:start] == each)).nonzero()[:, 0]
                mine = mine[~_overlap_any(boxes[mine], boxes[better], threshold)]
            kept[mine[reference.nms(boxes[mine], scores[mine], threshold)]] = True
        found = int(kept.sum())
        start, stop = stop, stop + PAIRS // found
    return order[kept.nonzero()[:top, 0]]


def _overlap_any(boxes: Tensor, others: Tensor, threshold: float) -> Tensor:
    """Return which of the boxes overlap any of the others by more than a threshold, as torchvision computes it.

    Corner by corner and in place, which takes less than half the time of its `box_iou`.
    """
    left, top, right, bottom = boxes.unbind(1)
    lefts, tops, rights, bottoms = others[:, :, None].unbind(1)
    width = torch.minimum(right, rights).sub_(torch.maximum(left, lefts)).clamp_(min=0)
    height = torch.minimum(bottom, bottoms).sub_(torch.maximum(top, tops)).clamp_(min=0)
    shared = width.mul_(height)
    areas = (right - left) * (bottom - top) + (rights - lefts) * (bottoms - tops)
    overlap = shared.div_(areas.sub_(shared))
    # It compares in double precision; torch rounds the threshold to the dtype of the boxes, which may make it larger.
    rounded = torch.tensor(threshold, dtype=boxes.dtype).item()
    return (overlap >= rounded if rounded > threshold else overlap > rounded).any(dim=0)
