"""A feature of the whole image beside each region's own (ResNet paper, appendix B, "Global context")."""

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor


def whole_images(proposals: Sequence[Instances]) -> list[Boxes]:
    """Return one box for each image, around all of it without the padding: the pyramid with a single level."""
    boxes = []
    for each in proposals:
        height, width = each.image_size
        corners = each.proposal_boxes.tensor.new_zeros(1, 4)
        corners[:, 2], corners[:, 3] = width, height  # assigned, which waits for no device and can be traced
        boxes.append(Boxes(corners))
    return boxes


def with_context(regions: Tensor, images: Tensor, proposals: Sequence[Instances]) -> Tensor:
    """Concatenate each region's feature with its image's, `(R, 2C)`.

    Args:
        regions: `(R, C)`, of the proposals of all images.
        images: `(N, C)`.
    """
    counts = (each.proposal_boxes.tensor.shape[0] for each in proposals)  # not `len`: a trace would take it as fixed
    context = torch.cat([image.expand(count, -1) for image, count in zip(images, counts, strict=True)])
    return torch.cat([regions, context], dim=1)
