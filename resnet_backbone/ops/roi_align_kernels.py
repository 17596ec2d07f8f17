"""RoIAlign on a GPU: the sums of `roi_align`, with the weights computed where they are needed.

Nothing waits for the device and nothing is added by atomics: the forward pass has a program for each bin, the backward
pass one for each few pixels of the feature map, which goes through the RoIs in their order. So the gradient has the
same bits every time.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

PIXELS = 8  # of a row, that a program of the backward pass computes
CHANNELS = 256  # at most, of a program: with one warp, each thread loads 16 bytes of half precision at a time


def forward(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    step: int,
) -> Tensor:
    """Return `(bins of all RoIs, C)`; the arguments are those of `roi_align`, boxes in float32."""
    down, across = (-(-size // step) for size in output_size)
    channels = features[0].shape[1]
    out = features[0].new_empty(len(rois) * down * across, channels)
    block = _block(channels)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        _, _, height, width = feature.shape
        _forward[(len(rois) * down * across, triton.cdiv(channels, block))](
            feature,
            rois,
            levels,
            out,
            *feature.stride(),
            height,
            width,
            channels,
            scale,
            0.5 if aligned else 0.0,
            level,
            *output_size,
            down,
            across,
            step,
            RATIO=sampling_ratio,
            ALIGNED=aligned,
            CHANNELS=block,
            num_warps=1,
        )
    return out


def backward(
    gradient: Tensor,
    rois: Tensor,
    levels: Tensor,
    shapes: Sequence[Sequence[int]],
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    step: int,
) -> list[Tensor]:
    """Return the gradient of each level's features, `(N * H * W, C)`, from that of the bins of all RoIs, `(…, C)`."""
    down, across = (-(-size // step) for size in output_size)
    found = []
    for level, ((images, channels, height, width), scale) in enumerate(zip(shapes, scales, strict=True)):
        out = gradient.new_empty(images * height * width, channels)
        block = _block(channels)
        _backward[(images * height * triton.cdiv(width, PIXELS), triton.cdiv(channels, block))](
            gradient,
            rois,
            levels,
            out,
            len(rois),
            height,
            width,
            channels,
            scale,
            0.5 if aligned else 0.0,
            level,
            *output_size,
            down,
            across,
            step,
            RATIO=sampling_ratio,
            ALIGNED=aligned,
            PIXELS=PIXELS,
            CHANNELS=block,
            num_warps=1,
        )
        found.append(out)
    return found


def _block(channels: int) -> int:
    return min(triton.next_power_of_2(channels), CHANNELS)


@triton.jit
def _number_of_samples(extent, bins, RATIO: tl.constexpr):
    """Return how many samples a bin has in one direction."""
    usable = tl.abs(extent) < 1e9  # false for NaN
    if RATIO > 0:
        number = tl.where(usable, RATIO, 0)
    else:
        # An approximate quotient would give an RoI of exactly as many pixels a sample too many.
        quotient = tl.div_rn(tl.where(usable, extent, 0.0), tl.zeros_like(extent) + bins)
        number = tl.maximum(tl.ceil(quotient).to(tl.int32), 0)
    return number


@triton.jit
def _axis(low, high, scale, offset, bins, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an RoI's start in one direction, the size of its bins, their number of samples, and those' spacing.

    In pixels of the feature map.
    """
    start = low * scale - offset
    extent = high * scale - offset - start
    if not ALIGNED:
        extent = tl.maximum(extent, 1.0)
    samples = _number_of_samples(extent, bins, RATIO)
    size = extent / bins
    return start, size, samples, size / tl.maximum(samples, 1)


@triton.jit
def _pixels(begin, spacing, samples, size):
    """Return the first pixel that a bin reads, and the last."""
    first = begin + 0.5 * spacing
    last = begin + (samples - 0.5) * spacing
    low = tl.minimum(tl.maximum(tl.minimum(first, last), 0.0), size - 1.0)
    high = tl.minimum(tl.maximum(tl.maximum(first, last), 0.0), size - 1.0)
    return tl.floor(low).to(tl.int32), tl.minimum(tl.floor(high).to(tl.int32) + 1, size - 1)


@triton.jit
def _weight(pixel, begin, spacing, samples, size):
    """Return the weight of pixels in a bin: the mean over its samples of their bilinear weights."""
    total = pixel * 0.0
    for number in range(samples):
        at = begin + (number + 0.5) * spacing
        inside = (at >= -1.0) & (at <= size)
        at = tl.minimum(tl.maximum(at, 0.0), size - 1.0)
        total += tl.where(inside, tl.maximum(1.0 - tl.abs(at - pixel), 0.0), 0.0)
    return total / tl.maximum(samples, 1)


@triton.jit
def _bins_of(first, last, start, width, spacing, bins):
    """Return which bins may read pixels `first` to `last`: begin and end, for bins `spacing` apart."""
    low = tl.floor((first - 1.0 - width - start) / spacing).to(tl.int32)
    high = tl.ceil((last + 1.0 - start) / spacing).to(tl.int32) + 1
    narrow = spacing < 1e-3  # or turned around
    low = tl.where(narrow, 0, tl.maximum(low, 0))
    high = tl.where(narrow, bins, tl.minimum(high, bins))
    return low, high


@triton.jit
def _forward(
    features,
    rois,
    levels,
    out,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    height,
    width,
    channels,
    scale,
    offset,
    level,
    bins_down,
    bins_across,
    down,
    across,
    step,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A bin of an RoI, and CHANNELS channels of it."""
    bin_ = tl.program_id(0)
    roi = bin_ // (down * across)
    if tl.load(levels + roi) == level:
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        exists = channel < channels
        image = tl.load(rois + roi * 5).to(tl.int64)
        left, size_x, samples_x, spacing_x = _axis(
            tl.load(rois + roi * 5 + 1), tl.load(rois + roi * 5 + 3), scale, offset, bins_across, RATIO, ALIGNED
        )
        top, size_y, samples_y, spacing_y = _axis(
            tl.load(rois + roi * 5 + 2), tl.load(rois + roi * 5 + 4), scale, offset, bins_down, RATIO, ALIGNED
        )
        begin_x = left + (bin_ % across) * step * size_x
        begin_y = top + (bin_ // across % down) * step * size_y
        total = tl.zeros((CHANNELS,), dtype=tl.float32)
        if (samples_x > 0) & (samples_y > 0):
            first_x, last_x = _pixels(begin_x, spacing_x, samples_x, width)
            first_y, last_y = _pixels(begin_y, spacing_y, samples_y, height)
            for y in range(first_y, last_y + 1):
                weight_y = _weight(y * 1.0, begin_y, spacing_y, samples_y, height)
                row = features + image * stride_image + y * stride_row + channel * stride_channel
                for x in range(first_x, last_x + 1):
                    weight_x = _weight(x * 1.0, begin_x, spacing_x, samples_x, width)
                    values = tl.load(row + x * stride_column, mask=exists, other=0.0).to(tl.float32)
                    total += weight_y * weight_x * values
        place = out + bin_.to(tl.int64) * channels + channel
        tl.store(place, total.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    gradient,
    rois,
    levels,
    out,
    number_of_rois,
    height,
    width,
    channels,
    scale,
    offset,
    level,
    bins_down,
    bins_across,
    down,
    across,
    step,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """PIXELS pixels in a row of a feature map, and CHANNELS channels of them."""
    tiles = tl.cdiv(width, PIXELS)
    place = tl.program_id(0)
    image, y, first_x = place // tiles // height, place // tiles % height, place % tiles * PIXELS
    column = first_x + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    pixel_x, pixel_y = column.to(tl.float32), y.to(tl.float32)
    total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    for roi in range(number_of_rois):
        if (tl.load(rois + roi * 5).to(tl.int32) == image) & (tl.load(levels + roi) == level):
            left, size_x, samples_x, spacing_x = _axis(
                tl.load(rois + roi * 5 + 1), tl.load(rois + roi * 5 + 3), scale, offset, bins_across, RATIO, ALIGNED
            )
            top, size_y, samples_y, spacing_y = _axis(
                tl.load(rois + roi * 5 + 2), tl.load(rois + roi * 5 + 4), scale, offset, bins_down, RATIO, ALIGNED
            )
            low_y, high_y = _bins_of(pixel_y, pixel_y, top, size_y, size_y * step, down)
            low_x, high_x = _bins_of(first_x, first_x + PIXELS - 1.0, left, size_x, size_x * step, across)
            if (samples_x > 0) & (samples_y > 0) & (low_x < high_x):
                for bin_y in range(low_y, high_y):
                    weight_y = _weight(pixel_y, top + bin_y * step * size_y, spacing_y, samples_y, height)
                    if weight_y != 0.0:
                        row = gradient + (roi * down + bin_y).to(tl.int64) * across * channels + channel
                        for bin_x in range(low_x, high_x):
                            weight_x = _weight(pixel_x, left + bin_x * step * size_x, spacing_x, samples_x, width)
                            values = tl.load(row + bin_x * channels, mask=exists, other=0.0).to(tl.float32)
                            total += (weight_y * weight_x)[:, None] * values[None, :]
    pixel = (image * height + y).to(tl.int64) * width + column
    where = out + pixel[:, None] * channels + channel[None, :]
    tl.store(where, total.to(out.dtype.element_ty), mask=(column < width)[:, None] & exists[None, :])
