"""RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) as one sparse matrix product, forward and backward.

Bilinear interpolation and the mean over a bin's samples are linear, and what they do vertically does not depend on what
they do horizontally. So a bin is a weighted sum of feature vectors, whose weights are the products of a few vertical
and a few horizontal ones. Samples that share a feature vector are merged before any feature is read. The gradient of
the features is the product with the transposed matrix: sums in a fixed order, the same bits every time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.ops.kernels import kernels_for

CHUNK = 4_000_000  # entries of the matrix that are computed at a time, in about 200 MB


def roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: tuple[int, int],
    *,
    scales: Sequence[float],
    levels: Tensor | None = None,
    sampling_ratio: int = 0,
    aligned: bool = True,
    step: int = 1,
) -> Tensor:
    """Pool each RoI from one level of a feature pyramid; equal to torchvision's `roi_align` on that level.

    Sums are in float32 for half-precision features, with weights rounded to the features' dtype.

    Args:
        features: a map `(N, C, H, W)` for each level, the same N and C; channels_last is fastest.
        rois: `(R, 5)`: index of the image, then x1, y1, x2, y2 in pixels of the image.
        output_size: number of bins vertically and horizontally.
        scales: of each level, its pixels per pixel of the image.
        levels: `(R,)`, the index of each RoI's level; not needed if there is one.
        sampling_ratio: samples of a bin in each direction; 0 for as many as the bin has feature pixels, rounded up.
        aligned: whether a pixel's center is at its index plus one half (Detectron2's ROIAlignV2), or at its index.
        step: return every `step`-th bin in both directions, from the first: what a layer with this stride reads.

    Returns:
        `(R, C, bins / step, bins / step)`, rounded up, in channels_last.
    """
    if levels is None:
        levels = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    boxes = rois.to(torch.promote_types(features[0].dtype, torch.float32)).contiguous()
    pooled = _roi_align(list(features), boxes, levels, list(output_size), list(scales), sampling_ratio, aligned, step)
    return pooled.unflatten(0, (len(rois), *_pooled_size(output_size, step))).permute(0, 3, 1, 2)


@torch.library.custom_op("resnet_backbone::roi_align", mutates_args=())
def _roi_align(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    step: int,
) -> Tensor:
    """Return `(bins of all RoIs, C)`, a bin's row after the next; boxes in at least float32."""
    if (kernels := kernels_for(features[0], "roi_align_kernels", "RoIAlign")) is not None:
        with torch.cuda.device_of(rois):
            return kernels.forward(features, rois, levels, output_size, scales, sampling_ratio, aligned, step)
    channels = features[0].shape[1]
    # A view if the layout is channels_last and there is one level.
    rows = [feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features]
    rows = rows[0] if len(rows) == 1 else torch.cat(rows)
    shapes = [list(feature.shape) for feature in features]
    pooled = [
        F.embedding_bag(indices, rows, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights.to(rows.dtype))
        for _, indices, weights, counts in _matrix(
            shapes, rois, levels, output_size, scales, sampling_ratio, aligned, step
        )
    ]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled)


@_roi_align.register_fake
def _(features, rois, levels, output_size, scales, sampling_ratio, aligned, step):
    down, across = _pooled_size(output_size, step)
    return features[0].new_empty(len(rois) * down * across, features[0].shape[1])


@torch.library.custom_op("resnet_backbone::roi_align_backward", mutates_args=())
def _roi_align_backward(
    gradient: Tensor,
    rois: Tensor,
    levels: Tensor,
    shapes: list[int],
    output_size: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    step: int,
) -> list[Tensor]:
    """Return the gradients of the features, `(N * H * W, C)` each; `shapes` holds N, C, H, W of each level."""
    sizes = _grouped(shapes)
    if (kernels := kernels_for(gradient, "roi_align_kernels", "RoIAlign")) is not None:
        with torch.cuda.device_of(rois):
            return kernels.backward(gradient, rois, levels, sizes, output_size, scales, sampling_ratio, aligned, step)
    pixels = [images * height * width for images, _, height, width in sizes]
    totals: list[Tensor] = []
    for first, indices, weights, counts in _matrix(
        sizes, rois, levels, output_size, scales, sampling_ratio, aligned, step
    ):
        # The transposed matrix, its entries in the order of the feature maps' pixels.
        bins = first + torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        order = torch.argsort(indices, stable=True)
        bins, weights = bins[order], weights[order].to(gradient.dtype)
        times = torch.bincount(indices, minlength=sum(pixels)).split(pixels)
        entries = [int(each.sum()) for each in times]
        parts = [
            F.embedding_bag(b, gradient, n.cumsum(0) - n, mode="sum", per_sample_weights=w)
            for b, w, n in zip(bins.split(entries), weights.split(entries), times, strict=True)
        ]
        totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts
    return totals


@_roi_align_backward.register_fake
def _(gradient, rois, levels, shapes, output_size, scales, sampling_ratio, aligned, step):
    channels = gradient.shape[1]
    return [gradient.new_empty(images * height * width, channels) for images, _, height, width in _grouped(shapes)]


def _save(ctx, inputs, output) -> None:
    features, rois, levels, *ctx.arguments = inputs
    ctx.save_for_backward(rois, levels)
    ctx.shapes = [size for feature in features for size in feature.shape]


def _differentiate(ctx, gradient: Tensor):
    rois, levels = ctx.saved_tensors
    gradients = _roi_align_backward(gradient.contiguous(), rois, levels, ctx.shapes, *ctx.arguments)
    sizes = zip(gradients, _grouped(ctx.shapes), strict=True)
    found = [part.view(images, height, width, -1).permute(0, 3, 1, 2) for part, (images, _, height, width) in sizes]
    return found, *[None] * 7


_roi_align.register_autograd(_differentiate, setup_context=_save)


def _matrix(
    shapes: Sequence[Sequence[int]],
    rois: Tensor,
    levels: Tensor,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    step: int,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield the matrix in runs of RoIs: their first bin, indices and weights of the entries, and each bin's number.

    A bin's entries are neighbors, and point into the pixels of all images and levels, one after the other.
    """
    heights, widths = (torch.tensor([shape[d] for shape in shapes], device=rois.device)[levels] for d in (2, 3))
    sizes = torch.tensor([shape[0] * shape[2] * shape[3] for shape in shapes])
    starts = (sizes.cumsum(0) - sizes).to(rois.device)[levels]
    per_pixel = torch.tensor(scales, dtype=rois.dtype, device=rois.device)[levels]
    corners = rois[:, 1:] * per_pixel[:, None] - (0.5 if aligned else 0.0)
    extents = corners[:, 2:] - corners[:, :2]
    if not aligned:
        extents = extents.clamp(min=1.0)
    samples = [number_of_samples(extents[:, d], output_size[1 - d], sampling_ratio) for d in (0, 1)]
    bins = _pooled_size(output_size, step)
    for part in _chunks(samples, bins):
        left, horizontal = bin_weights(
            corners[part, 0], extents[part, 0], widths[part], output_size[1], samples=samples[0][part], step=step
        )
        top, vertical = bin_weights(
            corners[part, 1], extents[part, 1], heights[part], output_size[0], samples=samples[1][part], step=step
        )
        # (R, bins down, bins across, pixels down, pixels across)
        weights = vertical[:, :, None, :, None] * horizontal[:, None, :, None, :]
        image = starts[part] + rois[part, 0].long() * heights[part] * widths[part]
        down = image[:, None, None] + (top[:, :, None] + _counted(vertical)) * widths[part, None, None]
        across = left[:, :, None] + _counted(horizontal)
        indices = down[:, :, None, :, None] + across[:, None, :, None, :]
        used = weights != 0
        counts = used.flatten(3).sum(3).flatten()
        yield part.start * bins[0] * bins[1], indices[used], weights[used], counts


def bin_weights(
    starts: Tensor, extents: Tensor, sizes: Tensor, bins: int, *, samples: Tensor, step: int = 1
) -> tuple[Tensor, Tensor]:
    """Return what RoIAlign reads in one direction: for each RoI and bin, the first pixel and the weights from there on.

    A sample within one pixel outside of the map reads its border; one further out counts as zero.

    Args:
        starts, extents: of the RoIs in pixels of the feature map, `(R,)`.
        sizes: of the feature maps, `(R,)`.
        bins: that an RoI is divided into.
        samples: of a bin, `(R,)`, what `number_of_samples` returns.
        step: see `roi_align`.

    Returns:
        first pixels `(R, bins / step)` and weights `(R, bins / step, K)`, where K is the most pixels that a bin reads.
    """
    bin_size = extents / bins
    number = torch.arange(max(_largest(samples), 1), device=starts.device)
    spacing = bin_size / samples.clamp(min=1)
    begin = starts[:, None] + torch.arange(0, bins, step, device=starts.device) * bin_size[:, None]
    at = begin[:, :, None] + (number + 0.5) * spacing[:, None, None]  # (R, bins, samples)
    last = sizes[:, None, None] - 1
    inside = (number < samples[:, None, None]) & (at >= -1) & (at <= last + 1)
    at = torch.minimum(at.clamp(min=0), last)
    before = at.floor()
    share = at - before
    each = inside / samples.clamp(min=1)[:, None, None]
    before = before.long()
    first = torch.where(inside, before, last).amin(2)
    before = torch.where(inside, before - first[:, :, None], 0)
    after = torch.where(inside, torch.minimum(before + 1, last - first[:, :, None]), 0)
    weights = at.new_zeros(*first.shape, _largest(after) + 1)
    weights.scatter_add_(2, before, each * (1 - share)).scatter_add_(2, after, each * share)
    return first, weights


def number_of_samples(extents: Tensor, bins: int, sampling_ratio: int) -> Tensor:
    """Return how many samples a bin has in one direction, `(R,)`; none if it is adaptive and the extent not positive.

    Those of an extent that is not finite are none, too.
    """
    if sampling_ratio > 0:
        return torch.full_like(extents, sampling_ratio)
    return (extents / bins).ceil().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)


def _chunks(samples: Sequence[Tensor], bins: Sequence[int]) -> list[slice]:
    """Divide the RoIs into runs of which each has at most CHUNK entries in the matrix, or is a single RoI."""
    # A bin reads at most two pixels more than it has samples.
    most = bins[0] * bins[1] * (_largest(samples[0]) + 2) * (_largest(samples[1]) + 2)
    size = max(CHUNK // most, 1)
    return [slice(start, start + size) for start in range(0, max(len(samples[0]), 1), size)]


def _largest(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0


def _counted(weights: Tensor) -> Tensor:
    return torch.arange(weights.shape[2], device=weights.device)


def _pooled_size(output_size: Sequence[int], step: int) -> list[int]:
    return [-(-size // step) for size in output_size]


def _grouped(shapes: Sequence[int]) -> list[Sequence[int]]:
    return [shapes[start : start + 4] for start in range(0, len(shapes), 4)]
