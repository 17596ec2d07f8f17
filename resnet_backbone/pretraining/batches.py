"""From the configuration to training batches and to the network's input."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from resnet_backbone.data.classification import ON_CORRUPT, Batch, CorruptCounter, train_loader
from resnet_backbone.data.device import DeviceAugment, DevicePrefetcher, encoded_loader
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.padded_crop import PaddedCropTransform
from resnet_backbone.data.resident import ResidentBatches
from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.data.transforms import TrainTransform
from resnet_backbone.engine.config import ConfigError


class Normalise:
    """From uint8 images `(N, 3, H, W)` to the network's input: on the device, less the mean, by the deviation."""

    def __init__(self, cfg: CfgNode):
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.mean = torch.tensor(cfg.MODEL.PIXEL_MEAN, device=self.device).view(3, 1, 1)
        self.scale = 1 / torch.tensor(cfg.MODEL.PIXEL_STD, device=self.device).view(3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device, non_blocking=True).to(memory_format=torch.channels_last)
        return (images.float() - self.mean) * self.scale


PIPELINES = ("workers", "device", "resident")


class TrainBatches:
    """Training batches of this process from any iteration on, by DATALOADER.PIPELINE.

    What a batch is depends on the pipeline; `images_of` gives its pixels and labels.

    Raises:
        ConfigError: keys of INPUT or DATALOADER that do not fit each other.
    """

    def __init__(self, cfg: CfgNode, source: ClassificationSource):
        pipeline = cfg.DATALOADER.PIPELINE
        if pipeline not in PIPELINES:
            raise ConfigError(f"DATALOADER.PIPELINE is {pipeline!r}, expected {' or '.join(PIPELINES)}.")
        if cfg.SOLVER.CUDA_GRAPH and pipeline != "resident":
            raise ConfigError(
                f"SOLVER.CUDA_GRAPH needs batches that are on the device, but DATALOADER.PIPELINE is {pipeline}. Set "
                "it to resident, or CUDA_GRAPH to False."
            )
        self._cfg = cfg
        self._source = source
        self._shares = {"rank": comm.get_rank(), "world_size": comm.get_world_size()}
        self._transform = _train_transform(cfg)
        with as_config_error("DATALOADER.MAX_CORRUPT"):
            self._corrupt = CorruptCounter(cfg.DATALOADER.MAX_CORRUPT)
        if cfg.DATALOADER.ON_CORRUPT not in ON_CORRUPT:
            raise ConfigError(
                f"DATALOADER.ON_CORRUPT is {cfg.DATALOADER.ON_CORRUPT!r}, expected {' or '.join(ON_CORRUPT)}."
            )
        self._augment: DeviceAugment | None = None
        self._resident: ResidentBatches | None = None
        if pipeline == "device":
            if not isinstance(self._transform, TrainTransform) or cfg.DATALOADER.ON_CORRUPT != "stop":
                raise ConfigError(
                    "DATALOADER.PIPELINE is device, which has neither INPUT.CROP.TYPE padded nor DATALOADER.ON_CORRUPT "
                    "skip. Set PIPELINE to workers."
                )
            self._augment = DeviceAugment(self._transform, seed=cfg.SEED, device=cfg.MODEL.DEVICE)
        if pipeline == "resident":
            if not isinstance(self._transform, PaddedCropTransform):
                raise ConfigError(
                    f"DATALOADER.PIPELINE is resident, which augments by INPUT.CROP.TYPE padded, not "
                    f"{cfg.INPUT.CROP.TYPE}. Set PIPELINE to workers."
                )
            self._resident = ResidentBatches(
                source,
                self._transform,
                batch_size=cfg.SOLVER.IMS_PER_BATCH,
                seed=cfg.SEED,
                device=cfg.MODEL.DEVICE,
                **self._shares,
            )

    def __call__(self, start_iteration: int) -> Iterator[Sequence[Any]]:
        if self._resident is not None:
            return map(self._resident.crops, itertools.count(start_iteration))
        return self._loaded(start_iteration)

    def _loaded(self, start_iteration: int) -> Iterator[Sequence[Any]]:
        cfg = self._cfg
        common = {
            "batch_size": cfg.SOLVER.IMS_PER_BATCH,
            "seed": cfg.SEED,
            "start_iteration": start_iteration,
            "workers": cfg.DATALOADER.NUM_WORKERS,
            **self._shares,
        }
        if self._augment is not None:
            return iter(DevicePrefetcher(encoded_loader(self._source, self._transform, **common), self._augment))
        return self._counted(
            train_loader(
                self._source,
                self._transform,
                pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
                reduced_decoding=cfg.INPUT.REDUCED_DECODING,
                on_corrupt=cfg.DATALOADER.ON_CORRUPT,
                **common,
            )
        )

    def _counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on while not too many of their images are unreadable."""
        for batch in batches:
            self._corrupt(batch)
            yield batch

    def images_of(self, batch: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch's images `(n, 3, H, W)` uint8 and labels `(n,)` on the device."""
        if self._resident is not None:
            return self._resident.gather(*batch)
        images, labels = batch[:2]
        device = self._cfg.MODEL.DEVICE
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def names(self, iteration: int) -> list[str]:
        """What the images of this process at an iteration are called."""
        sampler = BatchSampler(len(self._source), self._cfg.SOLVER.IMS_PER_BATCH, seed=self._cfg.SEED, **self._shares)
        return [self._source.describe(index) for _, index in sampler.batch(iteration)]


def _train_transform(cfg: CfgNode) -> TrainTransform | PaddedCropTransform:
    """The augmentation that INPUT asks for."""
    if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
        raise ConfigError(f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r}, expected horizontal or none.")
    flip = 0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0
    shared = {"crop": crop_size(cfg), "flip": flip, "channel_order": cfg.INPUT.FORMAT}
    with as_config_error("INPUT"):
        if cfg.INPUT.CROP.TYPE == "padded":
            return PaddedCropTransform(padding=cfg.INPUT.CROP.PADDING, **shared)
        return TrainTransform(
            short_side=(min(cfg.INPUT.MIN_SIZE_TRAIN), max(cfg.INPUT.MIN_SIZE_TRAIN)),
            crop_type=cfg.INPUT.CROP.TYPE,
            area=tuple(cfg.INPUT.CROP.AREA),
            pca_std=cfg.INPUT.PCA_COLOR_STD,
            **shared,
        )


def crop_size(cfg: CfgNode) -> tuple[int, int]:
    """INPUT.CROP.SIZE as height and width in pixels (Detectron2's default is a share of the image)."""
    size = cfg.INPUT.CROP.SIZE
    if len(size) != 2 or any(length != int(length) for length in size):
        raise ConfigError(f"INPUT.CROP.SIZE is {tuple(size)}, expected height and width in pixels, e.g. (224, 224).")
    return int(size[0]), int(size[1])


@contextlib.contextmanager
def as_config_error(keys: str) -> Iterator[None]:
    """Networks and transforms know no configuration; name the keys that their complaint is about."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{keys}: {error}.") from error
