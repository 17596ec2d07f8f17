"""Convolutions that include the frozen batch norm after them, of torch's and of Detectron2's type."""

import detectron2.layers
from torch import Tensor, nn

from resnet_backbone.detection.modeling.torchscript import NotScripted
from resnet_backbone.networks.norms import FrozenBatchNorm2d
from resnet_backbone.ops import affine, convolve_and_normalize

FROZEN_NORMS = (FrozenBatchNorm2d, detectron2.layers.FrozenBatchNorm2d)


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what a frozen norm multiplies and adds, `(C,)` each."""
    return affine(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def _normalized(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    scale, shift = scale_and_shift(norm)
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


class NormalizedConv2d(NotScripted, nn.Conv2d):
    """A convolution that includes the frozen batch norm after it, its attribute `norm_after`."""

    def forward(self, x: Tensor) -> Tensor:
        return _normalized(self, self.norm_after, x)


class NormalizedDetectron2Conv2d(NotScripted, detectron2.layers.Conv2d):
    """Detectron2's convolution with frozen batch norm as its `norm`, and possibly an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = _normalized(self, self.norm, x)
        return x if self.activation is None else self.activation(x)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm that the convolution before it has done already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedDetectron2Norm(detectron2.layers.FrozenBatchNorm2d):
    """The same, of Detectron2's type."""

    def forward(self, x: Tensor) -> Tensor:
        return x


FOLDED = {FrozenBatchNorm2d: FoldedNorm, detectron2.layers.FrozenBatchNorm2d: FoldedDetectron2Norm}

CONVOLUTIONS = {nn.Conv2d, NormalizedConv2d, detectron2.layers.Conv2d, NormalizedDetectron2Conv2d}


def fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Let a convolution do what the frozen norm after it does, which then passes its input on."""
    conv.__class__, norm.__class__ = NormalizedConv2d, FOLDED[type(norm)]
    object.__setattr__(conv, "norm_after", norm)  # not a submodule of the convolution
