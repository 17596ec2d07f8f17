"""Choose the images for each iteration: a batch is a pure function of the seed and the iteration.

A *position* counts samples over a whole run: iteration `i` covers positions `i * batch_size` up to, but not including,
`(i + 1) * batch_size`. The image at a position comes from the epoch's permutation, its augmentation from
`sample_rng(seed, position)`. So the number of workers, prefetching and the point where a run was stopped do not change
what the network sees, and an exact resume needs only one integer: the iteration.

With repeat factors an epoch has a fixed length all the same, so that a position still tells its epoch.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

# Single-group batches (say, of one orientation) are assembled within windows of this many batches.
GROUP_WINDOW = 64

# First word of each random stream's key, so that streams with the same seed are independent.
_PERMUTATION, _SAMPLE, _WINDOW = 1, 2, 3


def _rng(stream: int, seed: int, number: int) -> np.random.Generator:
    if seed < 0 or number < 0:
        raise ValueError(f"a random stream's seed and position must not be negative; got {seed} and {number}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((stream, seed, number))))


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The random generator for all draws at one position of a run."""
    return _rng(_SAMPLE, seed, position)


@contextmanager
def seeded_globals(seed: int, position: int) -> Iterator[None]:
    """Seed `random`, `numpy.random` and torch's CPU generator from (seed, position) inside the block.

    For augmentations that draw from the global generators, as Detectron2's do. The generators' previous states are
    always restored on exit.
    """
    words = [int(word) for word in _rng(_SAMPLE, seed, position).integers(0, 2**32, size=3, dtype=np.uint64)]
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(words[0])
        np.random.seed(words[1])
        # torch.manual_seed would also seed the GPUs, which a forked worker must not touch.
        torch.default_generator.manual_seed(words[2])
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class WeightedDraw:
    """Draw indices with probabilities proportional to `weights`, which are above 0.

    Call it with uniform random numbers of any shape, 0 to 1; it returns an index for each, int64.
    """

    def __init__(self, weights: Sequence[float] | np.ndarray) -> None:
        bounds = np.cumsum(weights, dtype=np.float64)
        self._bounds = bounds[:-1] / bounds[-1]

    def __call__(self, uniform: float | np.ndarray) -> np.ndarray:
        return np.searchsorted(self._bounds, uniform, side="right")


class BatchSampler:
    """Batches of `(position, index)` for `DataLoader(batch_sampler=...)`.

    Arguments:
        size: number of images in the data set.
        batch_size: images per batch over all ranks.
        seed: for the order; not negative.
        start_iteration: the first iteration to yield.
        iterations: number of batches to yield; None: endless.
        rank, world_size: this process gets the `rank`-th of `world_size` equal, contiguous slices of each batch.
        shuffle: if False, every epoch goes through the images in order.
        groups: a group number for each image, e.g. 0 for portrait and 1 for landscape. Batches then hold a single
            group wherever possible. Within a window of `GROUP_WINDOW` batches, each position is used exactly once;
            images left over after cutting each group into full batches form mixed batches.
        repeats: how often each image comes in an epoch, on average; above 0. A factor of 2.3 means two or three times,
            drawn for each epoch. None: each image once.

    Attributes:
        epoch_length: number of positions in an epoch: the sum of `repeats`, rounded.

    Raises ValueError if the sizes are inconsistent.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        start_iteration: int = 0,
        iterations: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        groups: Sequence[int] | np.ndarray | None = None,
        repeats: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"the data set holds {size} images; at least one is needed")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"a batch of {batch_size} images cannot be shared equally by {world_size} processes; "
                f"choose a positive multiple of {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} lies outside 0...{world_size - 1}")
        if seed < 0 or start_iteration < 0:
            raise ValueError(f"seed and first iteration must not be negative; got {seed} and {start_iteration}")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.start_iteration = start_iteration
        self.iterations = iterations
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.groups = None if groups is None else np.asarray(groups)
        if self.groups is not None and self.groups.shape != (size,):
            raise ValueError(f"groups has the shape {self.groups.shape}; expected one number for each of {size} images")
        self.epoch_length = size
        self._draw = None
        if repeats is not None:
            if np.shape(repeats) != (size,):
                raise ValueError(
                    f"repeats has the shape {np.shape(repeats)}; expected one number for each of {size} images"
                )
            self._draw = WeightedDraw(repeats)
            self.epoch_length = max(1, round(float(np.sum(repeats, dtype=np.float64))))
        self._epochs: dict[int, np.ndarray] = {}
        self._window: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        if self.iterations is None:
            raise TypeError("this sampler gives batches without end, so it has no length")
        return self.iterations

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        iteration = self.start_iteration
        while self.iterations is None or iteration < self.start_iteration + self.iterations:
            yield self.batch(iteration)
            iteration += 1

    def batch(self, iteration: int) -> list[tuple[int, int]]:
        """This rank's `(position, index)` pairs for one iteration; deterministic."""
        if self.groups is None:
            positions = np.arange(iteration * self.batch_size, (iteration + 1) * self.batch_size)
        else:
            positions = self._grouped(iteration // GROUP_WINDOW)[iteration % GROUP_WINDOW]
        share = self.batch_size // self.world_size
        positions = positions[self.rank * share : (self.rank + 1) * share]
        return list(zip(positions.tolist(), self.indices(positions).tolist(), strict=True))

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image at each position, `(n,)` int64."""
        indices = positions % self.epoch_length
        if self.shuffle or self._draw is not None:
            epochs = positions // self.epoch_length
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                indices[here] = self._epoch(epoch)[indices[here]]
        return indices

    def _epoch(self, epoch: int) -> np.ndarray:
        """The images of an epoch in their order, `(epoch_length,)` int64."""
        if epoch not in self._epochs:
            # A batch may span two epochs, so keep the previous one.
            self._epochs = {kept: order for kept, order in self._epochs.items() if kept == epoch - 1}
            rng, images = _rng(_PERMUTATION, self.seed, epoch), self.size
            if self._draw is not None:
                # Systematic sampling: points at equal distances, all moved by one random number, so that an image's
                # count is its factor rounded up or down, and the factor itself on average.
                images = self._draw((np.arange(self.epoch_length) + rng.random()) / self.epoch_length)
            self._epochs[epoch] = rng.permutation(images) if self.shuffle else images
        return self._epochs[epoch]

    def _grouped(self, window: int) -> np.ndarray:
        """The positions of all batches in one window, `(GROUP_WINDOW, batch_size)` int64."""
        if self._window is None or self._window[0] != window:
            count = GROUP_WINDOW * self.batch_size
            positions = np.arange(window * count, (window + 1) * count)
            group = self.groups[self.indices(positions)]
            full, rest = [], []
            for value in np.unique(self.groups):
                members = positions[group == value]
                cut = len(members) - len(members) % self.batch_size
                full.append(members[:cut])
                rest.append(members[cut:])
            batches = np.concatenate(full + rest).reshape(GROUP_WINDOW, self.batch_size)
            if self.shuffle:
                batches = batches[_rng(_WINDOW, self.seed, window).permutation(GROUP_WINDOW)]
            self._window = window, batches
        return self._window[1]


class EvaluationSampler:
    """Batches of `(position, index)` that cover every image exactly once across all ranks, in order.

    Rank `r` gets a contiguous shard. Shard sizes differ by at most one image, a shard's last batch may be smaller, and
    with more ranks than images some ranks get no batch. `position` equals `index`.
    """

    def __init__(self, size: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size} images was asked for; at least one is needed")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} lies outside 0...{world_size - 1}")
        self.batch_size = batch_size
        self.begin = size * rank // world_size
        self.end = size * (rank + 1) // world_size

    def __len__(self) -> int:
        return -(-(self.end - self.begin) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(self.begin, self.end, self.batch_size):
            yield [(index, index) for index in range(first, min(first + self.batch_size, self.end))]
