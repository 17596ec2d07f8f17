"""Objects of one image pasted onto another one (Ghiasi et al., arXiv 2012.07177, section 3)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances

from resnet_backbone.detection.data.datasets import objects_of


def some_objects(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a random subset of an image's annotations without crowd regions, each with probability 1/2.

    Draws from NumPy's global generator, as Detectron2's augmentations do.
    """
    return [annotation for annotation in objects_of(record) if np.random.random() < 0.5]


def paste(
    image: torch.Tensor, instances: Instances, source_image: torch.Tensor, source: Instances
) -> tuple[torch.Tensor, Instances]:
    """Return an image with all objects of another one on it, without blending, and the objects that are then visible.

    What the pasted objects cover is taken from the masks of the image's own objects. Their boxes follow from what is
    left, and those without a visible pixel are dropped.

    Args:
        image, source_image: `(C, H, W)`, of the same size.
        instances, source: their objects, with `gt_boxes`, `gt_classes` and `gt_masks` as BitMasks; an image without
            objects may lack the masks.
    """
    if len(source) == 0:
        return image, instances
    covered = source.gt_masks.tensor.any(dim=0)
    image = torch.where(covered, source_image, image)
    if len(instances) == 0:
        return image, source
    instances = instances[:]
    instances.gt_masks = BitMasks(instances.gt_masks.tensor & ~covered)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    return image, Instances.cat([instances[instances.gt_masks.nonempty()], source])
