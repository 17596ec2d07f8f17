"""RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) as one sparse matrix product, forward and backward.

Bilinear interpolation and the mean over a bin's samples are linear, and what they do vertically does not depend on what
they do horizontally. So a bin is a weighted sum of feature vectors, whose weights are the products of a few vertical
and a few horizontal ones. Samples that share a feature vector are merged before any feature is read. The gradient of
the features is the product with the transposed matrix: sums in a fixed order, the same bits every time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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
    channels = features[0].shape[1]
    # A view if the layout is channels_last and there is one level.
    rows = [feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features]
    rows = rows[0] if len(rows) == 1 else torch.cat(rows)
    if levels is None:
        levels = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    heights, widths = (torch.tensor([f.shape[d] for f in features], device=rois.device)[levels] for d in (2, 3))
    sizes = torch.tensor([feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features])
    starts = (sizes.cumsum(0) - sizes).to(rois.device)[levels]
    boxes = rois[:, 1:].to(torch.promote_types(rows.dtype, torch.float32))
    per_pixel = torch.tensor(scales, dtype=boxes.dtype, device=rois.device)[levels]

    corners = boxes * per_pixel[:, None] - (0.5 if aligned else 0.0)
    extents = corners[:, 2:] - corners[:, :2]
    if not aligned:
        extents = extents.clamp(min=1.0)
    samples = [number_of_samples(extents[:, d], output_size[1 - d], sampling_ratio) for d in (0, 1)]
    bins = [-(-size // step) for size in output_size]
    pooled = []
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
        pooled.append(_GatherSum.apply(rows, indices[used], weights[used].to(rows.dtype), counts))
    pooled = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
    return pooled.view(len(rois), *bins, channels).permute(0, 3, 1, 2)


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


class _GatherSum(torch.autograd.Function):
    """Weighted sums of rows, and the gradient of the rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, indices: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Return `(S, C)`: for each sum, the next `counts[s]` of `indices` and `weights` applied to `rows` `(P, C)`."""
        ctx.save_for_backward(indices, weights, counts)
        ctx.number_of_rows = len(rows)
        return F.embedding_bag(indices, rows, _offsets(counts), mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        indices, weights, counts = ctx.saved_tensors
        # The transposed matrix, its entries in the order of the rows.
        sums = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        order = torch.argsort(indices, stable=True)
        offsets = _offsets(torch.bincount(indices, minlength=ctx.number_of_rows))
        rows = F.embedding_bag(
            sums[order], gradient.contiguous(), offsets, mode="sum", per_sample_weights=weights[order]
        )
        return rows, None, None, None


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
