"""From the configuration to training batches and to the network's input."""

import contextlib
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from resnet_backbone.data.classification import train_loader
from resnet_backbone.data.interface import ClassificationSource
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


class TrainBatches:
    """Training batches of this process from any iteration on."""

    def __init__(self, cfg: CfgNode, source: ClassificationSource):
        self._cfg = cfg
        self._source = source
        if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
            raise ConfigError(f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r}, expected horizontal or none.")
        with as_config_error("INPUT"):
            self._transform = TrainTransform(
                short_side=(min(cfg.INPUT.MIN_SIZE_TRAIN), max(cfg.INPUT.MIN_SIZE_TRAIN)),
                crop=crop_size(cfg),
                crop_type=cfg.INPUT.CROP.TYPE,
                flip=0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0,
                pca_std=cfg.INPUT.PCA_COLOR_STD,
                channel_order=cfg.INPUT.FORMAT,
            )

    def __call__(self, start_iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(
            train_loader(
                self._source,
                self._transform,
                batch_size=self._cfg.SOLVER.IMS_PER_BATCH,
                seed=self._cfg.SEED,
                start_iteration=start_iteration,
                workers=self._cfg.DATALOADER.NUM_WORKERS,
                rank=comm.get_rank(),
                world_size=comm.get_world_size(),
                pin_memory=self._cfg.MODEL.DEVICE.startswith("cuda"),
            )
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
