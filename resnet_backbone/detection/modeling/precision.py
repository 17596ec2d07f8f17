"""What must stay in float32 when a detector runs under autocast."""

from typing import Any

import torch
from detectron2.modeling import FastRCNNOutputLayers
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import nn


def keep_boxes_in_float32(model: nn.Module) -> None:
    """Pool RoIs, and hand on scores and box deltas, in float32 even where autocast runs the layers in half of it.

    Detectron2's RoIAlign casts the boxes to the type of the features; with bfloat16's 8 bits an edge at 600 pixels
    moves by up to 2 pixels, and with float16's 11 bits one beyond 1,024 pixels by half of one. Scores of so few bits
    tie by the hundred, where proposals are ranked by them. Outside of autocast nothing changes.
    """
    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(lambda _, inputs: _float32(inputs))
        elif isinstance(module, (StandardRPNHead, FastRCNNOutputLayers, RetinaNetHead)):
            module.register_forward_hook(lambda _, inputs, outputs: _float32(outputs))


def _float32(value: Any) -> Any:
    """Tensors of half the width inside lists and tuples as float32; all else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_float32, value))
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value
