import itertools

import cv2
import numpy as np
import pytest
import torch

from resnet_backbone.data.classification import evaluation_loader, train_loader
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.padded_crop import PaddedCropTransform
from resnet_backbone.data.resident import ResidentBatches, ResidentEvaluation, gather_crops
from resnet_backbone.data.transforms import EvalTransform

COUNT = 37
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Memory(ClassificationSource):
    """Random images of 5 classes as PNG files."""

    def __init__(self, sizes) -> None:
        rng = np.random.default_rng(0)
        self.images = [cv2.imencode(".png", rng.integers(0, 256, (*size, 3), np.uint8))[1].tobytes() for size in sizes]
        super().__init__(list("abcde"), rng.integers(0, 5, len(self.images)))

    def read(self, index: int) -> bytes:
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"image {index}"


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


@pytest.fixture
def source() -> Memory:
    return Memory([(20, 24)] * COUNT)


def same(batches, references) -> bool:
    pairs = list(zip(batches, references, strict=True))
    return all(
        torch.equal(images.cpu(), reference[0]) and torch.equal(labels.cpu(), reference[1])
        for (images, labels), reference in pairs
    )


@pytest.mark.parametrize(
    "arguments",
    [
        dict(padding=4, crop=(20, 24)),
        dict(padding=2, crop=(17, 28), channel_order="BGR"),
        dict(padding=0, crop=(20, 24), flip=1.0),
        dict(padding=0, crop=(8, 8), flip=0.0),
    ],
)
@pytest.mark.parametrize("batch_size", [4, 37, 50, 100])
def test_equals_the_loader(source, device, arguments, batch_size):
    """The same bits over several epochs: batches that lie across their borders, and larger than the data set."""
    transform = PaddedCropTransform(**arguments)
    iterations = max(200 // batch_size, 5)
    resident = ResidentBatches(source, transform, batch_size=batch_size, seed=3, device=device)
    batches = list(itertools.islice(resident(0), iterations))
    assert same(batches, train_loader(source, transform, batch_size=batch_size, seed=3, iterations=iterations))
    images, labels = batches[0]
    assert images.shape == (batch_size, 3, *arguments["crop"]) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64 and images.device.type == labels.device.type == device


def test_from_any_iteration(source, device):
    transform = PaddedCropTransform(crop=(20, 24))
    for start in (0, 1, 9, 10, 1003):
        resident = ResidentBatches(source, transform, batch_size=4, seed=0, device=device)
        loader = train_loader(source, transform, batch_size=4, seed=0, start_iteration=start, iterations=12)
        assert same(itertools.islice(resident(start), 12), loader)


def test_ranks_share_a_batch(source, device):
    transform = PaddedCropTransform(crop=(20, 24))
    for rank in range(3):
        arguments = dict(batch_size=12, seed=1, rank=rank, world_size=3)
        resident = ResidentBatches(source, transform, device=device, **arguments)
        loader = train_loader(source, transform, start_iteration=2, iterations=9, **arguments)
        assert same(itertools.islice(resident(2), 9), loader)


def test_crops_in_any_order(source, device):
    """What is kept of one epoch does not leak into another."""
    resident = ResidentBatches(source, PaddedCropTransform(crop=(20, 24)), batch_size=5, seed=2, device=device)
    expected = list(itertools.islice(resident(0), 40))
    for iteration in (39, 0, 17, 8, 7, 39):
        crops = resident.crops(iteration)
        assert all(part.dtype == torch.int64 and part.shape == (5,) for part in crops)
        batch = gather_crops(resident.images, resident.labels, *crops, size=(20, 24))
        assert all(torch.equal(got, wanted) for got, wanted in zip(batch, expected[iteration], strict=True))


def test_every_image_once_an_epoch(source):
    resident = ResidentBatches(source, PaddedCropTransform(crop=(20, 24)), batch_size=37, seed=2, device="cpu")
    for epoch in range(3):
        assert resident.crops(epoch).indices.sort().values.tolist() == list(range(COUNT))


def test_gather_crops_follows_its_definition():
    """Window by window, in plain indexing."""
    rng = np.random.default_rng(1)
    images, labels = torch.from_numpy(rng.integers(0, 256, (6, 9, 11, 3), np.uint8)), torch.arange(6) * 7
    indices, top, left, flip = (torch.from_numpy(rng.integers(0, high, 30)) for high in (6, 5, 4, 2))
    windows, numbers = gather_crops(images, labels, indices, top, left, flip, size=(5, 8))
    for window, number, i, y, x, mirrored in zip(windows, numbers, indices, top, left, flip):
        expected = images[i, y : y + 5, x : x + 8].permute(2, 0, 1)
        assert torch.equal(window, expected.flip(2) if mirrored else expected) and number == 7 * i


@pytest.mark.gpu
def test_in_a_cuda_graph(source):
    transform = PaddedCropTransform(crop=(20, 24))
    resident = ResidentBatches(source, transform, batch_size=8, seed=0, device="cuda")
    crops = [part.clone() for part in resident.crops(0)]
    gather_crops(resident.images, resident.labels, *crops, size=(20, 24))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gather_crops(resident.images, resident.labels, *crops, size=(20, 24))
    batches = []
    for iteration in range(12):
        for kept, part in zip(crops, resident.crops(iteration)):
            kept.copy_(part)
        graph.replay()
        batches.append([part.clone() for part in result])
    assert same(batches, train_loader(source, transform, batch_size=8, seed=0, iterations=12))


@pytest.mark.gpu
def test_waits_for_the_device_never(source):
    """Neither a step nor the upload of an epoch's crops; torch raises where something would."""
    resident = ResidentBatches(source, PaddedCropTransform(crop=(20, 24)), batch_size=8, seed=0, device="cuda")
    batches = resident(0)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(itertools.islice(batches, 12))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("world_size", [1, 4, 50])
def test_evaluation_equals_the_loader(source, device, world_size):
    transform = EvalTransform(short_side=18, crop=(16, 18), channel_order="BGR")
    for rank in range(world_size):
        arguments = dict(batch_size=8, rank=rank, world_size=world_size)
        resident = ResidentEvaluation(source, transform, device=device, **arguments)
        loader = evaluation_loader(source, transform, **arguments)
        assert len(resident) == len(loader)
        for _ in range(2):
            assert same(resident, loader)


def test_images_of_different_sizes():
    sizes = [(20, 24)] * 5 + [(24, 20), (8, 8)]
    with pytest.raises(DatasetError, match=r"^image 5 has 24x20 pixels, but image 0 20x24; .* of one size"):
        ResidentBatches(Memory(sizes), PaddedCropTransform(crop=(8, 8)), batch_size=2, seed=0, device="cpu")


def test_a_crop_that_does_not_fit(source):
    with pytest.raises(DatasetError, match=r"image of 20x24 pixels with 4 added .* smaller than the crop of 32x32"):
        ResidentBatches(source, PaddedCropTransform(), batch_size=2, seed=0, device="cpu")


def test_an_unreadable_image(source):
    source.images[30] = source.images[30][:60]
    with pytest.raises(DatasetError, match="image 30 is unreadable"):
        ResidentBatches(source, PaddedCropTransform(crop=(8, 8)), batch_size=2, seed=0, device="cpu")
