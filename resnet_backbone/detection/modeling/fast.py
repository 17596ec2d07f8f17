"""Detectron2's models, faster with the same numbers: modules replaced by ones that compute the same another way.

`accelerate` changes the class of a module, and only where that is exactly Detectron2's or ours: its parameters, its
place, hooks and the state dict's names stay, and a user's own subclass is left alone.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import detectron2.layers
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.detection.modeling.proposals import FastRPN
from resnet_backbone.detection.modeling.res5_heads import NetworkRes5ROIHeads
from resnet_backbone.networks.blocks import BasicBlock, Bottleneck
from resnet_backbone.networks.norms import FrozenBatchNorm2d
from resnet_backbone.networks.resnet import ResNet
from resnet_backbone.networks.vgg import VGG
from resnet_backbone.ops import convolve_and_normalize, roi_align
from resnet_backbone.ops.frozen_bn import affine

logger = logging.getLogger(__name__)

FROZEN_NORMS = (FrozenBatchNorm2d, detectron2.layers.FrozenBatchNorm2d)


def accelerate(model: nn.Module) -> nn.Module:
    """Replace what can be computed faster in a detector, in place; return it.

    With the same weights and input, losses, gradients and detections are the same up to rounding.

    - A convolution and the frozen batch norm after it become one convolution with a bias.
    - RoIAlign is a sparse matrix product (`ops.roi_align`), for all levels of a pyramid at once.
    - conv5_x on regions starts with 1×1 convolutions, which commute with RoIAlign: they run on the feature map before
      the pooling instead of on every region after it, and only the bins that a stride leaves are pooled.
    """
    counts = {"convolutions with frozen batch norm": 0, "RPN": 0, "RoI poolers": 0, "conv5_x on regions": 0}
    for conv, norm in _pairs(model):
        if type(conv) is nn.Conv2d and type(norm) in FROZEN_NORMS:
            conv.__class__, norm.__class__ = NormalizedConv2d, _FOLDED[type(norm)]
            object.__setattr__(conv, "norm_after", norm)  # not a submodule of the convolution
            counts["convolutions with frozen batch norm"] += 1
    for module in list(model.modules()):
        kind = type(module)
        if kind is detectron2.layers.Conv2d and type(module.norm) in FROZEN_NORMS:
            module.__class__ = NormalizedDetectron2Conv2d
            counts["convolutions with frozen batch norm"] += 1
        elif kind is ROIPooler and all(type(pooler) is ROIAlign for pooler in module.level_poolers):
            module.__class__ = SparseROIPooler
            counts["RoI poolers"] += 1
        elif kind is RPN and type(module.box2box_transform) is Box2BoxTransform:
            module.__class__ = FastRPN
            counts["RPN"] += 1
    for module in model.modules():
        _keep_layout(module)
        if type(module) in _COMMUTED and type(module.pooler) is SparseROIPooler and _opening(module.res5) is not None:
            module.__class__ = _COMMUTED[type(module)]
            counts["conv5_x on regions"] += 1
    logger.info("accelerated: %s", ", ".join(f"{number} {what}" for what, number in counts.items() if number))
    return model


def _keep_layout(heads: nn.Module) -> None:
    """Let the poolers of RoI heads return channels_last where only convolutions read it.

    Others may flatten with `view`, as Detectron2's keypoint head does.
    """
    readers: dict[str, Iterable[nn.Module]] = {}
    if type(heads) in _COMMUTED:
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
            yield from zip(layers[:-1], layers[1:], strict=True)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return affine(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def _normalized(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    scale, shift = _affine(norm)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return convolve_and_normalize(
        x,
        conv.weight,
        scale=scale,
        shift=shift,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )


class NormalizedConv2d(nn.Conv2d):
    """A convolution that includes the frozen batch norm after it, its attribute `norm_after`."""

    def forward(self, x: Tensor) -> Tensor:
        return _normalized(self, self.norm_after, x)


class NormalizedDetectron2Conv2d(detectron2.layers.Conv2d):
    """Detectron2's convolution with frozen batch norm as its `norm`, and possibly an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = _normalized(self, self.norm, x)
        return x if self.activation is None else self.activation(x)


class _Folded(FrozenBatchNorm2d):
    """A frozen batch norm that the convolution before it has done already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _FoldedDetectron2(detectron2.layers.FrozenBatchNorm2d):
    """The same, of Detectron2's type."""

    def forward(self, x: Tensor) -> Tensor:
        return x


_FOLDED = {FrozenBatchNorm2d: _Folded, detectron2.layers.FrozenBatchNorm2d: _FoldedDetectron2}


class SparseROIPooler(ROIPooler):
    """Detectron2's pooler by `ops.roi_align`: all levels at once, half-precision features without rounded boxes."""

    memory_format = torch.contiguous_format

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Return `(R, C, output height, output width)` for maps `(N, C, H, W)` of each level and boxes of each image."""
        return self.pool(x, box_lists).contiguous(memory_format=self.memory_format)

    def pool(self, x: list[Tensor], box_lists: list[Boxes], *, step: int = 1) -> Tensor:
        """Return every `step`-th of the bins that `forward` returns."""
        levels = None
        if len(x) > 1:
            levels = assign_boxes_to_levels(
                box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
            )
        first = self.level_poolers[0]
        return roi_align(
            x,
            convert_boxes_to_pooler_format(box_lists),
            self.output_size,
            scales=[pooler.spatial_scale for pooler in self.level_poolers],
            levels=levels,
            sampling_ratio=first.sampling_ratio,
            aligned=first.aligned,
            step=step,
        )


class _Opening(NamedTuple):
    """The layers of a stage's first block that read its input, and how the block goes on."""

    conv: nn.Conv2d
    norm: nn.Module | None
    shortcut: nn.Conv2d
    shortcut_norm: nn.Module | None
    rest: Sequence[nn.Module]  # the residual branch's other layers, but for the ReLUs between them


def _opening(res5: nn.Module) -> _Opening | None:
    """Return the opening of conv5_x, or None where it is not what Detectron2 or we build."""
    if type(res5) is not nn.Sequential:
        return None
    block = res5[0]
    if type(block) is Bottleneck and isinstance(block.downsample, nn.Sequential):
        rest = [nn.Sequential(block.conv2, block.bn2), nn.Sequential(block.conv3, block.bn3)]
        return _Opening(block.conv1, block.bn1, *block.downsample, rest)
    if type(block) is BottleneckBlock and block.shortcut is not None:
        rest = [block.conv2, block.conv3]
        return _Opening(block.conv1, block.conv1.norm, block.shortcut, block.shortcut.norm, rest)
    return None


class _Commuted:
    """C4 heads whose conv5_x begins on the feature map."""

    def _shared_roi_transform(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        opening = _opening(self.res5)
        x, height, width = features[0], *self.pooler.output_size
        stride = opening.shortcut.stride[0]
        in_regions = sum(map(len, boxes)) * -(-height // stride) * -(-width // stride)
        if in_regions <= x.shape[0] * x.shape[2] * x.shape[3]:  # such as a few detections for the mask head
            return super()._shared_roi_transform(features, boxes)

        def pooled(conv: nn.Conv2d, norm: nn.Module | None) -> Tensor:
            weight, scale, shift = conv.weight, None, None
            if isinstance(norm, FROZEN_NORMS):
                scale, shift = _affine(norm)
                weight = weight * scale[:, None, None, None]
            y = self.pooler.pool([F.conv2d(x, weight)], boxes, step=conv.stride[0])
            if shift is not None:
                return y.add_(shift[:, None, None].to(y.dtype))
            return y if norm is None else norm(y)

        y = F.relu_(pooled(opening.conv, opening.norm))
        y = opening.rest[1](F.relu_(opening.rest[0](y)))
        y += pooled(opening.shortcut, opening.shortcut_norm)
        return self.res5[1:](F.relu_(y))


class CommutedRes5ROIHeads(_Commuted, Res5ROIHeads):
    """Detectron2's C4 heads."""


class CommutedNetworkRes5ROIHeads(_Commuted, NetworkRes5ROIHeads):
    """Our C4 heads."""


_COMMUTED = {Res5ROIHeads: CommutedRes5ROIHeads, NetworkRes5ROIHeads: CommutedNetworkRes5ROIHeads}
