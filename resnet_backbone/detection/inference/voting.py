"""From predictions for regions to detections of one image: candidates, and the boxes that they vote for."""

from typing import NamedTuple

import torch
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import box_iou

OVERLAP = 0.5  # IoU from which on a candidate votes (Gidaris and Komodakis, arXiv 1505.01749, bounding box voting)


class Candidates(NamedTuple):
    """What may become a detection: one box, one score and one class each.

    Attributes:
        boxes: `(M, 4)` corners in pixels, inside the image.
        scores: `(M,)`, above 0.
        classes: `(M,)` integers.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def find_candidates(boxes: Tensor, scores: Tensor, image_size: tuple[int, int], threshold: float) -> Candidates:
    """Return the pairs of region and class with a score above a threshold, region by region.

    Regions with a value that is not finite are left out, as Detectron2 leaves them out.

    Args:
        boxes: of each region, one for each class, `(R, 4K)`, or one for all classes, `(R, 4)`.
        scores: of each region, one for each class and one for the background, `(R, K + 1)`.
        image_size: height and width, to which boxes are clipped.
        threshold: at least 0.
    """
    finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    clipped = Boxes(boxes[finite].reshape(-1, 4))
    clipped.clip(image_size)
    by_class = clipped.tensor.view(int(finite.sum()), boxes.shape[1] // 4, 4)
    foreground = scores[finite, :-1]
    regions, classes = (foreground > threshold).nonzero(as_tuple=True)
    place = classes if by_class.shape[1] > 1 else torch.zeros_like(classes)
    return Candidates(by_class[regions, place], foreground[regions, classes], classes)


def vote(kept: Tensor, candidates: Candidates) -> Tensor:
    """Return the boxes that candidates vote for in place of those that non-maximum suppression has kept, `(N, 4)`.

    A box becomes the average of all candidates of its class that overlap it by at least OVERLAP, itself among them,
    weighted by their scores. A box without area overlaps nothing and stays.

    Args:
        kept: `(N,)`, indices of candidates.
    """
    boxes, scores, classes = candidates
    voters = (box_iou(boxes[kept], boxes) >= OVERLAP) & (classes[kept][:, None] == classes)
    # In float64, since a product of float32 matrices may run in TF32 or bfloat16, which are pixels off.
    weights = voters * scores.double()
    average = weights @ boxes.double() / weights.sum(dim=1, keepdim=True)
    return torch.where(voters.any(dim=1, keepdim=True), average.to(boxes.dtype), boxes[kept])
