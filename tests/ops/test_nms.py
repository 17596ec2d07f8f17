"""Non-maximum suppression against torchvision's, whole."""

import pytest
import torch
import torchvision

from resnet_backbone.ops import batched_nms, nms


def random_boxes(number: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    corners = torch.rand(number, 2, generator=generator) * spread
    return torch.cat([corners, corners + 20 + 40 * torch.rand(number, 2, generator=generator)], dim=1)


@pytest.mark.parametrize("classes", [1, 3, 80])
@pytest.mark.parametrize("spread", [10, 100, 1000])
@pytest.mark.parametrize("number", [0, 1, 300, 1001, 5000])
@pytest.mark.parametrize("top", [1, 100, 2000])
def test_the_best_of_torchvisions(number, classes, spread, top):
    """A small spread leaves a few boxes, for which all must be looked at."""
    boxes, generator = random_boxes(number, spread), torch.Generator().manual_seed(1)
    scores = torch.randperm(number, generator=generator).float()  # no ties
    labels = torch.randint(classes, (number,), generator=generator)
    for threshold in (0.0, 0.5, 1.0):
        expected = torchvision.ops.batched_nms(boxes, scores, labels, threshold)[:top]
        assert torch.equal(batched_nms(boxes, scores, labels, threshold, top=top), expected)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlaps_that_equal_the_threshold(threshold, dtype):
    """Whole corners overlap by exactly 3 of 10, 1 of 2 or 7 of 10 by the thousands, also after the first 1,600 boxes.

    The nearest float32 is above some thresholds and below others, and the comparison is in double precision.
    """
    generator = torch.Generator().manual_seed(3)
    corners = torch.randint(12, (6000, 2), generator=generator)
    sides = torch.randint(11, (6000, 2), generator=generator)
    boxes = torch.cat([corners, corners + sides], dim=1).to(dtype)
    iou = torchvision.ops.box_iou(boxes[:500], boxes)
    assert (iou == torch.tensor(threshold, dtype=dtype)).sum() > 100
    scores, labels = torch.randperm(6000, generator=generator).to(dtype), torch.randint(2, (6000,), generator=generator)
    kept = batched_nms(boxes, scores, labels, threshold, top=800)
    of_each = [(labels == label).nonzero()[:, 0] for label in range(2)]
    expected = torch.cat([mine[torchvision.ops.nms(boxes[mine], scores[mine], threshold)] for mine in of_each])
    assert torch.equal(kept, expected[scores[expected].argsort(descending=True)][:800])


def test_boxes_that_are_none():
    """Infinite, NaN, empty and inverted ones among others, of which few are kept: as torchvision's."""
    boxes = random_boxes(5000, 60)
    boxes[::7, 2:] = boxes[::7, :2]
    boxes[1::7] = boxes[1::7].flip(1)
    boxes[2::70, 3] = torch.inf
    boxes[3::70, 0] = torch.nan
    scores = torch.randperm(5000, generator=torch.Generator().manual_seed(4)).float()
    expected = torchvision.ops.nms(boxes, scores, 0.2)
    assert len(expected) > 1500
    assert torch.equal(batched_nms(boxes, scores, torch.zeros(5000, dtype=torch.int64), 0.2, top=1500), expected[:1500])


def test_ties():
    """Thousands of equal scores and equal boxes: the first of them stays, as torchvision's stable order has it."""
    boxes = random_boxes(40, 1000).repeat(100, 1)
    kept = batched_nms(boxes, torch.zeros(4000), torch.zeros(4000, dtype=torch.int64), 0.99, top=50)
    assert torch.equal(kept, torch.arange(40))
    order = torchvision.ops.nms(boxes, torch.zeros(4000), 0.99)
    assert torch.equal(kept, order)


def test_a_batch_of_images():
    """Each as if alone; boxes that do not count are never kept, and missing ones are said to be missing."""
    boxes = torch.stack([random_boxes(300, 100), random_boxes(301, 30)[:300]])
    scores = torch.stack([torch.randperm(300).float(), torch.randperm(300).float()])
    scores[0, ::3] = -torch.inf
    classes = torch.randint(3, (2, 300))
    indices, there = nms(boxes, scores, classes, 0.5, 100)
    for image in range(2):
        counted = (scores[image] > -torch.inf).nonzero()[:, 0]
        one = boxes[image, counted], scores[image, counted], classes[image, counted]
        expected = counted[torchvision.ops.batched_nms(*one, 0.5)][:100]
        assert torch.equal(indices[image][there[image]], expected) and there[image].sum() == len(expected)
    assert not there.all() and not indices[~there].any()
    assert not nms(boxes, torch.full_like(scores, -torch.inf), classes, 0.5, 100)[1].any()
    torch.library.opcheck(torch.ops.resnet_backbone.nms.default, (boxes, scores, classes, 0.5, 100))
