"""Detectron2's models, faster with the same numbers: modules replaced by ones that compute the same another way.

`accelerate` changes the class of a module, and only where that is exactly Detectron2's or ours: its parameters, its
place, hooks and the state dict's names stay, and a user's own subclass is left alone.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import detectron2.layers
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import FastRCNNOutputLayers, GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from torch import nn
from torchvision.ops import RoIPool

from resnet_backbone.detection.modeling.fast_rcnn import FastGeneralizedRCNN
from resnet_backbone.detection.modeling.fixed_size import FastMatcher, FixedSizeOutputLayers, FixedSizeStandardROIHeads
from resnet_backbone.detection.modeling.normalized_conv import FROZEN_NORMS, NormalizedDetectron2Conv2d, fold
from resnet_backbone.detection.modeling.pooling import COMMUTED, RepeatableRoIPool, SparseROIPooler, opening_of
from resnet_backbone.detection.modeling.proposals import FastRPN
from resnet_backbone.networks.blocks import BasicBlock, Bottleneck
from resnet_backbone.networks.resnet import ResNet
from resnet_backbone.networks.vgg import VGG

logger = logging.getLogger(__name__)


def accelerate(model: nn.Module) -> nn.Module:
    """Replace what can be computed faster in a detector, in place; return it.

    With the same weights and input, losses, gradients and detections are the same up to rounding. Call it once the
    model's modules are the final ones.

    - A convolution and the frozen batch norm after it become one convolution with a bias.
    - RoIAlign is a sparse matrix product (`ops.roi_align`), for all levels of a pyramid at once. RoIPool's gradient
      can be repeated to the bit on a GPU (`ops.roi_pool`).
    - conv5_x on regions starts with 1×1 convolutions, which commute with RoIAlign: they run on the feature map before
      the pooling instead of on every region after it, and only the bins that a stride leaves are pooled.
    - Non-maximum suppression of proposals stops at the number wanted (`ops.nms`).
    - On a GPU, a training step of Faster R-CNN does not wait for the device (`fixed_size.py`).
    """
    counts: Counter[str] = Counter()
    for conv, norm in _pairs(model):
        if type(conv) is nn.Conv2d and type(norm) in FROZEN_NORMS:
            fold(conv, norm)
            counts["convolutions with frozen batch norm"] += 1
    for module in model.modules():
        kind = type(module)
        if kind is detectron2.layers.Conv2d and type(module.norm) in FROZEN_NORMS:
            module.__class__ = NormalizedDetectron2Conv2d
            counts["convolutions with frozen batch norm"] += 1
        elif kind is ROIPooler and all(type(pooler) is ROIAlign for pooler in module.level_poolers):
            module.__class__ = SparseROIPooler
            counts["RoI pooling"] += 1
        elif kind is RoIPool:
            module.__class__ = RepeatableRoIPool
            counts["RoI pooling"] += 1
        elif kind is RPN and type(module.box2box_transform) is Box2BoxTransform:
            module.__class__ = FastRPN
            counts["RPN"] += 1
    for module in model.modules():
        _keep_layout(module)
        if type(module) in COMMUTED and type(module.pooler) is SparseROIPooler and opening_of(module.res5) is not None:
            module.__class__ = COMMUTED[type(module)]
            counts["conv5_x on regions"] += 1
    for module in model.modules():  # itself, or in a wrapper for several processes
        if type(module) is GeneralizedRCNN:
            module.__class__ = FastGeneralizedRCNN
            _fix_sizes(module)
    done = ", ".join(f"{number} {what}" for what, number in counts.items())
    logger.info("accelerated: %s", done or "nothing, since no module is exactly Detectron2's or ours")
    return model


def _fix_sizes(model: nn.Module) -> None:
    """Let RPN and heads train without waiting for a GPU, if both can, and missing RoIs spoil no batch statistics."""
    rpn, heads = model.proposal_generator, model.roi_heads
    predictor = getattr(heads, "box_predictor", None)
    if (
        type(rpn) is FastRPN
        and (type(heads) is StandardROIHeads or type(heads) in COMMUTED.values())
        and type(heads.proposal_matcher) is type(rpn.anchor_matcher) is Matcher
        and type(predictor) is FastRCNNOutputLayers
        and type(predictor.box2box_transform) is Box2BoxTransform
        and predictor.box_reg_loss_type == rpn.box_reg_loss_type == "smooth_l1"
        and not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in heads.modules())
    ):
        if type(heads) is StandardROIHeads:
            heads.__class__ = FixedSizeStandardROIHeads
        predictor.__class__ = FixedSizeOutputLayers
        rpn.anchor_matcher.__class__ = heads.proposal_matcher.__class__ = FastMatcher
        rpn.fixed_size = heads.fixed_size = predictor.fixed_size = None  # on a GPU


def _keep_layout(heads: nn.Module) -> None:
    """Let the poolers of RoI heads return channels_last where only convolutions read it.

    Others may flatten with `view`, as Detectron2's keypoint head does.
    """
    readers: dict[str, Iterable[nn.Module]] = {}
    if type(heads) in COMMUTED:
        readers = {"pooler": ()}
    elif type(heads) in (StandardROIHeads, CascadeROIHeads):
        box_heads = heads.box_head if isinstance(heads.box_head, nn.ModuleList) else [heads.box_head]
        readers = {"box_pooler": box_heads} | ({"mask_pooler": [heads.mask_head]} if heads.mask_on else {})
    for name, modules in readers.items():
        if all(type(module) in (FastRCNNConvFCHead, MaskRCNNConvUpsampleHead) for module in modules):
            getattr(heads, name).memory_format = torch.channels_last


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield our networks' convolutions, each with the norm right after it."""
    for module in model.modules():
        kind = type(module)
        if kind is Bottleneck or kind is BasicBlock:
            yield module.conv1, module.bn1
            yield module.conv2, module.bn2
            if kind is Bottleneck:
                yield module.conv3, module.bn3
            if isinstance(module.downsample, nn.Sequential):
                yield tuple(module.downsample)
        elif kind is ResNet and "stem" in module.stage_names and isinstance(module.prepool, nn.Identity):
            yield module.conv1, module.bn1
        elif kind is VGG:
            layers = list(module.features)
            yield from pairwise(layers)
