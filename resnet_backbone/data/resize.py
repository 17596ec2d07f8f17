"""Crop, resize and mirror many images of different sizes: bilinear with antialiasing.

`resize_each` is the reference: it applies torch's operator to each window in turn. `resize_windows` computes the same
in a few operations, however many windows there are. It is for GPUs, where every operation is a launch from Python; on a
CPU, `resize_each` is about three times as fast.

Resizing is linear and separable: `out = W_y @ window @ W_x.T`. A group's windows are zero-padded to the size of the
largest, in one canvas, and each is multiplied by its own weights.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from resnet_backbone.data.functional import mirrored_columns
from resnet_backbone.data.transfer import to_device

Window = tuple[int, int, int, int]  # top, left, height and width in pixels of its image

# The memory of one group. Windows of 256 ImageNet-size photographs, resized to 224x224, form six to eight groups;
# because of MAX_PADDING, twice the memory would hardly reduce that.
GROUP_BYTES = 256 * 2**20
# A group's canvas has at most this many times the pixels of any of its windows.
MAX_PADDING = 3


def resize_each(
    images: Sequence[torch.Tensor], windows: Sequence[Window], size: tuple[int, int], flip: Sequence[bool]
) -> torch.Tensor:
    """Cut a window from each image, resize it to height and width `size`, and mirror it where `flip` is set.

    Arguments:
        images: `(3, h, w)` uint8 each, of any sizes, all on one device; at least one.
        windows: one per image, inside it.

    Returns `(n, 3, *size)` float32 in 0...255, not rounded.
    """
    resized = []
    for view, mirrored in zip(_views(images, windows), flip, strict=True):
        pixels = functional.interpolate(view[None].float(), size=size, mode="bilinear", antialias=True)[0]
        resized.append(pixels.flip(2) if mirrored else pixels)
    return torch.stack(resized)


def resize_windows(
    images: Sequence[torch.Tensor],
    windows: Sequence[Window],
    size: tuple[int, int],
    flip: Sequence[bool],
    *,
    group_bytes: int = GROUP_BYTES,
) -> torch.Tensor:
    """Do what `resize_each` does, with a number of operations that grows with groups, not images.

    A group's canvas, weights and half-resized lines take at most `group_bytes` of memory, unless the group is a single
    image. A result's last bits depend on its group.

    Matrix products use float32, even under autocast. If the process allows TF32 for them, which torch does only on
    request, they use TF32: values are off by up to 0.25, and 3% of them round to the next level. That setting is
    process-wide. Changing it here, in a thread alongside the training, would occasionally change the training's
    products.
    """
    views = _views(images, windows)
    shapes = [tuple(view.shape[1:]) for view in views]
    groups = _groups(shapes, size, group_bytes)
    order = [index for group in groups for index in group]
    device = images[0].device
    table = to_device(torch.tensor([[*shapes[index], flip[index], index] for index in order]), device)
    heights, widths, mirrored, places = table.unbind(1)
    longest = max(height for height, _ in shapes), max(width for _, width in shapes)
    rows = _Axis(heights, longest[0], size[0])
    columns = _Axis(widths, longest[1], size[1], mirrored.bool())

    resized = torch.empty((len(views), 3, *size), device=device)
    start = 0
    for group in groups:
        part = slice(start, start + len(group))
        start = part.stop
        canvas = _canvas([views[index] for index in group])
        count, height, _, width = canvas.shape
        with torch.autocast(device.type, enabled=False):
            lines = torch.bmm(rows.weights(part, height), canvas.view(count, height, 3 * width))
            pixels = torch.bmm(lines.view(count, size[0] * 3, width), columns.weights(part, width).transpose(1, 2))
        resized.index_copy_(0, places[part], pixels.view(count, size[0], 3, size[1]).transpose(1, 2))
    return resized


class _Axis:
    """The weights along rows or columns: the triangle filter of `interpolate(mode="bilinear", antialias=True)`.

    Output `i` of `out` averages the inputs around `(i + 0.5) * scale`, where `scale` is `length / out`. The weight of
    the input at `j + 0.5` falls linearly to 0 at a distance of `scale` pixels, or of 1 when enlarging.

    `lengths` is `(n,)`, each window's number of inputs; `longest` is their maximum; `mirrored` is `(n,)` bool.
    """

    def __init__(self, lengths: torch.Tensor, longest: int, out: int, mirrored: torch.Tensor | None = None) -> None:
        lengths = lengths[:, None]
        scales = lengths.float() / out
        inputs = torch.arange(longest, device=lengths.device) + 0.5
        outputs = torch.arange(out, device=lengths.device) if mirrored is None else mirrored_columns(out, mirrored)
        self._inputs = inputs.masked_fill(inputs > lengths, torch.inf)  # (n, longest); the padding gets no weight
        self._centers = (outputs + 0.5) * scales  # (n, out)
        self._reaches = scales.clamp(min=1)  # (n, 1)

    def weights(self, part: slice, longest: int) -> torch.Tensor:
        """Weights `(windows in part, out, longest)` float32; each row sums to 1."""
        weights = (self._inputs[part, None, :longest] - self._centers[part, :, None]).abs_()
        torch.sub(self._reaches[part, :, None], weights, out=weights).clamp_(min=0)
        return weights.div_(weights.sum(2, keepdim=True))


def _views(images: Sequence[torch.Tensor], windows: Sequence[Window]) -> list[torch.Tensor]:
    return [
        image[:, top : top + height, left : left + width]
        for image, (top, left, height, width) in zip(images, windows, strict=True)
    ]


def _canvas(views: list[torch.Tensor]) -> torch.Tensor:
    """Lay out views `(3, height, width)` as `(n, h, 3, w)` float32, each at the top left of zeros.

    The channels lie between rows and columns so that one matrix product handles all three.
    """
    height, width = max(view.shape[1] for view in views), max(view.shape[2] for view in views)
    canvas = torch.zeros((len(views), height, 3, width), device=views[0].device)
    places = [place[:, : view.shape[1], : view.shape[2]] for place, view in zip(canvas.transpose(1, 2).unbind(), views)]
    torch._foreach_copy_(places, views)
    return canvas


def _groups(shapes: list[tuple[int, int]], size: tuple[int, int], group_bytes: int) -> list[list[int]]:
    """Group the indices of windows to resize together, largest first."""
    groups: list[list[int]] = []
    canvas = 0, 0
    for index in sorted(range(len(shapes)), key=lambda index: shapes[index][0] * shapes[index][1], reverse=True):
        height, width = shapes[index]
        grown = max(canvas[0], height), max(canvas[1], width)
        if (
            groups
            and grown[0] * grown[1] <= MAX_PADDING * height * width
            and (len(groups[-1]) + 1) * _bytes(*grown, *size) <= group_bytes
        ):
            groups[-1].append(index)
            canvas = grown
        else:
            groups.append([index])
            canvas = height, width
    return groups


def _bytes(height: int, width: int, out_height: int, out_width: int) -> int:
    """Memory of one window in a group: canvas, half-resized lines, and both axes' weights."""
    return 4 * (3 * width * (height + out_height) + height * out_height + width * out_width)
