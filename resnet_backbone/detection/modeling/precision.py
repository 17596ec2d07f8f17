"""Keep the parts of a detector that need float32 in float32 under autocast."""

from typing import Any

import torch
from detectron2.modeling import FastRCNNOutputLayers
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import nn

from resnet_backbone.detection.modeling.pooling import SparseROIPooler


def keep_boxes_in_float32(model: nn.Module) -> None:
    """Pool RoIs and return scores and box deltas in float32, even if autocast runs the layers in half precision.

    Detectron2's RoIAlign casts boxes to the features' dtype. With bfloat16's 8 bits, an edge at 600 pixels moves by up
    to 2 pixels; with float16's 11 bits, an edge beyond 1,024 pixels moves by half a pixel. Proposals are ranked by
    score, and such low-precision scores tie by the hundreds. Without autocast, nothing changes.
    """
    for module in model.modules():
        if isinstance(module, ROIPooler) and not isinstance(module, SparseROIPooler):  # which keeps boxes as they are
            module.register_forward_pre_hook(lambda _, inputs: _float32(inputs))
        elif isinstance(module, (StandardRPNHead, FastRCNNOutputLayers, RetinaNetHead)):
            module.register_forward_hook(lambda _, inputs, outputs: _float32(outputs))


def _float32(value: Any) -> Any:
    """Cast half-precision tensors to float32, including in lists and tuples; leave the rest unchanged."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_float32, value))
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value
