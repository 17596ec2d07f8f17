"""Build classification batches from a source, a transform and a sampler."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from resnet_backbone.data.decode import decode, jpeg_size
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.padded_crop import PaddedCropTransform
from resnet_backbone.data.sampler import BatchSampler, EvaluationSampler
from resnet_backbone.data.transforms import EvalTransform, TrainTransform
from resnet_backbone.data.workers import Loader
from resnet_backbone.errors import InputError

ON_CORRUPT = ("stop", "skip")

logger = logging.getLogger(__name__)

# First word of the key that replacements are drawn from; distinct from those of sampler.py's streams.
_REPLACEMENT = 4
# After this many unreadable images in a row, the data set is blamed instead of the image.
_ATTEMPTS = 20


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

    Another image, with its own label, replaces an unreadable one. It is drawn from the seed, the position and the
    number of failures there, so a resumed run sees the same one.
    """

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, list[str]]:
        position, index = key
        replaced = []
        while True:
            try:
                return *super().__getitem__((position, index)), replaced
            except DatasetError as error:
                replaced.append(str(error))
            if len(replaced) == _ATTEMPTS:
                raise DatasetError(
                    f"{_ATTEMPTS} images in a row, drawn at random, cannot be read; check the data set with "
                    f"tools/check_dataset.py. The last one: {replaced[-1]}"
                )
            rng = np.random.default_rng((_REPLACEMENT, self.seed, position, len(replaced)))
            index = int(rng.integers(len(self)))


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


class CorruptCounter:
    """Counts, in the training process, the images replaced by a loader with `on_corrupt="skip"`.

    Call it with each batch. It logs each unreadable image once, and raises DatasetError when the replaced share of the
    images seen exceeds `limit`. The first ten never stop a run unless `limit` is 0, since a share of few images says
    little. Each process of a run counts its own images, from its own start.
    """

    TOLERATED = 10

    def __init__(self, limit: float) -> None:
        if not 0 <= limit < 1:
            raise InputError(f"the limit of unreadable images is {limit}; expected a share: at least 0, less than 1")
        self.limit = limit
        self.images = 0
        self.replaced = 0
        self._known: set[str] = set()

    def __call__(self, batch: Batch) -> None:
        self.images += len(batch.labels)
        for sentence in batch.replaced:
            self.replaced += 1
            if sentence not in self._known:
                self._known.add(sentence)
                logger.warning("%s. Another image replaced it; %d so far", sentence, len(self._known))
        if self.replaced > max(self.limit * self.images, self.TOLERATED if self.limit else 0):
            raise DatasetError(
                f"{self.replaced} of the {self.images} images loaded so far could not be read and were replaced "
                f"({100 * self.replaced / self.images:.3g} %, {len(self._known)} different ones); the limit is "
                f"{100 * self.limit:.3g} %. The last one: {sentence}. Find all of them with tools/check_dataset.py and "
                "repair or remove them, or raise DATALOADER.MAX_CORRUPT"
            )
