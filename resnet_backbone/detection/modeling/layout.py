"""The memory layout of a detector's parts."""

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead, Res5ROIHeads
from torch import nn

# What is mostly convolutions. Other heads stay as they are: Detectron2's keypoint head and a user's own may flatten
# feature maps with `view`, which works in torch's default layout only.
CONVOLUTIONAL = (
    Backbone,
    StandardRPNHead,
    RetinaNetHead,
    SemSegFPNHead,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
)


def use_channels_last(model: nn.Module) -> None:
    """Store the weights of `model`'s convolutional parts as channels_last, the fastest layout for convolutions."""
    for module in model.modules():
        if isinstance(module, CONVOLUTIONAL):
            module.to(memory_format=torch.channels_last)
