"""RoIAlign against torchvision's, whose backward pass adds with atomics or one RoI after the other."""

import importlib

import pytest
import torch
import torchvision

from resnet_backbone.ops import roi_align

module = importlib.import_module("resnet_backbone.ops.roi_align")

HEIGHT, WIDTH, SCALE = 13, 17, 1 / 16

# Corners in pixels of the image; the feature map covers 272×208 of them.
USUAL = [[0.0, 0.0, 272.0, 208.0], [3.7, 10.2, 100.9, 55.5], [120.0, 90.0, 271.0, 207.0], [40.0, 0.0, 41.5, 200.0]]
DEGENERATE = {
    "no area": [[50.0, 60.0, 50.0, 60.0], [50.0, 60.0, 50.0, 90.0]],
    "smaller than a pixel": [[50.0, 60.0, 50.3, 60.2]],
    "turned around": [[90.0, 90.0, 30.0, 20.0], [90.0, 20.0, 30.0, 90.0]],
    "across the border": [[-30.0, -20.0, 40.0, 50.0], [200.0, 150.0, 300.0, 260.0]],
    "outside": [[-500.0, -500.0, -100.0, -100.0], [400.0, 300.0, 500.0, 400.0]],
    "around everything": [[-2000.0, -3000.0, 4000.0, 3000.0]],
    "on the last pixel": [[271.9, 207.9, 272.0, 208.0], [255.0, 191.0, 256.0, 192.0]],
}


def maps(images: int = 2, channels: int = 5, dtype: torch.dtype = torch.float64, scale: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = images, channels, HEIGHT * scale, WIDTH * scale
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def boxes(corners: list[list[float]], images: int = 2) -> torch.Tensor:
    return torch.tensor([[i % images, *box] for i, box in enumerate(corners)], dtype=torch.float64)


def random_boxes(number: int, images: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(number, 4, generator=generator, dtype=torch.float64) * torch.tensor([272.0, 208.0] * 2)
    low, high = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
    return torch.cat([torch.arange(number)[:, None] % images, low, high], dim=1)


def run(function, features: torch.Tensor, *arguments) -> list[torch.Tensor]:
    """Result and the features' gradient, for a random gradient of the result."""
    leaf = features.clone().requires_grad_()
    out = function(leaf, *arguments)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out.backward(gradient.to(out.dtype))
    return [out.detach(), leaf.grad]


def both(*arguments) -> list[torch.Tensor]:
    return run(ours, *arguments) + run(theirs, *arguments)


def ours(features, rois, size, ratio, aligned, step=1):
    return roi_align([features], rois, size, scales=[SCALE], sampling_ratio=ratio, aligned=aligned, step=step)


def theirs(features, rois, size, ratio, aligned, step=1):
    rois = rois.to(features.dtype)
    return torchvision.ops.roi_align(features, rois, size, SCALE, ratio, aligned)[:, :, ::step, ::step]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 5])
class TestAgainstTorchvision:
    @pytest.mark.parametrize("size", [(7, 7), (14, 14), (3, 5), (1, 1)])
    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_random_boxes(self, ratio, aligned, size, step):
        out, gradient, expected, expected_gradient = both(maps(), random_boxes(40), size, ratio, aligned, step)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("corners", DEGENERATE.values(), ids=DEGENERATE)
    def test_degenerate_boxes(self, ratio, aligned, corners):
        out, gradient, expected, expected_gradient = both(maps(), boxes(USUAL + corners), (7, 7), ratio, aligned)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)

    def test_float32(self, ratio, aligned):
        rois = random_boxes(200)
        out, gradient, expected, expected_gradient = both(maps(dtype=torch.float32), rois, (7, 7), ratio, aligned)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_features_and_weights_but_not_boxes(dtype):
    """Boxes in half precision would be off by pixels; the sums are exact to the dtype's last bits."""
    features, rois = maps(dtype=dtype), random_boxes(200)
    out, gradient = run(ours, features, rois, (7, 7), 0, True)
    expected, expected_gradient = run(theirs, features.double(), rois, (7, 7), 0, True)
    size = torch.finfo(dtype).eps
    assert out.dtype == gradient.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=size, atol=size * expected.abs().max().item())
    error = (gradient.double() - expected_gradient).abs().max() / expected_gradient.abs().max()
    assert error < 2 * size


def test_a_constant_map_stays_constant():
    """Independent of any implementation: inside the map, the weights of a bin sum to 1."""
    rois = boxes([[16.0, 16.0, 250.0, 190.0], [33.3, 44.4, 55.5, 66.6]])
    out = ours(torch.full((2, 3, HEIGHT, WIDTH), 2.5, dtype=torch.float64), rois, (7, 7), 0, True)
    torch.testing.assert_close(out, torch.full_like(out, 2.5), rtol=1e-14, atol=0)


def test_a_ramp_gives_the_centers_of_the_bins():
    """Bilinear interpolation of a linear function is exact, and so is the mean of its samples."""
    ramp = torch.arange(WIDTH, dtype=torch.float64).expand(1, 1, HEIGHT, WIDTH)
    out = ours(ramp, torch.tensor([[0.0, 32.0, 32.0, 176.0, 128.0]], dtype=torch.float64), (3, 3), 0, True)
    # The box is 9 pixels of the map wide and starts at 2; pixel i's center is at i + 0.5.
    torch.testing.assert_close(out[0, 0, 1], torch.tensor([3.0, 6.0, 9.0], dtype=torch.float64))


def test_gradcheck():
    features = maps(1, 2)[:, :, :5, :6].clone().requires_grad_()
    rois = torch.tensor([[0, 10.0, 5.0, 80.0, 70.0], [0, -20.0, 30.0, 40.0, 90.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: ours(f, rois, (3, 2), 2, True), features)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_levels_are_those_of_single_calls(layout):
    """As ROIPooler does it: each RoI on the level of its own."""
    features = [maps(dtype=torch.float32, scale=scale).to(memory_format=layout).requires_grad_() for scale in (4, 2, 1)]
    scales, rois = [1 / 4, 1 / 8, 1 / 16], random_boxes(60).float()
    levels = torch.arange(60) * 7 % 3
    out = roi_align(features, rois, (7, 7), scales=scales, levels=levels)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = torch.empty(out.shape)
    copies = [feature.detach().clone().requires_grad_() for feature in features]
    for level, (feature, scale) in enumerate(zip(copies, scales, strict=True)):
        mine = (levels == level).nonzero()[:, 0]
        expected[mine] = torchvision.ops.roi_align(feature, rois[mine], (7, 7), scale, 0, True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(out.shape)
    out.backward(gradient)
    expected.backward(gradient)
    for feature, copy in zip(features, copies, strict=True):
        torch.testing.assert_close(feature.grad, copy.grad, rtol=1e-4, atol=1e-4)


def test_no_rois():
    features = maps().requires_grad_()
    out = ours(features, torch.zeros(0, 5, dtype=torch.float64), (7, 7), 0, True)
    assert out.shape == (0, 5, 7, 7)
    out.sum().backward()
    assert not features.grad.any()


def test_chunks_change_nothing(monkeypatch):
    features, rois = maps(), random_boxes(50)
    whole = run(ours, features, rois, (7, 7), 0, True)
    monkeypatch.setattr(module, "CHUNK", 5000)
    parts = run(ours, features, rois, (7, 7), 0, True)
    assert len(module._chunks([torch.tensor([3.0] * 50)] * 2, [7, 7])) > 5
    torch.testing.assert_close(whole[0], parts[0], rtol=0, atol=0)
    torch.testing.assert_close(whole[1], parts[1])


def test_the_gradient_is_the_same_every_time():
    """Its sums have a fixed order, whatever the number of threads."""
    features, rois = maps(dtype=torch.float32, channels=64), random_boxes(300)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            found.append(run(ours, features, rois, (7, 7), 0, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for pair in found[1:] for one, other in zip(pair, found[0], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_box_that_is_not_finite_spoils_nothing_but_itself(bad):
    rois = boxes(USUAL)
    expected = ours(maps(), rois, (7, 7), 0, True)
    rois = torch.cat([rois, torch.tensor([[0, 10.0, 20.0, bad, 40.0]], dtype=torch.float64)])
    torch.testing.assert_close(ours(maps(), rois, (7, 7), 0, True)[:-1], expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operators_are_registered_as_torch_expects(layout):
    """Their schema, their shapes without values, and their gradients, for compilation and export."""
    features = maps(channels=2, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
    rois, levels = random_boxes(6).float(), torch.zeros(6, dtype=torch.int64)
    arguments = rois, levels, [3, 3], [SCALE], 0, True, 2
    torch.library.opcheck(torch.ops.resnet_backbone.roi_align.default, ([features], *arguments))
    gradient = torch.randn(6 * 4, 2)
    backward = gradient, rois, levels, list(features.shape), *arguments[2:]
    torch.library.opcheck(torch.ops.resnet_backbone.roi_align_backward.default, backward)
