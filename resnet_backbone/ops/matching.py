"""Boxes matched to ground truth by overlap, without asking the device for a value."""

from collections.abc import Sequence

import torch
from torch import Tensor


def match(
    overlaps: Tensor, thresholds: Sequence[float], labels: Sequence[int], *, allow_low_quality: bool
) -> tuple[Tensor, Tensor]:
    """Match each box to the ground truth that it overlaps most, and label it by that overlap.

    Args:
        overlaps: `(G, A)`, the IoU of each ground truth with each box.
        thresholds: ascending; box with an overlap in `[thresholds[i], thresholds[i + 1])` gets `labels[i]`.
        labels: one less than thresholds.
        allow_low_quality: also label 1 the boxes that overlap a ground truth most, whatever the overlap
            (Faster R-CNN, section 3.1.2, case i).

    Returns:
        the index of a ground truth for each box `(A,)` int64, and labels `(A,)` int8; without ground truth, zeros and
        `labels[0]`.
    """
    boxes = overlaps.shape[1]
    if not overlaps.shape[0]:
        return (
            torch.zeros(boxes, dtype=torch.int64, device=overlaps.device),
            torch.full((boxes,), labels[0], dtype=torch.int8, device=overlaps.device),
        )
    best, matched = overlaps.max(dim=0)
    found = torch.ones(boxes, dtype=torch.int8, device=overlaps.device)
    for label, low, high in zip(labels, thresholds[:-1], thresholds[1:], strict=True):
        found = found.masked_fill((best >= low) & (best < high), label)
    if allow_low_quality:
        found = found.masked_fill((overlaps == overlaps.amax(dim=1, keepdim=True)).any(dim=0), 1)
    return matched, found
