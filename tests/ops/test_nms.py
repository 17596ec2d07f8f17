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
