import io
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from resnet_backbone.data import folders
from resnet_backbone.data.classification import (
    Batch,
    ClassificationDataset,
    evaluation_loader,
    train_loader,
)
from resnet_backbone.data.decode import decode, jpeg_size
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.folders import FolderSource
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.data.sources import open_source
from resnet_backbone.data.transforms import EvalTransform, TrainTransform

ROOT = Path(__file__).parents[2]
TRAIN = TrainTransform(short_side=(16, 24), crop=(16, 14))
SKIPPING = dict(on_corrupt="skip", batch_size=8, seed=5)
UNCHANGED = EvalTransform(short_side=16, crop=(8, 8))  # draws nothing, so that images can be recognized
EVAL = EvalTransform(short_side=16, crop=(16, 16))


def equal(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    return all(
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and one.replaced == other.replaced
        for one, other in zip(batches, others, strict=True)
    )


def test_batches(shards):
    source = open_source(shards[0])
    for images, labels, replaced in train_loader(source, TRAIN, batch_size=6, seed=0, iterations=3):
        assert images.shape == (6, 3, 16, 14) and images.dtype == torch.uint8 and images.is_contiguous()
        assert labels.shape == (6,) and labels.dtype == torch.int64 and replaced == []


def test_labels_belong_to_their_images(shards):
    _, images, labels = shards
    source = open_source(shards[0])
    expected = {UNCHANGED(decode(data, what="")).numpy().tobytes(): label for data, label in zip(images, labels)}
    seen = 0
    for pixels, numbers, _ in train_loader(source, UNCHANGED, batch_size=8, seed=4, iterations=8):
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
        Batch(torch.cat([share.images for share in shares]), torch.cat([share.labels for share in shares]), [])
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
    images, labels, _ = next(iter(loader))
    for (_, index), image, label in zip(BatchSampler(3000, 32, seed=3).batch(200), images, labels, strict=True):
        pixels = torch.from_numpy(decode(source.read(index), what="").transpose(2, 0, 1).copy())
        assert torch.equal(image, tv.center_crop(pixels, [56, 56])) and label == source.labels[index]


class Listed(ClassificationSource):
    """Encoded images in a list; image `i` is of class `i`."""

    def __init__(self, images: list[bytes]) -> None:
        super().__init__([str(number) for number in range(len(images))], np.arange(len(images)))
        self.images = images

    def read(self, index: int) -> bytes:
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"image {index}"


@pytest.fixture
def damaged(png) -> Listed:
    """20 images, a quarter of which cannot be read."""
    rng = np.random.default_rng(2)
    return Listed([png(rng, 16, 16) if number % 4 else b"no image" for number in range(20)])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced(damaged, workers):
    loader = train_loader(damaged, UNCHANGED, iterations=12, workers=workers, **SKIPPING)
    sampler = BatchSampler(20, 8, seed=5)
    sentences = set()
    for iteration, (images, labels, replaced) in enumerate(loader):
        sentences |= set(replaced)
        wanted = [index for _, index in sampler.batch(iteration)]
        # A replacement may itself be unreadable: then there is more than one sentence for a place.
        assert len(replaced) >= sum(index % 4 == 0 for index in wanted)
        for image, label, index in zip(images, labels.tolist(), wanted, strict=True):
            assert label == index if index % 4 else label % 4
            assert torch.equal(image, UNCHANGED(decode(damaged.read(label), what="")))
    found = "(8 bytes that are no image of a known format); replace or remove it"
    assert sentences == {f"image {number} is unreadable {found}" for number in range(0, 20, 4)}


def test_replacements_are_a_function_of_seed_and_position(damaged):
    whole = list(train_loader(damaged, TRAIN, iterations=8, **SKIPPING))
    assert any(batch.replaced for batch in whole[3:])
    assert equal(train_loader(damaged, TRAIN, start_iteration=3, iterations=5, workers=2, **SKIPPING), whole[3:])
    labels = [batch.labels for batch in whole]
    dataset = train_loader(damaged, TRAIN, **SKIPPING).dataset
    other = train_loader(damaged, TRAIN, **{**SKIPPING, "seed": 6}).dataset
    drawn = [dataset[position, 0][1] for position in range(64)]
    assert len(set(drawn)) > 10  # not always the same one
    assert drawn != [other[position, 0][1] for position in range(64)]
    ranks = [list(train_loader(damaged, TRAIN, iterations=8, rank=k, world_size=2, **SKIPPING)) for k in (0, 1)]
    assert all(torch.equal(torch.cat([a.labels, b.labels]), c) for a, b, c in zip(*ranks, labels))
    assert all(a.replaced + b.replaced == c.replaced for a, b, c in zip(*ranks, whole))


def test_skipping_changes_nothing_where_all_is_well(shards):
    source = open_source(shards[0])
    plain = train_loader(source, TRAIN, batch_size=8, seed=5, iterations=5)
    assert equal(train_loader(source, TRAIN, iterations=5, **SKIPPING), plain)


def test_a_set_without_a_readable_image_stops():
    loader = train_loader(Listed([b""] * 9), TRAIN, iterations=1, **SKIPPING)
    with pytest.raises(DatasetError, match=r"20 images in a row, drawn at random, cannot be read.*image \d is empty"):
        next(iter(loader))


def test_evaluation_never_skips(damaged):
    with pytest.raises(DatasetError, match="image 0 is unreadable"):
        list(evaluation_loader(damaged, EVAL, batch_size=4))


def test_an_unknown_way_of_treating_them_is_refused(damaged):
    with pytest.raises(ValueError, match="on_corrupt is 'ignore'; expected one of stop, skip"):
        train_loader(damaged, TRAIN, batch_size=4, seed=0, on_corrupt="ignore")


def test_pinning_keeps_the_batch(monkeypatch):
    """What torch does to a batch with `pin_memory`, with a stand-in for the copy itself, which needs a GPU."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self + 1)
    batch = Batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ["a is empty"])
    pinned = pin_memory(batch)
    assert type(pinned) is Batch and pinned.replaced == ["a is empty"]
    assert pinned.images.unique().tolist() == pinned.labels.unique().tolist() == [1]


@pytest.mark.gpu
def test_pinned_batches(damaged):
    batch = next(iter(train_loader(damaged, TRAIN, pin_memory=True, workers=1, iterations=4, **SKIPPING)))
    assert type(batch) is Batch and batch.images.is_pinned() and batch.labels.is_pinned()


def differences(images: list[bytes], transform: TrainTransform) -> dict[int, list[float]]:
    """Mean absolute difference in levels between reduced and full decoding, by the factor of reduction."""
    full, reduced = (
        ClassificationDataset(Listed(images), transform, seed=1, reduced_decoding=reduce) for reduce in (False, True)
    )
    found = {}
    for number, data in enumerate(images):
        one, other = full[number, number][0].int(), reduced[number, number][0].int()
        assert one.shape == other.shape
        factor = transform.reduction(transform.draw(*jpeg_size(data), seed=1, position=number))
        found.setdefault(factor, []).append((one - other).abs().float().mean().item())
    return found


@pytest.mark.parametrize("crop_type", ["absolute", "random_resized"])
def test_reduced_decoding_of_a_large_jpeg(crop_type):
    """1000 by 1500 pixels, structures of 50 pixels and finer ones: less than 3 levels."""
    rng, images = np.random.default_rng(0), []
    for cells, size in (((20, 30, 3), (1500, 1000)), ((30, 20, 3), (1000, 1500))):
        image = Image.fromarray(rng.integers(0, 256, cells, np.uint8)).resize(size, Image.Resampling.BICUBIC)
        detail = np.asarray(
            Image.fromarray(rng.integers(0, 25, (size[1] // 5, size[0] // 5, 3), np.uint8)).resize(size)
        )
        buffer = io.BytesIO()
        Image.fromarray(cv2.add(np.asarray(image), detail)).save(buffer, "JPEG", quality=90)
        images += [buffer.getvalue()] * 5
    found = differences(images, TrainTransform(crop_type=crop_type))
    assert max(found) >= 2
    for factor, values in found.items():
        assert max(values) == 0 if factor == 1 else 0 < max(values) < 4 and np.mean(values) < 3


@pytest.mark.parametrize("crop_type", ["absolute", "random_resized"])
def test_reduced_decoding_of_photographs(voc, crop_type):
    """The stated tolerance: 5 levels in the mean over photographs, of which the window's rounding makes the most."""
    images = [path.read_bytes() for path in sorted((voc / "images").glob("*.jpg"))[:60]]
    found = differences(images, TrainTransform(short_side=(64, 140), crop=(64, 64), crop_type=crop_type))
    assert {1, 2, 4} <= set(found)
    assert max(found[1]) == 0
    assert np.mean(found[2]) < 5 and np.mean(found[4]) < 5


def test_reduced_decoding_is_left_to_jpegs_and_windows(png):
    """Other forms, other transforms and damaged headers go the usual way."""
    rng = np.random.default_rng(0)
    large = TrainTransform(short_side=(16, 24), crop=(16, 14))
    for data, transform in ((png(rng, 300, 200), large), (png(rng, 300, 200), EVAL)):
        one, other = (
            ClassificationDataset(Listed([data]), transform, seed=0, reduced_decoding=reduce)[3, 0][0]
            for reduce in (False, True)
        )
        assert torch.equal(one, other)
    broken = ClassificationDataset(
        Listed([b"\xff\xd8\xff\xc0\0\x11\x08\0\0\0\0"]), large, seed=0, reduced_decoding=True
    )
    with pytest.raises(DatasetError, match="image 0 is unreadable"):
        broken[0, 0]


def print_a_workers_memory(class_folders, png, private_memory):
    """Print the MB of a worker after its first batch and 15 batches later, reading from a million images."""
    image = png(np.random.default_rng(0), 8, 8)
    names = [f"ant/n{number:09d}_a_name_as_long_as_usual.jpg" for number in range(1_000_000)]
    FolderSource.read = lambda self, index: image if self.describe(index) else b""
    folders._images_below = lambda root, name: names if name == "ant" else ["x"]
    source = FolderSource(class_folders)
    names.clear()
    assert len(source) == 1_000_002
    transform = TrainTransform(short_side=(8, 8), crop=(8, 8), pca_std=0.0)
    batches = iter(train_loader(source, transform, batch_size=512, seed=0, workers=1))
    next(batches)
    worker = batches._workers[0].pid
    print(private_memory(worker))
    for _ in range(15):
        next(batches)
    print(private_memory(worker))


def test_a_workers_memory_does_not_grow_with_what_it_reads(class_folders, private_memory):
    """Names in Python strings would be copied page by page, here 25 MB.

    In a process of its own: a worker also writes to what its parent freed, which is much after many tests.
    """
    script = (
        "import sys; from tests.data import conftest, test_classification as tests; "
        "tests.print_a_workers_memory(sys.argv[1], conftest._png, conftest._private_memory)"
    )
    done = subprocess.run([sys.executable, "-c", script, class_folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert after - before < 4
