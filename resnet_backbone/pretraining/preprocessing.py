"""Preprocessing configured by INPUT and MODEL.PIXEL_*: crop size, training augmentation, normalization."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode

from resnet_backbone.data.padded_crop import PaddedCropTransform
from resnet_backbone.data.transforms import TrainTransform
from resnet_backbone.engine.config import ConfigError, as_config_error, said


class Normalize:
    """Turn uint8 images `(N, 3, H, W)` on the device into network input: `(image - mean) / std`, channels last.

    Args:
        mean, std: per channel, in the images' channel order, on the 0…255 scale.
    """

    def __init__(self, *, mean: Sequence[float], std: Sequence[float], device: torch.device | str):
        self._mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self._scale = 1 / torch.tensor(std, device=device).view(3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.to(memory_format=torch.channels_last).float() - self._mean) * self._scale


def build_normalize(cfg: CfgNode) -> Normalize:
    """Return the normalization by MODEL.PIXEL_MEAN and PIXEL_STD."""
    return Normalize(mean=cfg.MODEL.PIXEL_MEAN, std=cfg.MODEL.PIXEL_STD, device=cfg.MODEL.DEVICE)


def build_train_transform(cfg: CfgNode) -> TrainTransform | PaddedCropTransform:
    """Return the augmentation configured by INPUT.

    Raises:
        ConfigError: keys of INPUT are invalid or incompatible.
    """
    flip, crop_type = cfg.INPUT.RANDOM_FLIP, cfg.INPUT.CROP.TYPE
    shared = {
        "crop": crop_size(cfg),
        "flip": 0.5 if flip == "horizontal" else 0.0,
        "channel_order": cfg.INPUT.FORMAT,
    }
    with as_config_error("INPUT.CROP.SIZE, INPUT.MIN_SIZE_TRAIN"):
        if crop_type == "padded":
            if cfg.INPUT.PCA_COLOR_STD:
                raise ConfigError(
                    f"{said(cfg, 'INPUT.PCA_COLOR_STD')}, but INPUT.CROP.TYPE padded has none. Set it to 0."
                )
            return PaddedCropTransform(padding=cfg.INPUT.CROP.PADDING, **shared)
        short_sides = cfg.INPUT.MIN_SIZE_TRAIN
        return TrainTransform(
            short_side=(min(short_sides), max(short_sides)),
            crop_type=crop_type,
            area=tuple(cfg.INPUT.CROP.AREA),
            pca_std=cfg.INPUT.PCA_COLOR_STD,
            **shared,
        )


def crop_size(cfg: CfgNode) -> tuple[int, int]:
    """Return INPUT.CROP.SIZE, height and width in pixels, as whole numbers."""
    height, width = cfg.INPUT.CROP.SIZE
    return int(height), int(width)
