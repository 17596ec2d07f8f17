"""A convolution and the frozen batch normalization after it, in one pass over the output."""

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve_and_normalize(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor,
    shift: Tensor,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Return `conv2d(x, weight) * scale + shift`, the scale multiplied into the weight and the shift as its bias.

    No pass reads or writes the convolution's own output, and autograd keeps nothing but `x`. The gradients are those of
    the two steps, up to rounding.

    Args:
        x: `(N, C, H, W)`.
        weight: of the convolution, `(O, C / groups, kernel height, kernel width)`.
        scale, shift: `(O,)`, what `affine` returns.
    """
    return F.conv2d(x, weight * scale[:, None, None, None], shift, stride, padding, dilation, groups)


def affine(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the scale and shift, `(C,)` each, that a batch normalization with constant statistics amounts to."""
    scale = weight * torch.rsqrt(variance + eps)
    return scale, bias - mean * scale
