"""Classification batches: a source, a transform and a sampler put together."""

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from resnet_backbone.data.decode import decode
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.sampler import BatchSampler, EvaluationSampler, sample_rng
from resnet_backbone.data.transforms import EvalTransform, TrainTransform


class ClassificationDataset(Dataset):
    """`dataset[position, index]` is the transformed image `(3, H, W)` uint8 and its label.

    What the transform draws is a function of `seed` and `position` alone (see sampler.py).
    """

    def __init__(self, source: ClassificationSource, transform: TrainTransform | EvalTransform, *, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        position, index = key
        image = decode(self.source.read(index), what=self.source.describe(index))
        return self.transform(image, sample_rng(self.seed, position)), int(self.source.labels[index])


def train_loader(
    source: ClassificationSource,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    start_iteration: int = 0,
    iterations: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Shuffled, augmented batches of `(images, labels)`, one for each iteration from `start_iteration` on.

    Images are `(batch_size / world_size, 3, H, W)` uint8, labels `(batch_size / world_size,)` int64. `iterations` is
    the number of batches to give (None: without end), `workers` the number of loading processes (0: load in this one).
    """
    dataset = ClassificationDataset(source, transform, seed=seed)
    sampler = BatchSampler(
        len(source),
        batch_size,
        seed=seed,
        start_iteration=start_iteration,
        iterations=iterations,
        rank=rank,
        world_size=world_size,
    )
    return _loader(dataset, sampler, workers, pin_memory)


def evaluation_loader(
    source: ClassificationSource,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of `(images, labels)` with every image exactly once over all ranks, in order.

    Images are `(n, 3, H, W)` uint8, labels `(n,)` int64, with `n` at most `batch_size` (of this rank alone).
    """
    dataset = ClassificationDataset(source, transform, seed=0)
    sampler = EvaluationSampler(len(source), batch_size=batch_size, rank=rank, world_size=world_size)
    return _loader(dataset, sampler, workers, pin_memory)


def _loader(dataset: Dataset, sampler: BatchSampler | EvaluationSampler, workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_single_thread,
        pin_memory=pin_memory,
        # The loader draws a number for its workers from this generator; from the global one it would shift the random
        # numbers (dropout's) of a run that was stopped and resumed.
        generator=torch.Generator(),
    )


def _single_thread(worker: int) -> None:
    """One thread per worker: the workers are the parallelism."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
