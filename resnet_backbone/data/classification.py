"""Build classification batches from a source, a transform and a sampler."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, default_collate

from resnet_backbone.data.corrupt import ON_CORRUPT, first_readable
from resnet_backbone.data.decode import decode, jpeg_size
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.padded_crop import PaddedCropTransform
from resnet_backbone.data.sampler import BatchSampler, EvaluationSampler
from resnet_backbone.data.transforms import EvalTransform, TrainTransform
from resnet_backbone.data.workers import Loader
from resnet_backbone.errors import InputError


class Batch(NamedTuple):
    """The training data for one iteration.

    Attributes:
        images: `(n, 3, h, w)` uint8.
        labels: `(n,)` int64.
        replaced: one sentence for each unreadable image that was replaced; usually empty.
    """

    images: torch.Tensor
    labels: torch.Tensor
    replaced: list[str]


class ClassificationDataset(Dataset):
    """`dataset[position, index]` is the transformed image `(3, H, W)` uint8 and its label.

    What the transform draws is a function of `seed` and `position` alone (see sampler.py).

    With `reduced_decoding`, a JPEG is decoded at a half, a quarter or an eighth of its size, provided that a
    TrainTransform's window stays at least as large as its crop. Other transforms see full-size images.
    """

    def __init__(
        self,
        source: ClassificationSource,
        transform: TrainTransform | PaddedCropTransform | EvalTransform,
        *,
        seed: int,
        reduced_decoding: bool = False,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.reduced_decoding = reduced_decoding and isinstance(transform, TrainTransform)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        position, index = key
        data, what = self.source.read(index), self.source.describe(index)
        if self.reduced_decoding and (size := jpeg_size(data)) and min(size) > 0:
            parameters = self.transform.draw(*size, seed=self.seed, position=position)
            factor = self.transform.reduction(parameters)
            pixels = self.transform.apply(decode(data, what=what, reduction=factor), parameters.reduced(factor))
        else:
            pixels = self.transform(decode(data, what=what), seed=self.seed, position=position)
        return pixels, int(self.source.labels[index])


class ReplacingDataset(ClassificationDataset):
    """A ClassificationDataset with a third element, the sentences about unreadable images.

    Another image, with its own label, replaces an unreadable one (`corrupt.first_readable`).
    """

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, list[str]]:
        position, index = key
        load = super().__getitem__
        sample, replaced = first_readable(
            lambda drawn: load((position, drawn)), index, size=len(self), seed=self.seed, position=position
        )
        return *sample, replaced


def train_loader(
    source: ClassificationSource,
    transform: TrainTransform | PaddedCropTransform,
    *,
    batch_size: int,
    seed: int,
    start_iteration: int = 0,
    iterations: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    reduced_decoding: bool = False,
    on_corrupt: str = "stop",
) -> Loader:
    """Load shuffled, augmented batches, one `Batch` per iteration from `start_iteration` on.

    Arguments:
        batch_size: images per batch over all ranks; a rank's share is `batch_size / world_size`.
        iterations: the number of batches to yield; None: endless.
        workers: the number of loading processes; 0: load in this one.
        reduced_decoding: decode large JPEGs at a fraction of their size (see ClassificationDataset).
        on_corrupt: how to handle an unreadable image. "stop": raise a DatasetError that names it. "skip": replace it
            with another image and report that in the batch's `replaced`, which a CorruptCounter reads.
    """
    if on_corrupt not in ON_CORRUPT:
        raise InputError(f"on_corrupt is {on_corrupt!r}; expected one of {', '.join(ON_CORRUPT)}")
    kind = ReplacingDataset if on_corrupt == "skip" else ClassificationDataset
    dataset = kind(source, transform, seed=seed, reduced_decoding=reduced_decoding)
    sampler = BatchSampler(
        len(source),
        batch_size,
        seed=seed,
        start_iteration=start_iteration,
        iterations=iterations,
        rank=rank,
        world_size=world_size,
    )
    return Loader(dataset, sampler, workers=workers, collate_fn=collate, pin_memory=pin_memory)


def evaluation_loader(
    source: ClassificationSource,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    collate_samples: Callable[[list[tuple]], tuple] = default_collate,
) -> Loader:
    """Load batches of `(images, labels)`, with every image exactly once across all ranks, in order.

    Images are `(n, 3, H, W)` uint8, labels `(n,)` int64, with `n` at most `batch_size` (for this rank alone). Images
    are decoded at full size, and an unreadable one always stops the run.
    """
    dataset = ClassificationDataset(source, transform, seed=0)
    sampler = EvaluationSampler(len(source), batch_size=batch_size, rank=rank, world_size=world_size)
    return Loader(dataset, sampler, workers=workers, collate_fn=collate_samples, pin_memory=pin_memory)


def collate(samples: list[tuple]) -> Batch:
    """Collate samples `(image, label)` or `(image, label, sentences)` into a batch."""
    replaced = [sentence for sample in samples for sentence in (sample[2] if len(sample) > 2 else ())]
    return Batch(*default_collate([sample[:2] for sample in samples]), replaced)
