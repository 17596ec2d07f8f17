import itertools
import time

import numpy as np
import pytest
import torch

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.padded_crop import PaddedCropTransform, random_words
from resnet_backbone.errors import InputError

EPOCH = np.arange(50000)


def splitmix64(state: int):
    """The generator as published, in whole numbers (Steele, Lea and Flood 2014; Vigna's splitmix64.c)."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = state
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        yield word ^ (word >> 31)


def test_reference_generator():
    """The numbers that implementations of SplitMix64 are checked with."""
    assert list(itertools.islice(splitmix64(1234567), 5)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**64 - 1, 2**70 + 3])
def test_words_are_splitmix64s(seed):
    positions = np.array([0, 1, 77, 2**40, 2**62])
    words = random_words(seed, positions, 3)
    key = next(splitmix64(seed % 2**64))
    for number, position in enumerate(positions.tolist()):
        stream = splitmix64((key + next(splitmix64(position))) % 2**64)
        assert [int(word[number]) for word in words] == list(itertools.islice(stream, 3))


def chi_square(counts: np.ndarray) -> float:
    """The statistic against equal probabilities, as a standard normal number (Wilson and Hilferty 1931)."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))


def draw(seed: int, positions: np.ndarray, **arguments):
    return PaddedCropTransform(**arguments).draw(32, 32, seed=seed, positions=positions)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_draws_are_uniform_and_independent(seed):
    """All 9 x 9 x 2 outcomes alike; also jointly with the next position's, the next epoch's and another seed's."""
    outcomes = [draw(seed, EPOCH), draw(seed, EPOCH + 1), draw(seed, EPOCH + 50000), draw(seed + 1, EPOCH)]
    for top, left, flip in outcomes:
        assert (top.min(), top.max(), left.min(), left.max()) == (0, 8, 0, 8) and set(flip) == {0, 1}
        assert abs(chi_square(np.bincount((top * 9 + left) * 2 + flip, minlength=162))) < 4.5
    sizes = (9, 9, 2)
    for other in outcomes[1:]:
        for a, b in itertools.product(range(3), range(3)):
            pairs = np.bincount(outcomes[0][a] * sizes[b] + other[b], minlength=sizes[a] * sizes[b])
            assert abs(chi_square(pairs)) < 4.5


def test_draws_follow_torchvision():
    """RandomCrop's distribution of places and RandomHorizontalFlip's of mirrors: chi-square of two samples."""
    transforms = pytest.importorskip("torchvision.transforms")
    reference = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
    transform = PaddedCropTransform()
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, 15, 15] = image[1, 15, 16] = 255  # two neighbors, a red and a green one

    def outcome(result: torch.Tensor) -> int:
        row, column = divmod(int(result[0].argmax()), 32)
        mirrored = int(result[1].argmax()) % 32 < column
        return ((row - 11) * 9 + column - (12 if mirrored else 11)) * 2 + mirrored

    torch.manual_seed(0)
    samples = 6000
    theirs = np.bincount([outcome(reference(image)) for _ in range(samples)], minlength=162)
    array = image.permute(1, 2, 0).numpy()
    ours = np.bincount([outcome(transform(array, seed=3, position=p)) for p in range(samples)], minlength=162)
    assert len(ours) == len(theirs) == 162
    statistic = ((ours - theirs) ** 2 / np.maximum(ours + theirs, 1)).sum()
    assert abs(statistic - 161) / np.sqrt(2 * 161) < 4


@pytest.mark.parametrize("padding, crop", [(4, (32, 32)), (0, (20, 24)), (3, (33, 40)), (0, (32, 40))])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_pixels_equal_torchvision_on_the_same_draws(padding, crop, order):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    transform = PaddedCropTransform(padding=padding, crop=crop, channel_order=order)
    top, left, flip = transform.draw(32, 40, seed=5, positions=np.arange(20))
    assert len(set(flip)) == 2
    for position in range(20):
        expected = functional.pad(torch.from_numpy(image).permute(2, 0, 1), [padding])
        expected = functional.crop(expected, top[position], left[position], *crop)
        expected = functional.hflip(expected) if flip[position] else expected
        got = transform(image, seed=5, position=position)
        assert got.is_contiguous() and got.dtype == torch.uint8
        assert torch.equal(got, expected if order == "RGB" else expected.flip(0))


def test_a_draw_alone_is_the_epochs():
    transform = PaddedCropTransform()
    epoch = transform.draw(32, 32, seed=9, positions=EPOCH)
    for position in (0, 1, 4999, 49999):
        alone = transform.draw(32, 32, seed=9, positions=np.array([position]))
        assert [int(part[0]) for part in alone] == [int(part[position]) for part in epoch]
        assert all(part.dtype == np.int64 and part.shape == (1,) for part in alone)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_probability_of_the_mirror(probability):
    share = draw(0, EPOCH, flip=probability).flip.mean()
    assert abs(share - probability) <= 4 * np.sqrt(probability * (1 - probability) / 50000)


def test_an_epoch_is_drawn_quickly():
    """In milliseconds; the limit only excludes a Python loop over images."""
    start = time.process_time()
    draw(0, EPOCH)
    assert time.process_time() - start < 0.2


def test_what_cannot_be():
    with pytest.raises(InputError, match="padding is -1"):
        PaddedCropTransform(padding=-1)
    with pytest.raises(InputError, match="crop of 0x32 pixels is empty"):
        PaddedCropTransform(crop=(0, 32))
    with pytest.raises(InputError, match=r"flip is 1\.5"):
        PaddedCropTransform(flip=1.5)
    with pytest.raises(InputError, match="channel order 'GBR'; expected one of RGB, BGR"):
        PaddedCropTransform(channel_order="GBR")
    with pytest.raises(DatasetError, match="image of 20x32 pixels with 4 added on each side is smaller than the crop"):
        PaddedCropTransform()(np.zeros((20, 32, 3), np.uint8), seed=0, position=0)
    with pytest.raises(ValueError, match="must not be negative"):
        random_words(-1, np.array([0]), 1)
    with pytest.raises(ValueError, match="must not be negative"):
        random_words(0, np.array([3, -1]), 1)
