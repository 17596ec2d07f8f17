"""The kernels on a GPU against torchvision's and the plain functions."""

import pytest
import torch
import torchvision

from resnet_backbone.ops import batched_nms, nms, roi_align

pytestmark = pytest.mark.gpu

SCALES = [1 / 4, 1 / 8, 1 / 16]


def pyramid(dtype: torch.dtype, channels: int = 96) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, channels, 100 >> i, 152 >> i, generator=generator) for i in range(3)]
    return [m.to("cuda", dtype, memory_format=torch.channels_last).requires_grad_() for m in maps]


def regions(number: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(number, 4, generator=generator) * torch.tensor([608.0, 400.0] * 2)
    low, high = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
    rois = torch.cat([torch.arange(number)[:, None] % 2, low, high], dim=1)
    return rois.cuda(), (torch.arange(number) * 7 % 3).cuda()


def pooled(features, rois, levels, **options):
    out = roi_align(features, rois, (7, 7), scales=SCALES, levels=levels, **options)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    out.backward(gradient)
    return out.detach(), [feature.grad for feature in features], gradient


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_roi_align_is_torchvisions(dtype, tolerance, ratio, aligned):
    features, (rois, levels) = pyramid(dtype), regions()
    out, gradients, gradient = pooled(features, rois, levels, sampling_ratio=ratio, aligned=aligned)
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        mine, exact = levels == level, feature.detach().double().requires_grad_()
        expected = torchvision.ops.roi_align(exact, rois[mine].double(), (7, 7), scale, ratio, aligned)
        expected.backward(gradient[mine].double())
        for found, wanted in ((out[mine], expected), (gradients[level], exact.grad)):
            assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_regions_of_whole_bins_have_as_many_samples_as_torchvisions():
    """An approximate quotient of the side and the number of bins, rounded up, would give some a sample too many."""
    features = [feature.detach() for feature in pyramid(torch.float32)]
    sides = torch.arange(1, 100).repeat(2, 1).T  # in pixels of the first level
    rois = torch.cat([torch.zeros(99, 3), 4.0 * sides], dim=1).cuda()
    levels = torch.zeros(99, dtype=torch.int64).cuda()
    out = roi_align(features, rois, (7, 7), scales=SCALES, levels=levels)
    expected = torchvision.ops.roi_align(features[0], rois, (7, 7), SCALES[0], aligned=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradient_has_the_same_bits_every_time(dtype):
    rois, levels = regions(2000)
    first, *others = (pooled(pyramid(dtype), rois, levels)[1] for _ in range(3))
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))


def test_every_other_bin():
    rois, levels = regions()
    whole = pooled(pyramid(torch.float32), rois, levels)[0][:, :, ::2, ::2]
    torch.testing.assert_close(pooled(pyramid(torch.float32), rois, levels, step=2)[0], whole)


@pytest.mark.parametrize("top", [10, 1000, 4000])
@pytest.mark.parametrize("spread", [50, 1000])
def test_nms_keeps_what_the_cpu_keeps(spread, top):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 4000, 2, generator=generator) * spread
    boxes = torch.cat([corners, corners + 20 + 40 * torch.rand(3, 4000, 2, generator=generator)], dim=2)
    # All different: torchvision leaves the order of equal scores open.
    scores = torch.stack([torch.randperm(4000, generator=generator) for _ in range(3)]) / 4000
    scores[:, ::9] = -torch.inf
    classes = torch.randint(5, (3, 4000), generator=generator)
    indices, there = nms(boxes.cuda(), scores.cuda(), classes.cuda(), 0.7, top)
    expected, wanted = nms(boxes, scores, classes, 0.7, top)
    assert torch.equal(there.cpu(), wanted) and torch.equal(indices.cpu(), expected)


def test_batched_nms_is_torchvisions():
    boxes = torch.rand(3000, 4).cuda() * 100
    boxes[:, 2:] += boxes[:, :2]
    scores, classes = torch.rand(3000).cuda(), torch.randint(80, (3000,)).cuda()
    expected = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)[:100]
    assert torch.equal(batched_nms(boxes, scores, classes, 0.5, top=100), expected)
