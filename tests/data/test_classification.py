import numpy as np
import pytest
import torch

from resnet_backbone.data.classification import ClassificationDataset, evaluation_loader, train_loader
from resnet_backbone.data.decode import decode
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.data.sources import open_source
from resnet_backbone.data.transforms import EvalTransform, TrainTransform

TRAIN = TrainTransform(short_side=(16, 24), crop=(16, 14))
UNCHANGED = EvalTransform(short_side=16, crop=(8, 8))  # draws nothing, so that images can be recognized
EVAL = EvalTransform(short_side=16, crop=(16, 16))


def equal(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    return all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(batches, others, strict=True))


def test_batches(shards):
    source = open_source(shards[0])
    for images, labels in train_loader(source, TRAIN, batch_size=6, seed=0, iterations=3):
        assert images.shape == (6, 3, 16, 14) and images.dtype == torch.uint8 and images.is_contiguous()
        assert labels.shape == (6,) and labels.dtype == torch.int64


def test_labels_belong_to_their_images(shards):
    _, images, labels = shards
    source = open_source(shards[0])
    expected = {UNCHANGED(decode(data, what="")).numpy().tobytes(): label for data, label in zip(images, labels)}
    seen = 0
    for pixels, numbers in train_loader(source, UNCHANGED, batch_size=8, seed=4, iterations=8):
        for image, label in zip(pixels, numbers.tolist()):
            assert expected[image.numpy().tobytes()] == label
            seen += 1
    assert seen == 64


def test_stopped_and_resumed_sees_the_same_batches(shards):
    """Tensor by tensor, augmentation included, mid-epoch, with and without workers."""
    source = open_source(shards[0])
    whole = list(train_loader(source, TRAIN, batch_size=4, seed=7, iterations=20))
    resumed = train_loader(open_source(shards[0]), TRAIN, batch_size=4, seed=7, start_iteration=11, iterations=9)
    assert equal(resumed, whole[11:])
    with_workers = train_loader(source, TRAIN, batch_size=4, seed=7, start_iteration=5, iterations=15, workers=2)
    assert equal(with_workers, whole[5:])
    other_seed = train_loader(source, TRAIN, batch_size=4, seed=8, iterations=20)
    assert not equal(other_seed, whole)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_equal_one_process(shards, world_size):
    source = open_source(shards[0])
    whole = train_loader(source, TRAIN, batch_size=8, seed=2, iterations=6)
    ranks = [
        train_loader(source, TRAIN, batch_size=8, seed=2, iterations=6, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [
        (torch.cat([images for images, _ in shares]), torch.cat([labels for _, labels in shares]))
        for shares in zip(*ranks, strict=True)
    ]
    assert equal(joined, whole)


def test_an_image_is_augmented_anew_in_each_epoch(shards):
    dataset = ClassificationDataset(open_source(shards[0]), TRAIN, seed=0)
    assert torch.equal(dataset[3, 5][0], dataset[3, 5][0])
    assert not torch.equal(dataset[3, 5][0], dataset[34, 5][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_every_image_once(shards, workers):
    _, images, labels = shards
    source = open_source(shards[0])
    expected = torch.stack([EVAL(decode(data, what="")) for data in images])
    for world_size in (1, 3):
        loaders = [
            evaluation_loader(source, EVAL, batch_size=4, workers=workers, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for _ in range(2 if workers else 1):  # the workers stay for a second evaluation
            batches = [batch for loader in loaders for batch in loader]
            assert torch.equal(torch.cat([x for x, _ in batches]), expected)
            assert torch.cat([y for _, y in batches]).tolist() == labels


def test_loading_leaves_the_global_generators_alone(shards):
    source = open_source(shards[0])
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    for workers in (0, 2):
        list(train_loader(source, TRAIN, batch_size=4, seed=7, iterations=3, workers=workers))
    assert (torch.rand(1), np.random.random()) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(write_tar, tmp_path, workers):
    write_tar(tmp_path / "a.tar", {"good.jpg": b"\xff\xd8 no image", "good.cls": b"0"})
    loader = train_loader(open_source(tmp_path / "a.tar"), TRAIN, batch_size=2, seed=0, iterations=1, workers=workers)
    with pytest.raises(DatasetError) as caught:
        next(iter(loader))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/a.tar:good is unreadable (") and "\n" not in message


def test_an_uneven_batch_is_refused(shards):
    with pytest.raises(ValueError, match="cannot be shared equally by 2 processes"):
        train_loader(open_source(shards[0]), TRAIN, batch_size=5, seed=0, world_size=2)


def test_real_images(tiny_imagenet):
    """32 images of 64x64 pixels, some of them grayscale, come out as the sampler and torchvision say."""
    tv = pytest.importorskip("torchvision.transforms.functional")
    source = open_source(tiny_imagenet / "val-000000.tar")
    transform = EvalTransform(short_side=64, crop=(56, 56))
    loader = train_loader(source, transform, batch_size=32, seed=3, start_iteration=200, iterations=1)
    images, labels = next(iter(loader))
    for (_, index), image, label in zip(BatchSampler(3000, 32, seed=3).batch(200), images, labels, strict=True):
        pixels = torch.from_numpy(decode(source.read(index), what="").transpose(2, 0, 1).copy())
        assert torch.equal(image, tv.center_crop(pixels, [56, 56])) and label == source.labels[index]
