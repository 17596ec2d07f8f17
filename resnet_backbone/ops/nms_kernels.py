"""Non-maximum suppression on a GPU: all images in two launches, and nothing waits for the device.

First the overlaps of all pairs, as bits; then one program for each image goes through its boxes from the best on and
stops at the number wanted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = 64


def nms(boxes: Tensor, usable: Tensor, classes: Tensor, threshold: float, top: int) -> tuple[Tensor, Tensor]:
    """Return the places of the first `top` boxes kept `(N, top)`, and how many there are `(N,)`.

    Args:
        boxes: `(N, K, 4)` float32, by descending score.
        usable: `(N, K)`; the others are neither kept nor suppress any.
        classes: `(N, K)` integers.
    """
    images, number = usable.shape
    words = triton.cdiv(number, BITS)
    overlaps = torch.empty((images, number, words), dtype=torch.int64, device=boxes.device)
    kept = torch.zeros((images, top), dtype=torch.int64, device=boxes.device)
    counts = torch.empty(images, dtype=torch.int64, device=boxes.device)
    # Fused multiply-adds would make overlaps differ from torchvision's in the last bit.
    _overlaps[(words, words, images)](
        boxes, classes, overlaps, number, words, threshold, BITS=BITS, num_warps=8, enable_fp_fusion=False
    )
    _resolve[(images,)](
        overlaps, usable, kept, counts, number, words, top, BITS=BITS, WORDS=triton.next_power_of_2(words)
    )
    return kept, counts


@triton.jit
def _overlaps(boxes, classes, overlaps, number, words, threshold, BITS: tl.constexpr):
    """Which of BITS boxes are suppressed by each of BITS boxes before them."""
    rows, columns, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if columns >= rows:
        one = rows * BITS + tl.arange(0, BITS)
        other = columns * BITS + tl.arange(0, BITS)
        start = boxes + image.to(tl.int64) * number * 4
        x1 = tl.load(start + one * 4, mask=one < number, other=0.0)
        y1 = tl.load(start + one * 4 + 1, mask=one < number, other=0.0)
        x2 = tl.load(start + one * 4 + 2, mask=one < number, other=0.0)
        y2 = tl.load(start + one * 4 + 3, mask=one < number, other=0.0)
        kind = tl.load(classes + image * number + one, mask=one < number, other=0)
        left = tl.load(start + other * 4, mask=other < number, other=0.0)
        top = tl.load(start + other * 4 + 1, mask=other < number, other=0.0)
        right = tl.load(start + other * 4 + 2, mask=other < number, other=0.0)
        bottom = tl.load(start + other * 4 + 3, mask=other < number, other=0.0)
        its_kind = tl.load(classes + image * number + other, mask=other < number, other=0)
        area, its_area = (x2 - x1) * (y2 - y1), (right - left) * (bottom - top)
        width = tl.minimum(x2[:, None], right[None, :]) - tl.maximum(x1[:, None], left[None, :])
        height = tl.minimum(y2[:, None], bottom[None, :]) - tl.maximum(y1[:, None], top[None, :])
        common = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        overlap = tl.div_rn(common, area[:, None] + its_area[None, :] - common)
        suppressed = (overlap > threshold) & (kind[:, None] == its_kind[None, :]) & (other[None, :] > one[:, None])
        bits = tl.where(suppressed, tl.full((BITS, BITS), 1, tl.int64) << tl.arange(0, BITS)[None, :].to(tl.int64), 0)
        place = (image.to(tl.int64) * number + one) * words + columns
        tl.store(overlaps + place, tl.sum(bits, axis=1), mask=one < number)


@triton.jit
def _resolve(overlaps, usable, kept, counts, number, words, top, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Go through an image's boxes; keep each that no kept one suppresses."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WORDS)
    suppressed = tl.zeros((WORDS,), dtype=tl.int64)
    count = 0
    block = 0
    while (block < words) & (count < top):
        word = tl.sum(tl.where(column == block, suppressed, 0))
        for bit in range(BITS):
            place = block * BITS + bit
            exists = (place < number) & (count < top)
            is_usable = tl.load(usable + image * number + place, mask=exists, other=0).to(tl.int32)
            if (is_usable != 0) & (((word >> bit) & 1) == 0):
                tl.store(kept + image * top + count, place)
                count += 1
                row = overlaps + (image * number + place) * words
                word |= tl.load(row + block)
                suppressed |= tl.load(row + column, mask=(column >= block) & (column < words), other=0)
        block += 1
    tl.store(counts + image, count)
