"""Test-time augmentation: average predictions over one crop, ten crops, or the whole image at several scales."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from resnet_backbone.data.functional import center_offset, resize, resized_size, to_tensor
from resnet_backbone.data.transforms import EvalTransform
from resnet_backbone.engine.config import ConfigError, as_config_error
from resnet_backbone.errors import InputError
from resnet_backbone.pretraining.preprocessing import crop_size


class CropGroup(NamedTuple):
    """Same-shaped crops of different images, `(n, 3, h, w)` uint8, and the images' indices in the batch, `(n,)`."""

    pixels: torch.Tensor
    image_indices: torch.Tensor


class TenCrops(EvalTransform):
    """Resize the shorter side, then crop the four corners and the center, also of the mirrored image.

    Returns ten `(3, *crop)` uint8 tensors in torchvision's order.
    """

    def __call__(self, image: np.ndarray, *, seed: int = 0, position: int = 0) -> list[torch.Tensor]:
        image = resize(image, resized_size(*image.shape[:2], self.short_side))
        image = to_tensor(image, channel_order=self.channel_order)
        (rows, columns), (height, width) = self.crop, image.shape[1:]
        bottom, right = height - rows, width - columns
        corners = [(top, left) for top in (0, bottom) for left in (0, right)]
        return [
            side[:, top : top + rows, left : left + columns]
            for side in (image, image.flip(-1))
            for top, left in (*corners, center_offset((height, width), self.crop))
        ]


class WholeImages:
    """Resize the shorter side to each of `scales`; return one `(3, h, w)` uint8 tensor per scale."""

    def __init__(self, *, scales: Sequence[int], channel_order: str) -> None:
        if any(not isinstance(scale, int) or scale < 1 for scale in scales):
            raise InputError(f"the shorter sides are {tuple(scales)}, expected whole numbers of pixels above 0")
        self.scales = tuple(scales)
        self.channel_order = channel_order

    def __call__(self, image: np.ndarray, *, seed: int = 0, position: int = 0) -> list[torch.Tensor]:
        sizes = [resized_size(*image.shape[:2], scale) for scale in self.scales]
        return [to_tensor(resize(image, size), channel_order=self.channel_order) for size in sizes]


@dataclass(frozen=True)
class EvaluationCrops:
    """The crops that an image's prediction is computed from.

    Attributes:
        transform: turns an image into its crops, `(3, h, w)` uint8 each, or into its only crop.
        pixels: approximate total pixels in an image's crops.
        dense: whether the crops are whole images. The network then runs fully convolutionally on them and on their
            mirror images and averages logits over positions (VGG paper, section 3.2: "dense evaluation").
        description: text for the log.
    """

    transform: Callable[..., torch.Tensor | list[torch.Tensor]]
    pixels: int
    dense: bool
    description: str


def build_evaluation_crops(cfg: CfgNode) -> EvaluationCrops:
    """Return TEST.CROPS crops or, with TEST.SCALES, the whole image at each of these shorter sides.

    Raises:
        ConfigError: the sizes are incompatible, or both crops and scales are requested.
    """
    crops, scales, crop = cfg.TEST.CROPS, cfg.TEST.SCALES, crop_size(cfg)
    if scales:
        if crops != 1:
            raise ConfigError(f"TEST.CROPS is {crops} and TEST.SCALES {tuple(scales)}. Set CROPS to 1 or SCALES to ().")
        with as_config_error("TEST.SCALES"):
            transform = WholeImages(scales=scales, channel_order=cfg.INPUT.FORMAT)
        pixels = sum(scale**2 * 4 // 3 for scale in scales)  # most photographs are 4:3 or 3:2
        sides = ", ".join(map(str, scales))
        return EvaluationCrops(transform, pixels, dense=True, description=f"scales {sides}, mirrored too")
    kind = EvalTransform if crops == 1 else TenCrops
    with as_config_error("INPUT.CROP.SIZE, INPUT.MIN_SIZE_TEST"):
        transform = kind(short_side=cfg.INPUT.MIN_SIZE_TEST, crop=crop, channel_order=cfg.INPUT.FORMAT)
    description = "1 crop" if crops == 1 else "10 crops"
    return EvaluationCrops(transform, crops * crop[0] * crop[1], dense=False, description=description)


def collate(samples: Sequence[tuple]) -> tuple[list[CropGroup], torch.Tensor]:
    """Collate samples `(crops, label, …)` into groups of same-shaped crops and labels `(N,)` int64."""
    groups: dict[tuple, list[tuple[torch.Tensor, int]]] = {}
    for image_index, (crops, *_) in enumerate(samples):
        for number, crop in enumerate([crops] if isinstance(crops, torch.Tensor) else crops):
            # Each image appears at most once per group, so its sum does not depend on the order.
            groups.setdefault((number, crop.shape), []).append((crop, image_index))
    stacked = [
        CropGroup(torch.stack([crop for crop, _ in members]), torch.tensor([index for _, index in members]))
        for members in groups.values()
    ]
    return stacked, torch.tensor([sample[1] for sample in samples])


def log_probabilities(
    network: nn.Module,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    groups: Iterable[CropGroup],
    num_images: int,
    *,
    dense: bool = False,
    max_pixels: int | None = None,
) -> torch.Tensor:
    """Return the log of each image's softmax probabilities averaged over crops, `(num_images, classes)` float64.

    Log space still ranks probabilities that would underflow.

    Args:
        prepare: turns uint8 images into the network's input on its device.
        groups: the crops; every image has the same number.
        num_images: number of images in the batch.
        dense: see `EvaluationCrops`.
        max_pixels: pixel limit per forward pass, unless one crop (with its mirror image) has more; None: no limit.
    """
    device = next(network.parameters()).device
    total: torch.Tensor | None = None
    for pixels, image_indices in groups:
        height, width = pixels.shape[2:]
        copies = 2 if dense else 1
        count = len(pixels) if max_pixels is None else max(1, max_pixels // (height * width * copies))
        for part, of in zip(pixels.split(count), image_indices.to(device, non_blocking=True).split(count), strict=True):
            part = part.to(device, non_blocking=True)
            fed = prepare(torch.cat([part, part.flip(-1)]) if dense else part)
            logits = network.dense_logits(fed).double().mean((2, 3)) if dense else network(fed).double()
            seen = logits.log_softmax(1).unflatten(0, (copies, -1)).logsumexp(0)
            if total is None:
                total = torch.full((num_images, seen.shape[1]), -torch.inf, dtype=seen.dtype, device=device)
            total[of] = torch.logaddexp(total[of], seen)
    return total.log_softmax(1)  # each crop's probabilities sum to 1, so this divides by the number of crops
