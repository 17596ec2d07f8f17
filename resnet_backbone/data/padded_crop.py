"""The ResNet paper's CIFAR-10 augmentation (section 4.2): padding, random crop, random mirroring.

The draws come from a counter-based hash instead of `sample_rng`: a whole epoch's draws take milliseconds together, and
each equals the one drawn alone.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.functional import to_tensor
from resnet_backbone.data.transforms import check_channel_order, check_crop, check_flip
from resnet_backbone.errors import InputError

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17): its counter's
# increment, and its finalizer's shifts and multipliers (Stafford's variant 13).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

_HALF, _LOW_HALF = np.uint64(32), np.uint64(0xFFFFFFFF)


class PaddedCropParameters(NamedTuple):
    """The draws for `n` positions, `(n,)` int64 each: the crop's corner in the padded image; 1 to mirror it."""

    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray


class PaddedCropTransform:
    """Pad with black pixels, crop at a random position, mirror left and right half of the time.

    Called as `transform(image, seed=seed, position=position)` with `(H, W, 3)` uint8 RGB; returns `(3, *crop)` uint8.

    Arguments:
        padding: black pixels added on each of the four sides.
        crop: height and width of the result in pixels.
        flip: probability of mirroring.
        channel_order: the result's, "RGB" or "BGR".
    """

    def __init__(
        self,
        *,
        padding: int = 4,
        crop: tuple[int, int] = (32, 32),
        flip: float = 0.5,
        channel_order: str = "RGB",
    ) -> None:
        if padding < 0:
            raise InputError(f"the padding is {padding} pixels; expected at least 0")
        check_crop(crop)
        check_flip(flip)
        check_channel_order(channel_order)
        self.padding = padding
        self.crop = tuple(crop)
        self.flip = flip
        self.channel_order = channel_order

    def __call__(self, image: np.ndarray, *, seed: int, position: int) -> torch.Tensor:
        (top,), (left,), (flip,) = self.draw(*image.shape[:2], seed=seed, positions=np.array([position]))
        sides = [self.padding] * 4
        image = cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=(0, 0, 0))
        image = image[top : top + self.crop[0], left : left + self.crop[1]]
        return to_tensor(image, channel_order=self.channel_order, flip=bool(flip))

    def draw(self, height: int, width: int, *, seed: int, positions: np.ndarray) -> PaddedCropParameters:
        """Draw the parameters for images of `height` by `width` pixels at `positions`, `(n,)` integers."""
        rows, columns = (length + 2 * self.padding - size for length, size in zip((height, width), self.crop))
        if min(rows, columns) < 0:
            raise DatasetError(
                f"an image of {height}x{width} pixels with {self.padding} added on each side is smaller than the crop "
                f"of {self.crop[0]}x{self.crop[1]}; make the crop smaller or the padding larger"
            )
        place, mirror = random_words(seed, positions, 2)
        # Map 32 random bits to one of n places with the high half of their product with n. The probabilities differ
        # from 1 / n by less than 2^-32.
        top = ((place >> _HALF) * np.uint64(rows + 1)) >> _HALF
        left = ((place & _LOW_HALF) * np.uint64(columns + 1)) >> _HALF
        flip = (mirror >> _HALF) < np.uint64(round(self.flip * 2**32))
        return PaddedCropParameters(top.astype(np.int64), left.astype(np.int64), flip.astype(np.int64))


def random_words(seed: int, positions: np.ndarray, count: int) -> list[np.ndarray]:
    """The first `count` numbers, each `(n,)` uint64, from a separate SplitMix64 generator for each position."""
    if seed < 0 or (positions < 0).any():
        raise ValueError(f"a random stream's seed and position must not be negative; got {seed} and {positions.min()}")
    key = _finalize(np.array([seed % 2**64], np.uint64) + _INCREMENT)
    state = key + _finalize(positions.astype(np.uint64) + _INCREMENT)
    words = []
    for _ in range(count):
        state = state + _INCREMENT
        words.append(_finalize(state))
    return words


def _finalize(words: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's one-to-one scrambling of 64 bits; arithmetic is modulo 2^64."""
    words = (words ^ (words >> _SHIFTS[0])) * _FACTORS[0]
    words = (words ^ (words >> _SHIFTS[1])) * _FACTORS[1]
    return words ^ (words >> _SHIFTS[2])
