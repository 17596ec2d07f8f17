"""Large-scale jitter: images resized at random, then cropped or padded to a square (arXiv 2012.07177, section 3)."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T


def scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Return the augmentations that INPUT.SCALE_JITTER stands for.

    They pad with the pixel mean, in the order of INPUT.FORMAT, which the network sees as 0 up to rounding.
    """
    size, (low, high) = cfg.INPUT.SCALE_JITTER.SIZE, cfg.INPUT.SCALE_JITTER.RANGE
    color = np.clip(np.rint(cfg.MODEL.PIXEL_MEAN), 0, 255).astype(np.uint8)
    return [ScaleJitter(low, high, size, size), PaddedCrop((size, size), color)]


class ScaleJitter(T.ResizeScale):
    """Detectron2's augmentation, but no side becomes 0 pixels long."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


class PaddedCrop(T.FixedSizeCrop):
    """Detectron2's augmentation, but it pads each channel with a value of its own.

    Args:
        crop_size: height and width.
        color: `(C,)`, of the image's type.
    """

    def __init__(self, crop_size: tuple[int, int], color: np.ndarray):
        super().__init__(crop_size, pad_value=color)
        self.color = color

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transforms = super().get_transform(image)
        transforms.transforms[-1].__class__ = _ColorPad
        return transforms


class _ColorPad(T.PadTransform):
    """Detectron2's transform, for a `pad_value` of `(C,)`; masks are still padded with 0."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Pad `(H, W, C)`; the result has its channels in planes, which are filled a hundred times faster."""
        height, width, channels = img.shape
        planes = np.empty((channels, self.y0 + height + self.y1, self.x0 + width + self.x1), img.dtype)
        planes[:] = self.pad_value[:, None, None]
        planes[:, self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img.transpose(2, 0, 1)
        return planes.transpose(1, 2, 0)
