import numpy as np
import pytest
import torch

from resnet_backbone.data.classification import evaluation_loader
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.sources import open_source
from resnet_backbone.data.subset import Subset, hold_out
from resnet_backbone.data.transforms import EvalTransform


class Numbers(ClassificationSource):
    """Images that are their own number."""

    def __init__(self, labels, classes: int = 10) -> None:
        super().__init__([f"class{number}" for number in range(classes)], np.array(labels, np.int64))

    def read(self, index: int) -> bytes:
        return b"%d" % index

    def describe(self, index: int) -> str:
        return f"number {index}"


def cifar_like() -> Numbers:
    return Numbers(np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000)))


def members(source: Subset) -> list[int]:
    return [int(source.read(index)) for index in range(len(source))]


def test_the_papers_split():
    """45,000 and 5,000 images (ResNet paper, section 4.2), 500 of each class held out."""
    source = cifar_like()
    rest, held_out = hold_out(source, 5000)
    assert len(rest) == 45000 and np.bincount(held_out.labels).tolist() == [500] * 10
    assert sorted(members(rest) + members(held_out)) == list(range(50000))
    for part in (rest, held_out):
        assert part.class_names == source.class_names and part.labels.dtype == np.int64
        assert np.array_equal(part.labels, source.labels[members(part)])
        assert part.describe(17) == f"number {members(part)[17]}"


def test_always_the_same_draw():
    """What one run held out, no other may train on, whatever NumPy's version: so the numbers are written down here."""
    labels = np.arange(40) % 4
    held_out = members(hold_out(Numbers(labels, 4), 8)[1])
    assert held_out == [4, 10, 25, 29, 30, 31, 35, 36]
    random = np.random.RandomState(0)
    random.permutation(4)  # which classes would give a remainder
    order = random.permutation(40).tolist()
    assert held_out == sorted(index for c in range(4) for index in [i for i in order if i % 4 == c][:2])


def test_the_draw_is_random():
    """No part of the data set and no neighborhood is preferred."""
    held_out = members(hold_out(cifar_like(), 5000)[1])
    blocks = np.bincount(np.array(held_out) // 1000, minlength=50)
    # Chi-square with 49 degrees of freedom lies in 20...95 with probability 0.9999; its variance here is a tenth less.
    assert 15 < ((blocks - 100) ** 2 / 100).sum() < 95
    neighbors = len(set(held_out) & {index + 1 for index in held_out})
    assert 400 < neighbors < 600  # 500 with a standard deviation of about 21


@pytest.mark.parametrize(
    "sizes, count, expected",
    [
        ([10, 10, 10], 7, [2, 2, 3]),
        ([10, 10, 10], 1, [0, 0, 1]),
        ([3, 100, 100], 22, [2, 10, 10]),
        ([3, 6, 100], 40, [2, 5, 33]),
        ([1, 50, 50], 3, [0, 1, 2]),
        ([0, 5, 5], 8, [0, 4, 4]),
        ([2, 2, 2], 3, [1, 1, 1]),
    ],
)
def test_shares_are_as_equal_as_the_classes_allow(sizes, count, expected):
    source = Numbers(np.repeat(np.arange(3), sizes), 3)
    rest, held_out = hold_out(source, count)
    assert sorted(np.bincount(held_out.labels, minlength=3).tolist()) == sorted(expected)
    assert len(rest) + len(held_out) == sum(sizes)
    assert all((np.bincount(rest.labels, minlength=3) >= 1) == (np.array(sizes) >= 1))


@pytest.mark.parametrize("count", [-1, 0, 28, 30, 31])
def test_impossible_counts(count):
    with pytest.raises(DatasetError, match=rf"^{count} images to hold out of 30 in 3 classes; expected 1 to 27"):
        hold_out(Numbers(np.repeat(np.arange(3), 10), 3), count)


def test_of_real_sources(shards):
    pattern, images, labels = shards
    rest, held_out = hold_out(open_source(pattern), 9)
    assert sorted([*map(rest.read, range(len(rest))), *map(held_out.read, range(9))]) == sorted(images)
    assert ".tar:key" in rest.describe(0)
    loader = evaluation_loader(held_out, EvalTransform(short_side=16, crop=(8, 8)), batch_size=4, workers=1)
    assert torch.cat([batch[1] for batch in loader]).tolist() == held_out.labels.tolist()
    assert [labels[images.index(held_out.read(index))] for index in range(9)] == held_out.labels.tolist()
