"""Image augmentation for classification: from a decoded image to a uint8 tensor.

A transform is called as `transform(image, seed=seed, position=position)` and depends only on these. Images stay uint8
until the batch is on the device.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from resnet_backbone.data.functional import (
    CHANNEL_ORDERS,
    center_offset,
    orient,
    resize,
    resized_size,
    shift_colors,
    to_planes,
    to_tensor,
)
from resnet_backbone.data.sampler import sample_rng
from resnet_backbone.errors import InputError

CROP_TYPES = ("absolute", "random_resized")


class CropParameters(NamedTuple):
    """One image's augmentation: the crop window in source pixels, whether to mirror it, and the color shift.

    `pca_weights` holds the weights of the three principal components, `(3,)`, or is None.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool
    pca_weights: np.ndarray | None

    def reduced(self, factor: int) -> "CropParameters":
        """The parameters for the image decoded at `1 / factor` of its size.

        The window's edges are rounded to that image's whole pixels, so they move by at most `factor / 2` source pixels.
        """
        top, left = round(self.top / factor), round(self.left / factor)
        bottom, right = round((self.top + self.height) / factor), round((self.left + self.width) / factor)
        return CropParameters(top, left, bottom - top, right - left, self.flip, self.pca_weights)


class TrainTransform:
    """The paper's training augmentation (section 3.4), or the random-area crop of later recipes.

    Called as `transform(image, seed=seed, position=position)` with `(H, W, 3)` uint8 RGB; returns `(3, *crop)` uint8.
    Equals `apply(image, draw(H, W, seed=seed, position=position))`: the draw depends on the image only via its size.

    Arguments:
        short_side: smallest and largest length in pixels, both inclusive, of the resized image's shorter side (crop
            type "absolute" only).
        crop: height and width of the result in pixels.
        crop_type: "absolute": resize the shorter side, then cut out a window of size `crop`. "random_resized": cut out
            a window of random area and aspect ratio (3/4 to 4/3), then resize it to `crop`.
        area: smallest and largest share of the image's area in that window ("random_resized" only).
        flip: probability of mirroring left and right.
        pca_std: standard deviation of the PCA color shift's weights; 0: no shift.
        channel_order: the result's, "RGB" or "BGR".

    For "absolute", the window is located in the original image and only its pixels are resized, which saves most of the
    work; its edges are rounded to whole source pixels.
    """

    def __init__(
        self,
        *,
        short_side: tuple[int, int] = (256, 480),
        crop: tuple[int, int] = (224, 224),
        crop_type: str = "absolute",
        area: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        pca_std: float = 0.1,
        channel_order: str = "RGB",
    ) -> None:
        if crop_type not in CROP_TYPES:
            raise InputError(f"unknown crop type {crop_type!r}; expected one of {', '.join(CROP_TYPES)}")
        if short_side[0] > short_side[1]:
            raise InputError(f"the shorter side's range {tuple(short_side)} is empty; expected (smallest, largest)")
        if not 0 < area[0] <= area[1] <= 1:
            raise InputError(f"the crop's share of the area is {tuple(area)}; expected 0 < smallest <= largest <= 1")
        check_flip(flip)
        if pca_std < 0:
            raise InputError(f"pca_std is {pca_std}; expected a number >= 0")
        if crop_type == "absolute":
            _check_crop_fits(crop, short_side[0])
        check_channel_order(channel_order)
        self.short_side = tuple(short_side)
        self.crop = tuple(crop)
        self.crop_type = crop_type
        self.area = tuple(area)
        self.flip = flip
        self.pca_std = pca_std
        self.channel_order = channel_order

    def __call__(self, image: np.ndarray, *, seed: int, position: int) -> torch.Tensor:
        return self.apply(image, self.draw(*image.shape[:2], seed=seed, position=position))

    def draw(self, height: int, width: int, *, seed: int, position: int) -> CropParameters:
        """Draw the parameters for an image of `height` by `width` pixels at this position of the run."""
        rng = sample_rng(seed, position)
        window = self._absolute_window if self.crop_type == "absolute" else self._random_resized_window
        edges = window(height, width, rng)
        flip = rng.random() < self.flip
        return CropParameters(*edges, flip, rng.normal(0.0, self.pca_std, size=3) if self.pca_std else None)

    def apply(self, image: np.ndarray, parameters: CropParameters) -> torch.Tensor:
        """Crop, resize, mirror and shift the colors of `(H, W, 3)` uint8 RGB; returns `(3, *crop)` uint8."""
        top, left, height, width, flip, pca_weights = parameters
        planes = to_planes(resize(image[top : top + height, left : left + width], self.crop))
        if pca_weights is not None:
            planes = shift_colors(planes, pca_weights)
        return orient(torch.from_numpy(planes), channel_order=self.channel_order, flip=flip)

    def reduction(self, parameters: CropParameters) -> int:
        """The largest factor of 8, 4, 2 and 1 that keeps the reduced window at least as large as the crop."""
        fitting = min(parameters.height // self.crop[0], parameters.width // self.crop[1])
        return next((factor for factor in (8, 4, 2) if factor <= fitting), 1)

    def _absolute_window(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width, in source pixels, of a window of size `crop` in the resized image."""
        short = int(rng.integers(self.short_side[0], self.short_side[1], endpoint=True))
        resized = resized_size(height, width, short)
        edges = []
        for source, target, length in zip((height, width), resized, self.crop, strict=True):
            first = int(rng.integers(0, target - length, endpoint=True))
            scale = source / target
            size = min(max(round(length * scale), 1), source)
            edges.append((min(round(first * scale), source - size), size))
        (top, rows), (left, columns) = edges
        return top, left, rows, columns

    def _random_resized_window(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a window of random area and aspect ratio, by torchvision's procedure."""
        for _ in range(10):
            target = height * width * rng.uniform(*self.area)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            columns, rows = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < rows <= height and 0 < columns <= width:
                top = int(rng.integers(0, height - rows, endpoint=True))
                return top, int(rng.integers(0, width - columns, endpoint=True)), rows, columns
        # Very long images: the largest central window with an allowed aspect ratio.
        rows, columns = min(height, round(width / (3 / 4))), min(width, round(height * 4 / 3))
        return (height - rows) // 2, (width - columns) // 2, rows, columns


class EvalTransform:
    """Resize the shorter side, then take the center crop: single-crop testing.

    Called as `transform(image)` with `(H, W, 3)` uint8 RGB (seed and position are ignored); returns `(3, *crop)` uint8.
    `short_side` and `crop` (height and width) are in pixels.
    """

    def __init__(
        self, *, short_side: int = 256, crop: tuple[int, int] = (224, 224), channel_order: str = "RGB"
    ) -> None:
        _check_crop_fits(crop, short_side)
        check_channel_order(channel_order)
        self.short_side = short_side
        self.crop = tuple(crop)
        self.channel_order = channel_order

    def __call__(self, image: np.ndarray, *, seed: int = 0, position: int = 0) -> torch.Tensor:
        image = resize(image, resized_size(*image.shape[:2], self.short_side))
        top, left = center_offset(image.shape[:2], self.crop)
        image = image[top : top + self.crop[0], left : left + self.crop[1]]
        return to_tensor(image, channel_order=self.channel_order)


def check_crop(crop: tuple[int, int]) -> None:
    """Raise InputError if a crop of that height and width is empty."""
    if min(crop) < 1:
        raise InputError(f"a crop of {crop[0]}x{crop[1]} pixels is empty; expected a height and width of at least 1")


def check_flip(flip: float) -> None:
    """Raise InputError unless `flip` is a probability."""
    if not 0 <= flip <= 1:
        raise InputError(f"flip is {flip}; expected a probability")


def check_channel_order(channel_order: str) -> None:
    """Raise InputError unless the channel order is known."""
    if channel_order not in CHANNEL_ORDERS:
        raise InputError(f"unknown channel order {channel_order!r}; expected one of {', '.join(CHANNEL_ORDERS)}")


def _check_crop_fits(crop: tuple[int, int], short_side: int) -> None:
    check_crop(crop)
    if max(crop) > short_side:
        raise InputError(
            f"a crop of {crop[0]}x{crop[1]} pixels does not fit into an image whose shorter side is resized to "
            f"{short_side}; make the crop smaller or the shorter side at least {max(crop)}"
        )
