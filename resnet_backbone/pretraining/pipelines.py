"""Input pipelines: DATALOADER.PIPELINE selects where training images are decoded and augmented."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from resnet_backbone.data.classification import Batch, train_loader
from resnet_backbone.data.corrupt import CorruptCounter
from resnet_backbone.data.device import DeviceAugment, DevicePrefetcher, encoded_loader
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.padded_crop import PaddedCropTransform
from resnet_backbone.data.resident import BatchCrops, ResidentBatches
from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.data.transfer import to_device
from resnet_backbone.data.transforms import TrainTransform
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.pretraining.preprocessing import build_train_transform


class Pipeline(Protocol):
    """Endless training batches for this process; what a batch contains is up to the pipeline.

    Attributes:
        num_images: number of images in the data set.
    """

    num_images: int

    def __call__(self, start_iteration: int) -> Iterator[Any]:
        """Iterate over the batches, starting at an iteration."""

    def images_of(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch's images `(n, 3, H, W)` uint8 and labels `(n,)` on the device."""

    def names(self, iteration: int) -> list[str]:
        """Return the names of this process's images at an iteration."""


class _Sampled:
    """Base class of all pipelines: a source and the order in which its images are drawn."""

    def __init__(self, source: ClassificationSource, *, batch_size: int, seed: int, rank: int, world_size: int):
        self.num_images = len(source)
        self._source = source
        self._sampler = BatchSampler(self.num_images, batch_size, seed=seed, rank=rank, world_size=world_size)

    def names(self, iteration: int) -> list[str]:
        return [self._source.describe(index) for _, index in self._sampler.batch(iteration)]


class WorkersPipeline(_Sampled):
    """Worker processes decode and augment; a batch is a `Batch` in host memory.

    Args:
        source: the images.
        transform: the augmentation.
        batch_size: total batch size over all processes.
        seed: seed for the order and the augmentation.
        device: the training device.
        workers: number of worker processes; 0: load in this process.
        reduced_decoding, on_corrupt: see `train_loader`.
        count_corrupt: called on every batch; stops the run if too many images could not be read.
        rank, world_size: determine this process's share of a batch.
    """

    def __init__(
        self,
        *,
        source: ClassificationSource,
        transform: TrainTransform | PaddedCropTransform,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        workers: int,
        reduced_decoding: bool,
        on_corrupt: str,
        count_corrupt: CorruptCounter,
        rank: int = 0,
        world_size: int = 1,
    ):
        draws = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
        super().__init__(source, **draws)
        self._device = torch.device(device)
        self._count_corrupt = count_corrupt
        self._load = functools.partial(
            train_loader,
            source,
            transform,
            workers=workers,
            pin_memory=self._device.type == "cuda",
            reduced_decoding=reduced_decoding,
            on_corrupt=on_corrupt,
            **draws,
        )

    def __call__(self, start_iteration: int) -> Iterator[Batch]:
        return self._counted(self._load(start_iteration=start_iteration))

    def _counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._count_corrupt(len(batch.labels), batch.replaced)
            yield batch

    def images_of(self, batch: Batch | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels, *_ = batch
        return to_device(images, self._device), to_device(labels, self._device)


class DevicePipeline(_Sampled):
    """Worker processes only read files; the device decodes and augments. A batch is `(images, labels)` on the device.

    Arguments are as in WorkersPipeline.
    """

    def __init__(
        self,
        *,
        source: ClassificationSource,
        transform: TrainTransform,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        draws = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
        super().__init__(source, **draws)
        self._augment = DeviceAugment(transform, seed=seed, device=device)
        self._load = functools.partial(encoded_loader, source, transform, workers=workers, **draws)

    def __call__(self, start_iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(DevicePrefetcher(self._load(start_iteration=start_iteration), self._augment))

    def images_of(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return batch


class ResidentPipeline(_Sampled):
    """All images stay on the device; a batch is `BatchCrops`, which selects the images and their crops.

    Arguments are as in WorkersPipeline.
    """

    def __init__(
        self,
        *,
        source: ClassificationSource,
        transform: PaddedCropTransform,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
    ):
        draws = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
        super().__init__(source, **draws)
        self._resident = ResidentBatches(source, transform, device=device, **draws)

    def __call__(self, start_iteration: int) -> Iterator[BatchCrops]:
        return map(self._resident.crops, itertools.count(start_iteration))

    def images_of(self, batch: BatchCrops) -> tuple[torch.Tensor, torch.Tensor]:
        return self._resident.gather(*batch)


def build_pipeline(cfg: CfgNode, source: ClassificationSource) -> Pipeline:
    """Return the pipeline named by DATALOADER.PIPELINE, for this process's share of SOLVER.IMS_PER_BATCH.

    Raises:
        ConfigError: keys of INPUT or DATALOADER are invalid or incompatible.
    """
    name, on_corrupt = cfg.DATALOADER.PIPELINE, cfg.DATALOADER.ON_CORRUPT
    if cfg.SOLVER.CUDA_GRAPH and name != "resident":
        raise ConfigError(
            f"SOLVER.CUDA_GRAPH needs batches that are on the device, but DATALOADER.PIPELINE is {name}. Set it to "
            "resident, or CUDA_GRAPH to False."
        )
    transform = build_train_transform(cfg)
    shared = {
        "source": source,
        "transform": transform,
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "seed": cfg.SEED,
        "device": cfg.MODEL.DEVICE,
        "rank": comm.get_rank(),
        "world_size": comm.get_world_size(),
    }
    if name == "resident":
        if not isinstance(transform, PaddedCropTransform):
            raise ConfigError(
                "DATALOADER.PIPELINE is resident, which augments by INPUT.CROP.TYPE padded, not "
                f"{transform.crop_type}. Set PIPELINE to workers."
            )
        if on_corrupt != "stop":
            raise ConfigError(
                "DATALOADER.PIPELINE is resident, which reads all images at once and has no DATALOADER.ON_CORRUPT "
                f"{on_corrupt}. Set PIPELINE to workers."
            )
        return ResidentPipeline(**shared)
    workers = cfg.DATALOADER.NUM_WORKERS
    if name == "device":
        if not isinstance(transform, TrainTransform) or on_corrupt != "stop":
            raise ConfigError(
                "DATALOADER.PIPELINE is device, which has neither INPUT.CROP.TYPE padded nor DATALOADER.ON_CORRUPT "
                "skip. Set PIPELINE to workers."
            )
        return DevicePipeline(**shared, workers=workers)
    return WorkersPipeline(
        **shared,
        workers=workers,
        reduced_decoding=cfg.INPUT.REDUCED_DECODING,
        on_corrupt=on_corrupt,
        count_corrupt=CorruptCounter(cfg.DATALOADER.MAX_CORRUPT),
    )
