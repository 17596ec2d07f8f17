"""RoIPool (Fast R-CNN, arXiv 1504.08083, section 2.1) whose gradient can have the same bits every time on a GPU."""

import torch
import torchvision  # noqa: F401  (its operators are in torch.ops)
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def roi_pool(features: Tensor, rois: Tensor, output_size: tuple[int, int], scale: float) -> Tensor:
    """Return the maximum of each bin of each RoI, as torchvision's `roi_pool` does; 0 for a bin without pixels.

    torchvision's gradient on a GPU adds in any order. With `torch.use_deterministic_algorithms`, which it refuses, the
    order is fixed. Half-precision features are pooled in float32.

    Args:
        features: `(N, C, H, W)`.
        rois: `(R, 5)`: index of the image, then x1, y1, x2, y2 in pixels of the image.
        output_size: number of bins vertically and horizontally.
        scale: the map's pixels per pixel of the image.

    Returns:
        `(R, C, output height, output width)`.
    """
    wide = torch.promote_types(features.dtype, torch.float32)  # in which alone torchvision has all of it
    return _RoIPool.apply(features.to(wide), rois.to(wide), tuple(output_size), scale).to(features.dtype)


class _RoIPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, rois: Tensor, size: tuple[int, int], scale: float) -> Tensor:
        pooled, argmax = torch.ops.torchvision.roi_pool(features, rois, scale, *size)
        ctx.save_for_backward(rois, argmax)
        ctx.shape, ctx.scale = features.shape, scale
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rois, argmax = ctx.saved_tensors
        if gradient.is_cuda and torch.are_deterministic_algorithms_enabled():
            return scattered(gradient, rois, argmax, ctx.shape), None, None, None
        found = torch.ops.torchvision._roi_pool_backward(
            gradient, rois, argmax, ctx.scale, *gradient.shape[2:], *ctx.shape
        )
        return found, None, None, None


def scattered(gradient: Tensor, rois: Tensor, argmax: Tensor, shape: torch.Size) -> Tensor:
    """Return the features' gradient: each bin's own, added where its maximum was.

    Args:
        gradient: `(R, C, output height, output width)`.
        rois: as for `roi_pool`.
        argmax: of the gradient's shape, the index of the maximum among the map's H · W pixels; -1 if there is none.
        shape: of the features.
    """
    _, channels, height, width = shape
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    places = planes[:, :, None, None] * (height * width) + argmax.clamp(min=0)
    found = gradient.new_zeros(shape.numel())
    return found.index_add_(0, places.flatten(), (gradient * (argmax >= 0)).flatten()).view(shape)
