"""RoI pooling as a sparse matrix product, and conv5_x on regions that begins before it."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import RoIPool

from resnet_backbone.detection.modeling.fixed_size import FixedSizeSamples
from resnet_backbone.detection.modeling.normalized_conv import CONVOLUTIONS, FOLDED, FROZEN_NORMS, scale_and_shift
from resnet_backbone.detection.modeling.res5_heads import NetworkRes5ROIHeads
from resnet_backbone.detection.modeling.torchscript import NotScripted
from resnet_backbone.networks.blocks import Bottleneck
from resnet_backbone.ops import roi_align, roi_pool


class SparseROIPooler(NotScripted, ROIPooler):
    """Detectron2's pooler by `ops.roi_align`: all levels at once, half-precision features without rounded boxes."""

    memory_format = torch.contiguous_format

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool `(R, C, output height, output width)` from maps `(N, C, H, W)`, one a level; boxes are by image."""
        if torch.jit.is_tracing():
            return super().forward(x, box_lists)
        return self.pool(x, box_lists).contiguous(memory_format=self.memory_format)

    def pool(self, x: list[Tensor], box_lists: list[Boxes], *, step: int = 1) -> Tensor:
        """Return every `step`-th of the bins that `forward` returns."""
        levels = None
        if len(x) > 1:
            levels = assign_boxes_to_levels(
                box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
            )
        # Detectron2's function for this waits for the device.
        rois = torch.cat([F.pad(boxes.tensor, (1, 0), value=image) for image, boxes in enumerate(box_lists)])
        first = self.level_poolers[0]
        return roi_align(
            x,
            rois,
            self.output_size,
            scales=[pooler.spatial_scale for pooler in self.level_poolers],
            levels=levels,
            sampling_ratio=first.sampling_ratio,
            aligned=first.aligned,
            step=step,
        )


class RepeatableRoIPool(NotScripted, RoIPool):
    """torchvision's RoIPool by `ops.roi_pool`, which can repeat a GPU's gradient to the bit."""

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            return super().forward(x, rois)
        size = self.output_size
        return roi_pool(x, rois, (size, size) if isinstance(size, int) else size, self.spatial_scale)


class Opening(NamedTuple):
    """The layers of a stage's first block that read its input, and how the block goes on."""

    conv: nn.Conv2d
    norm: nn.Module | None
    shortcut: nn.Conv2d
    shortcut_norm: nn.Module | None
    rest: Sequence[Sequence[nn.Module]]  # the residual branch's other layers, a ReLU before each of these sequences


def opening_of(res5: nn.Module) -> Opening | None:
    """Return the opening of conv5_x, or None where it is not what Detectron2 or we build."""
    if type(res5) is not nn.Sequential:
        return None
    block = res5[0]
    if type(block) is Bottleneck and isinstance(block.downsample, nn.Sequential):
        rest = [(block.conv2, block.bn2), (block.conv3, block.bn3)]
        opening = Opening(block.conv1, block.bn1, *block.downsample, rest)
    elif type(block) is BottleneckBlock and block.shortcut is not None:
        rest = [(block.conv2,), (block.conv3,)]
        opening = Opening(block.conv1, block.conv1.norm, block.shortcut, block.shortcut.norm, rest)
    else:
        return None
    return opening if {type(opening.conv), type(opening.shortcut)} <= CONVOLUTIONS else None


def _is_watched(module: nn.Module) -> bool:
    """Return whether someone has registered a forward hook on `module` or a part of it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class _Commuted(FixedSizeSamples):
    """C4 heads whose conv5_x begins on the feature map."""

    def _shared_roi_transform(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        if torch.jit.is_tracing():
            return super()._shared_roi_transform(features, boxes)
        opening = opening_of(self.res5)
        x, height, width = features[0], *self.pooler.output_size
        stride = opening.shortcut.stride[0]
        in_regions = sum(map(len, boxes)) * -(-height // stride) * -(-width // stride)
        # The plain order is faster for few regions, such as detections for the mask head, and calls all hooks.
        if in_regions <= x.shape[0] * x.shape[2] * x.shape[3] or _is_watched(self.res5) or _is_watched(self.pooler):
            return super()._shared_roi_transform(features, boxes)

        def pooled(conv: nn.Conv2d, norm: nn.Module | None) -> Tensor:
            weight, scale, shift = conv.weight, None, None
            if type(norm) in FROZEN_NORMS or type(norm) in FOLDED.values():
                scale, shift = scale_and_shift(norm)
                weight = weight * scale[:, None, None, None]
            y = self.pooler.pool([F.conv2d(x, weight)], boxes, step=conv.stride[0])
            if shift is not None:
                return y.add_(shift[:, None, None].to(y.dtype))
            return y if norm is None else norm(y)

        y = pooled(opening.conv, opening.norm)
        for layers in opening.rest:
            y = F.relu_(y)
            for layer in layers:
                y = layer(y)
        y += pooled(opening.shortcut, opening.shortcut_norm)
        y = F.relu_(y)
        for block in islice(self.res5, 1, None):
            y = block(y)
        return y


class CommutedRes5ROIHeads(_Commuted, Res5ROIHeads):
    """Detectron2's C4 heads."""


class CommutedNetworkRes5ROIHeads(_Commuted, NetworkRes5ROIHeads):
    """Our C4 heads."""


COMMUTED = {Res5ROIHeads: CommutedRes5ROIHeads, NetworkRes5ROIHeads: CommutedNetworkRes5ROIHeads}
