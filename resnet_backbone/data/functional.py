"""Pixel operations for augmentation, each defined once for both host and device."""

import cv2
import numpy as np
import torch
from torch.nn import functional

CHANNEL_ORDERS = ("RGB", "BGR")

# Principal components of the RGB values of ImageNet's training images, in 0...255: standard deviations along the
# components, and the components as columns (rows: red, green, blue). The AlexNet paper describes the augmentation
# (Krizhevsky et al. 2012, section 4.1) but gives no numbers; these come from fb.resnet.torch, the reimplementation
# behind the published "PCA lighting" constants (there in 0...1).
PCA_VALUES = 255 * np.array([0.2175, 0.0188, 0.0045])
PCA_VECTORS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)


def resized_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after resizing the shorter side; the longer is rounded down as in torchvision."""
    if height <= width:
        return short_side, short_side * width // height
    return short_side * height // width, short_side


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize `(H, W, 3)` uint8 to height and width `size`, bilinear with antialiasing.

    The result matches Pillow's filter to within 1 level, or 2 in a few pixels at steep edges.
    """
    if image.shape[:2] == tuple(size):
        return image
    # When shrinking, OpenCV's filters differ from Pillow's, and so from those that published weights were tested with.
    # torch vectorizes Pillow's algorithm for uint8 pixels with interleaved channels, but returns separate planes.
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def center_offset(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """Top and left of the center crop for an image of height and width `size`, rounded as in torchvision."""
    return round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2)


def orient(images: torch.Tensor, *, channel_order: str, flip: bool = False) -> torch.Tensor:
    """Reorder the channels of `(..., 3, H, W)` RGB and, if `flip`, mirror left and right, in at most one copy."""
    dims = [-3] * (channel_order == "BGR") + [-1] * flip
    return images.flip(dims) if dims else images


def mirrored_columns(width: int, flip: torch.Tensor) -> torch.Tensor:
    """The source column of each output column, `(n, width)` int64, mirrored where `flip`, `(n,)` bool, is true."""
    columns = torch.arange(width, device=flip.device)
    return torch.where(flip[:, None], width - 1 - columns, columns)


def color_shift(weights: np.ndarray) -> np.ndarray:
    """Compute the PCA color shift in whole levels of red, green and blue from component weights; both `(..., 3)`."""
    return np.rint(weights * PCA_VALUES @ PCA_VECTORS.T)


def shift_colors(planes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Add `color_shift(weights)` to every pixel of `(3, H, W)` uint8 RGB, clipped to 0...255."""
    return np.stack([cv2.add(plane, value) for plane, value in zip(planes, color_shift(weights).tolist(), strict=True)])


def to_planes(image: np.ndarray) -> np.ndarray:
    """Rearrange `(H, W, 3)` to contiguous `(3, H, W)`."""
    if image.strides[2] == 1:
        return np.stack(cv2.split(image))  # several times faster than numpy's copy
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def to_tensor(image: np.ndarray, *, channel_order: str, flip: bool = False) -> torch.Tensor:
    """Convert `(H, W, 3)` RGB to a contiguous `(3, H, W)` tensor in the given channel order, mirrored if `flip`."""
    if flip:
        image = cv2.flip(image, 1)  # three times as fast as torch's for CIFAR-size images
    return orient(torch.from_numpy(to_planes(image)), channel_order=channel_order)
