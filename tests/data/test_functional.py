import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from resnet_backbone.data.functional import (
    PCA_VALUES,
    PCA_VECTORS,
    center_offset,
    color_shift,
    mirrored_columns,
    orient,
    resize,
    shift_colors,
    to_planes,
    to_tensor,
)


def smooth(height: int, width: int) -> np.ndarray:
    cells = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    return np.array(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("source, target", [((300, 400), (150, 170)), ((40, 30), (64, 64)), ((99, 64), (64, 64))])
def test_resize_equals_pillow(source, target):
    image = smooth(*source)
    window = np.pad(image, ((3, 2), (5, 1), (0, 0)))[3:-2, 5:-1]  # a view, as a crop is
    expected = np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert abs(resize(window, target) - expected).max() <= 1


@pytest.mark.parametrize("size", [(9, 12), (10, 11), (8, 9)])
def test_center_crop_equals_torchvision(size):
    image = torch.arange(3 * size[0] * size[1]).view(3, *size)
    top, left = center_offset(size, (7, 8))
    assert torch.equal(image[:, top : top + 7, left : left + 8], reference.center_crop(image, [7, 8]))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channel_order", ["RGB", "BGR"])
def test_orientation_is_the_same_on_every_way(channel_order, flip):
    """An image of the host, a tensor and columns of it by index, all mirrored and ordered as torchvision mirrors."""
    image = smooth(20, 30)
    expected = reference.pil_to_tensor(reference.hflip(Image.fromarray(image)) if flip else Image.fromarray(image))
    expected = expected[[2, 1, 0]] if channel_order == "BGR" else expected
    assert torch.equal(to_tensor(image, channel_order=channel_order, flip=flip), expected)
    planes = torch.from_numpy(to_planes(image))
    assert torch.equal(orient(planes, channel_order=channel_order, flip=flip), expected)
    assert torch.equal(orient(planes[None], channel_order=channel_order, flip=flip)[0], expected)
    (columns,) = mirrored_columns(30, torch.tensor([flip]))
    assert torch.equal(orient(planes, channel_order=channel_order)[:, :, columns], expected)


def test_color_shift_equals_the_formula():
    image = smooth(64, 60)
    weights = np.random.default_rng(5).normal(0, 0.1, 3)
    # I + [p1 p2 p3] [w1 l1, w2 l2, w3 l3]^T, AlexNet paper, section 4.1.
    shift = sum(weights[k] * PCA_VALUES[k] * PCA_VECTORS[:, k] for k in range(3))
    for strength in (1, 100):
        expected = np.clip(np.rint(image + strength * shift), 0, 255).transpose(2, 0, 1)
        got = shift_colors(to_planes(image), strength * weights)
        assert got.dtype == np.uint8 and (got == expected).mean() > 0.999
        assert strength > 1 or (got == expected).all()


def test_color_shifts_of_a_batch_are_those_of_its_images():
    """The host shifts image by image, the device a batch at once: they round to the same levels."""
    weights = np.random.default_rng(6).normal(0, 0.1, (2000, 3))
    assert np.array_equal(color_shift(weights), np.stack([color_shift(row) for row in weights]))
