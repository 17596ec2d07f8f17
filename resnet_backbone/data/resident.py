"""Small data sets that live entirely on the device, where a batch is one gather.

The batches are bit-identical to those of `train_loader` with a `PaddedCropTransform`, and of `evaluation_loader`.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from resnet_backbone.data.decode import decode
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.functional import mirrored_columns
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.padded_crop import PaddedCropTransform
from resnet_backbone.data.sampler import BatchSampler, EvaluationSampler
from resnet_backbone.data.transfer import to_device


class BatchCrops(NamedTuple):
    """A batch's images and their crops, each `(n,)` int64 on the device; `flip` is 0 or 1."""

    indices: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    flip: torch.Tensor


class ResidentBatches:
    """Shuffled, augmented batches from images that all live on the device.

    `resident(start_iteration)` iterates endlessly over `(images, labels)`: `(n, 3, *crop)` uint8, stored channels last,
    and `(n,)` int64, both on the device, with `n = batch_size / world_size`. For each iteration in turn, it yields
    `resident.gather(*crops)` with `crops = resident.crops(iteration)`. `crops` returns slices of data that is computed
    and uploaded once per epoch. `gather` launches the same operators on the same tensor shapes each time, so a CUDA
    graph can record it. Neither waits for the device.

    Attributes:
        images: `(N, H + 2 * padding, W + 2 * padding, 3)` uint8, in the transform's channel order, with black padding.
        labels: `(N,)` int64.

    Raises DatasetError if the images differ in size.
    """

    def __init__(
        self,
        source: ClassificationSource,
        transform: PaddedCropTransform,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler = BatchSampler(len(source), batch_size, seed=seed, rank=rank, world_size=world_size)
        self._transform = transform
        self._device = torch.device(device)
        pixels = _decode_all(source)
        self._size = pixels.shape[1:3]
        transform.draw(*self._size, seed=seed, positions=np.zeros(1, np.int64))  # checks that the crop fits
        if transform.channel_order == "BGR":
            pixels = pixels[..., ::-1]
        sides = (transform.padding, transform.padding)
        padded = np.pad(pixels, ((0, 0), sides, sides, (0, 0)))
        self.images = torch.from_numpy(padded).to(self._device)
        self.labels = torch.from_numpy(source.labels).to(self._device)
        self._block: tuple[int, torch.Tensor] | None = None

    def __call__(self, start_iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for iteration in itertools.count(start_iteration):
            yield self.gather(*self.crops(iteration))

    def gather(self, *crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather images `(n, 3, *crop)` uint8, stored channels last, and labels `(n,)` given a `BatchCrops`' fields."""
        return gather_crops(self.images, self.labels, *crops, size=self._transform.crop)

    def crops(self, iteration: int) -> BatchCrops:
        """This rank's part of one iteration's batch; deterministic."""
        sampler = self._sampler
        length = -(-sampler.size // sampler.batch_size)  # iterations in a block: an epoch, rounded up
        number = iteration // length
        if self._block is None or self._block[0] != number:
            self._block = number, self._upload(number * length, length)
        return BatchCrops(*self._block[1][iteration % length].unbind())

    def _upload(self, first: int, iterations: int) -> torch.Tensor:
        """Upload the crops of several iterations, `(iterations, 4, n)` int64 on the device."""
        sampler = self._sampler
        share = sampler.batch_size // sampler.world_size
        positions = np.arange(first, first + iterations)[:, None] * sampler.batch_size
        positions = (positions + sampler.rank * share + np.arange(share)).reshape(-1)
        parameters = self._transform.draw(*self._size, seed=sampler.seed, positions=positions)
        block = np.stack([sampler.indices(positions), *parameters]).reshape(4, iterations, share)
        return to_device(torch.from_numpy(np.ascontiguousarray(block.transpose(1, 0, 2))), self._device)


def gather_crops(
    images: torch.Tensor,
    labels: torch.Tensor,
    indices: torch.Tensor,
    top: torch.Tensor,
    left: torch.Tensor,
    flip: torch.Tensor,
    *,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut crops of height and width `size` from padded images `(N, H, W, 3)`; other arguments as in `BatchCrops`.

    Returns `(n, 3, *size)`, stored channels last, and labels `(n,)`.
    """
    rows = top[:, None] + torch.arange(size[0], device=images.device)
    columns = left[:, None] + mirrored_columns(size[1], flip != 0)
    windows = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2), labels[indices]


class ResidentEvaluation:
    """This rank's share of a source, as in `evaluation_loader`, transformed once and kept on the device.

    Iterates any number of times over `(images, labels)`: `(n, 3, H, W)` uint8 and `(n,)` int64 on the device, with `n`
    at most `batch_size` (for this rank alone). `transform` returns one image size and is not random (EvalTransform).
    """

    def __init__(
        self,
        source: ClassificationSource,
        transform: Callable[..., torch.Tensor],
        *,
        batch_size: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler = EvaluationSampler(len(source), batch_size=batch_size, rank=rank, world_size=world_size)
        begin, end = self._sampler.begin, self._sampler.end
        images = [transform(_decode(source, index), seed=0, position=index) for index in range(begin, end)]
        self._images = (torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)).to(device)
        self._labels = torch.from_numpy(source.labels[begin:end]).to(device)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, len(self._labels), self._batch_size):
            here = slice(first, first + self._batch_size)
            yield self._images[here], self._labels[here]


def _decode(source: ClassificationSource, index: int) -> np.ndarray:
    return decode(source.read(index), what=source.describe(index))


def _decode_all(source: ClassificationSource) -> np.ndarray:
    """Decode all images of a source to `(N, H, W, 3)` uint8 RGB."""
    first = _decode(source, 0)
    pixels = np.empty((len(source), *first.shape), np.uint8)
    pixels[0] = first
    for index in range(1, len(source)):
        image = _decode(source, index)
        if image.shape != first.shape:
            raise DatasetError(
                f"{source.describe(index)} has {image.shape[0]}x{image.shape[1]} pixels, but {source.describe(0)} "
                f"{first.shape[0]}x{first.shape[1]}; images that are all kept on the device must be of one size: "
                "resize them, or load them with worker processes"
            )
        pixels[index] = image
    return pixels
