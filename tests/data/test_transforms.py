import math

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_backbone.data.functional import PCA_VALUES, PCA_VECTORS, resize
from resnet_backbone.data.sampler import sample_rng
from resnet_backbone.data.transforms import EvalTransform, TrainTransform

PLAIN = dict(flip=0.0, pca_std=0.0)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    cells = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return np.array(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def ramp(height: int, width: int) -> np.ndarray:
    """Red gives the column and green the row (both in units of 1/255 of the image)."""
    image = np.full((height, width, 3), 77, np.uint8)
    image[:, :, 0] = np.rint(np.linspace(0, 255, width))
    image[:, :, 1] = np.rint(np.linspace(0, 255, height))[:, None]
    return image


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (90, 801), (256, 256)])
@pytest.mark.parametrize("short_side, crop", [(256, (224, 224)), (72, (64, 48))])
def test_eval_equals_torchvision(size, short_side, crop):
    """Resize and CenterCrop of Pillow images; at most one level away from rounding."""
    tv = pytest.importorskip("torchvision.transforms")
    image = smooth(*size)
    expected = tv.Compose([tv.Resize(short_side), tv.CenterCrop(crop), tv.PILToTensor()])(Image.fromarray(image))
    got = EvalTransform(short_side=short_side, crop=crop)(image)
    assert got.dtype == torch.uint8 and got.shape == (3, *crop) and got.is_contiguous()
    assert (got.int() - expected.int()).abs().max() <= 1


def reference_draws(size, short_side, crop, *, seed: int = 0, position: int):
    """Size of the resized image, top and left of the window in it, and the generator, for what is drawn after that."""
    draw = sample_rng(seed, position)
    height, width = size
    short = int(draw.integers(short_side[0], short_side[1] + 1))
    resized = (short, short * width // height) if height <= width else (short * height // width, short)
    top = int(draw.integers(0, resized[0] - crop[0] + 1))
    return resized, top, int(draw.integers(0, resized[1] - crop[1] + 1)), draw


def reference_train(image: np.ndarray, short_side: tuple[int, int], crop: tuple[int, int], position: int) -> np.ndarray:
    """Resize the whole image with Pillow, then crop it; the draws in the order of the implementation."""
    size, top, left, _ = reference_draws(image.shape[:2], short_side, crop, position=position)
    resized = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    return resized[top : top + crop[0], left : left + crop[1]]


@pytest.mark.parametrize("size", [(150, 200), (200, 150), (120, 90), (64, 64), (700, 900)])
def test_crop_before_resize_equals_resize_before_crop(size):
    """The window moves by up to half a source pixel; at its border, the neighbors outside are missing."""
    image = ramp(*size)
    for position in range(20):
        got = (
            TrainTransform(short_side=(256, 480), **PLAIN)(image, seed=0, position=position).numpy().transpose(1, 2, 0)
        )
        expected = reference_train(image, (256, 480), (224, 224), position)
        difference = np.abs(got - expected.astype(int))
        for channel, length in ((0, size[1]), (1, size[0])):
            pixel = 255 / (length - 1)  # in levels; the pixel values themselves are rounded
            assert difference[:, :, channel].max() <= 1.05 * pixel + 1.5
            assert difference[:, :, channel].mean() <= 0.75 * pixel + 0.5


def test_crop_without_resize_is_exact():
    image = smooth(64, 80)
    for position in range(10):
        got = TrainTransform(short_side=(64, 64), crop=(50, 64), **PLAIN)(image, seed=0, position=position)
        assert (got.numpy().transpose(1, 2, 0) == reference_train(image, (64, 64), (50, 64), position)).all()


def test_crops_cover_the_image_uniformly():
    """The window's place and size, read from an image whose colors are coordinates."""
    image = ramp(255, 340)
    transform = TrainTransform(short_side=(256, 480), crop=(224, 224), **PLAIN)
    firsts, extents = [], []
    for position in range(1500):
        pixels = transform(image, seed=0, position=position).numpy().astype(float)
        assert (pixels[2] == 77).all()
        extents.append((pixels[1].max() - pixels[1].min() + 1) / 256)
        firsts.append((pixels[0].min() / 255, pixels[1].min() / 255))
    # The window's height in the image is 224 / short side, for a short side uniform over 256...480.
    shares = 224 / np.arange(256, 481)
    assert abs(np.mean(extents) - shares.mean()) < 0.01
    assert min(extents) < shares.min() + 0.02 and max(extents) > shares.max() - 0.02
    # Its top lies uniformly between 0 and 1 - share; the mean has a standard error of 0.004.
    assert abs(np.mean([top for _, top in firsts]) - (1 - shares).mean() / 2) < 0.015
    assert abs(np.mean([left for left, _ in firsts]) - (1 - shares * 3 / 4).mean() / 2) < 0.015


def test_flip_mirrors_left_and_right():
    image = smooth(64, 80)
    plain = TrainTransform(short_side=(64, 64), crop=(64, 64), **PLAIN)(image, seed=0, position=3)
    flipped = TrainTransform(short_side=(64, 64), crop=(64, 64), flip=1.0, pca_std=0.0)(image, seed=0, position=3)
    assert torch.equal(flipped, plain.flip(2)) and not torch.equal(flipped, plain)
    half = TrainTransform(short_side=(64, 64), crop=(64, 64), flip=0.5, pca_std=0.0)
    pairs = [
        (half(image[:, :64], seed=0, position=position), image[:, :64].transpose(2, 0, 1)) for position in range(400)
    ]
    share = np.mean([not (got.numpy() == source).all() for got, source in pairs])
    assert 0.4 < share < 0.6


def test_color_shift_has_the_components_covariance():
    gray = np.full((8, 8, 3), 128, np.uint8)
    transform = TrainTransform(short_side=(8, 8), crop=(8, 8), flip=0.0, pca_std=0.1)
    pixels = np.array([transform(gray, seed=0, position=position).numpy()[:, 0, 0] for position in range(4000)], float)
    assert np.abs(pixels.mean(0) - 128).max() < 0.3
    expected = PCA_VECTORS @ np.diag((0.1 * PCA_VALUES) ** 2) @ PCA_VECTORS.T + np.eye(3) / 12  # rounding
    assert np.abs(np.cov(pixels.T) - expected).max() < 0.1 * expected.max()
    # The components are orthonormal, and the first is the brightness.
    assert np.abs(PCA_VECTORS.T @ PCA_VECTORS - np.eye(3)).max() < 1e-3
    assert np.ptp(PCA_VECTORS[:, 0]) < 0.02


def test_channel_order():
    image = smooth(64, 64)
    for make in (lambda order: TrainTransform(short_side=(64, 70), crop=(60, 60), channel_order=order),
                 lambda order: EvalTransform(short_side=64, crop=(60, 60), channel_order=order)):  # fmt: skip
        rgb, bgr = make("RGB")(image, seed=0, position=1), make("BGR")(image, seed=0, position=1)
        assert torch.equal(rgb.flip(0), bgr) and not torch.equal(rgb, bgr)
    assert EvalTransform(short_side=64, crop=(64, 64))(image)[0, 5, 7] == image[5, 7, 0]


def test_random_resized_windows_have_torchvisions_distribution():
    tv = pytest.importorskip("torchvision.transforms")
    height, width, area = 200, 300, (0.08, 1.0)
    transform = TrainTransform(crop_type="random_resized", area=area)
    ours = np.array([transform.draw(height, width, seed=0, position=position)[:4] for position in range(3000)], float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([tv.RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3]) for _ in range(3000)], float)
    for measure in (
        lambda w: w[:, 2] * w[:, 3] / (height * width),
        lambda w: np.log(w[:, 3] / w[:, 2]),
        lambda w: w[:, 0] / (height - w[:, 2] + 1),
        lambda w: w[:, 1] / (width - w[:, 3] + 1),
    ):
        a, b = measure(ours), measure(theirs)
        assert np.abs(np.quantile(a, [0.1, 0.5, 0.9]) - np.quantile(b, [0.1, 0.5, 0.9])).max() < 0.06


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 1), (3, 1000)])
@pytest.mark.parametrize("crop_type", ["absolute", "random_resized"])
def test_extreme_sizes(size, crop_type):
    transform = TrainTransform(short_side=(32, 40), crop=(32, 24), crop_type=crop_type)
    for position in range(20):
        assert transform(smooth(*size), seed=0, position=position).shape == (3, 32, 24)
    assert EvalTransform(short_side=32, crop=(32, 24))(smooth(*size)).shape == (3, 32, 24)


def test_random_resized_of_the_whole_image_is_a_resize():
    image = smooth(120, 120)
    transform = TrainTransform(crop_type="random_resized", area=(1.0, 1.0), crop=(64, 64), **PLAIN)
    expected = torch.from_numpy(resize(image, (64, 64)).transpose(2, 0, 1).copy())
    # Only a ratio near 1 fits; otherwise the largest allowed window, here the whole image, is taken.
    found = [torch.equal(transform(image, seed=0, position=position), expected) for position in range(40)]
    assert all(found)


def test_the_result_is_a_function_of_seed_and_position():
    image, transform = smooth(90, 120), TrainTransform(short_side=(70, 80), crop=(64, 64))
    first = transform(image, seed=3, position=1)
    assert torch.equal(transform(image, seed=3, position=1), first)
    assert not torch.equal(transform(image, seed=3, position=2), first)
    assert not torch.equal(transform(image, seed=4, position=1), first)
    assert (image == smooth(90, 120)).all()  # the input is left alone


@pytest.mark.parametrize("channel_order", ["RGB", "BGR"])
@pytest.mark.parametrize("size", [(90, 120), (64, 64)])  # resized, and cut out alone
def test_draw_and_apply_are_the_transform(channel_order, size):
    """The draws written out in their order, and the parameters carried out with torchvision's functions."""
    tv = pytest.importorskip("torchvision.transforms.functional")
    short_side = (64, 80) if size[0] > 64 else (64, 64)
    transform = TrainTransform(short_side=short_side, crop=(60, 56), pca_std=0.2, channel_order=channel_order)
    image = smooth(*size)
    flips = 0
    for position in range(8):
        parameters = transform.draw(*size, seed=9, position=position)
        *_, draw = reference_draws(size, short_side, (60, 56), seed=9, position=position)
        assert parameters.flip == (draw.random() < 0.5)
        assert np.array_equal(parameters.pca_weights, draw.normal(0, 0.2, 3))
        flips += parameters.flip
        pixels = tv.resized_crop(Image.fromarray(image), *parameters[:4], [60, 56])
        pixels = tv.pil_to_tensor(tv.hflip(pixels) if parameters.flip else pixels).double()
        shift = torch.from_numpy(PCA_VECTORS @ (parameters.pca_weights * PCA_VALUES)).view(3, 1, 1)
        expected = (pixels + shift).round().clip(0, 255)
        expected = expected if channel_order == "RGB" else expected.flip(0)
        got = transform.apply(image, parameters)
        difference = (got - expected).abs()
        assert got.dtype == torch.uint8 and got.is_contiguous() and difference.max() <= 2 and difference.mean() < 0.1
        assert torch.equal(transform(image, seed=9, position=position), got)
    assert 0 < flips < 8


@pytest.mark.parametrize("crop_type", ["absolute", "random_resized"])
def test_a_reduced_window_is_the_same_place(crop_type):
    """Its edges move by half a reduced pixel at most, and it is not smaller than the crop."""
    transform = TrainTransform(short_side=(100, 300), crop=(100, 80), crop_type=crop_type, **PLAIN)
    sizes, seen = np.random.default_rng(0).integers(90, 2000, (400, 2)), set()
    for position, (height, width) in enumerate(sizes.tolist()):
        parameters = transform.draw(height, width, seed=0, position=position)
        factor = transform.reduction(parameters)
        seen.add(factor)
        reduced = parameters.reduced(factor)
        for (first, length), (before, size), whole, target in zip(
            ((reduced.top, reduced.height), (reduced.left, reduced.width)),
            ((parameters.top, parameters.height), (parameters.left, parameters.width)),
            (height, width),
            transform.crop,
        ):
            assert abs(first * factor - before) <= factor / 2
            assert abs((first + length) * factor - (before + size)) <= factor / 2
            assert first >= 0 and first + length <= math.ceil(whole / factor)
            assert factor == 1 or length >= target
        larger = [f for f in (2, 4, 8) if parameters.height >= f * 100 and parameters.width >= f * 80]
        assert factor == max([1, *larger])
        assert reduced[4:] == parameters[4:]
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainTransform(short_side=(200, 300)), "224x224 pixels does not fit .* resized to 200"),
        (lambda: EvalTransform(short_side=60, crop=(32, 64)), "32x64 pixels does not fit .* at least 64"),
        (lambda: EvalTransform(crop=(0, 64)), "is empty"),
        (lambda: TrainTransform(short_side=(300, 256)), r"range \(300, 256\) is empty"),
        (lambda: TrainTransform(crop_type="relative"), "unknown crop type 'relative'; expected one of absolute"),
        (lambda: TrainTransform(area=(0.0, 1.0)), "share of the area"),
        (lambda: TrainTransform(flip=1.5), "expected a probability"),
        (lambda: TrainTransform(channel_order="rgb"), "unknown channel order 'rgb'; expected one of RGB, BGR"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
