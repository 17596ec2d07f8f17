"""RoIPool against torchvision's, and its gradient in a fixed order against torchvision's."""

import pytest
import torch
import torchvision

from resnet_backbone.ops import roi_pool
from resnet_backbone.ops.roi_pool import scattered
from tests.ops.test_roi_align import DEGENERATE, SCALE, USUAL, boxes, maps, random_boxes, run

CASES = {"usual": boxes(USUAL), "random": random_boxes(40), "none": torch.zeros(0, 5, dtype=torch.float64)}
CASES |= {name: boxes(corners) for name, corners in DEGENERATE.items()}


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (14, 9)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_torchvisions(case, size):
    rois = CASES[case]
    ours = run(roi_pool, maps(), rois, size, SCALE)
    theirs = run(torchvision.ops.roi_pool, maps(), rois, size, SCALE)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_in_a_fixed_order_is_torchvisions(case, dtype):
    features, rois = maps(dtype=dtype), CASES[case].to(dtype)
    pooled, argmax = torch.ops.torchvision.roi_pool(features, rois, SCALE, 7, 5)
    gradient = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    expected = torch.ops.torchvision._roi_pool_backward(gradient, rois, argmax, SCALE, 7, 5, *features.shape)
    torch.testing.assert_close(scattered(gradient, rois, argmax, features.shape), expected)


def test_half_precision_features_are_pooled_in_float32_with_boxes_as_they_are():
    features, rois = maps(dtype=torch.bfloat16), random_boxes(40)
    expected = run(torchvision.ops.roi_pool, features.float(), rois.float(), (7, 7), SCALE)
    for with_autocast in (False, True):
        with torch.autocast("cpu", enabled=with_autocast):
            found = run(roi_pool, features, rois.float(), (7, 7), SCALE)
        assert found[0].dtype == found[1].dtype == torch.bfloat16
        assert torch.equal(found[0].float(), expected[0])  # a maximum is one of the features
        torch.testing.assert_close(found[1].float(), expected[1], atol=0.02, rtol=0.02)


def test_gradcheck_where_the_maxima_are_apart():
    features = torch.randperm(2 * 3 * 13 * 17, generator=torch.Generator().manual_seed(0)).double().view(2, 3, 13, 17)
    assert torch.autograd.gradcheck(lambda x: roi_pool(x, boxes(USUAL), (3, 3), SCALE), features.requires_grad_())


@pytest.mark.gpu
def test_on_a_gpu_the_gradient_has_the_same_bits_every_time(monkeypatch):
    features, rois = maps(channels=64, dtype=torch.float32).cuda(), random_boxes(200).float().cuda()
    expected = run(torchvision.ops.roi_pool, features.cpu(), rois.cpu(), (7, 7), SCALE)
    torch.use_deterministic_algorithms(True)
    try:
        found = [run_on_gpu(features, rois) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0].cpu(), expected[1])


def run_on_gpu(features: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
    leaf = features.clone().requires_grad_()
    out = roi_pool(leaf, rois, (7, 7), SCALE)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out.backward(gradient.to(out.dtype).cuda())
    return leaf.grad
