"""Encoded image bytes to RGB pixels."""

import io
import warnings

import cv2
import numpy as np
from PIL import Image

from resnet_backbone.data.errors import DatasetError


def decode(data: bytes, *, what: str) -> np.ndarray:
    """Decode an image to `(H, W, 3)` uint8 RGB.

    Grayscale, palette, alpha (dropped), 16-bit and CMYK images all become RGB. The EXIF orientation is ignored, as
    torchvision's `ImageFolder` and Pillow's `open` ignore it. `what` names the image in the message of the
    DatasetError that unreadable or truncated bytes raise.
    """
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # empty, or an image of an impossible size
        image = None
    # What OpenCV refuses, Pillow may know; if not, it knows why not.
    return _decode_with_pillow(data, what) if image is None else image


def _decode_with_pillow(data: bytes, what: str) -> np.ndarray:
    if not data:
        raise DatasetError(f"{what} is empty (0 bytes); replace or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return np.array(image.convert("RGB"))
    except Image.UnidentifiedImageError:
        found = f"{len(data)} bytes that are no image of a known format"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        found = f"{len(data)} bytes that cannot be decoded: {error}"
    raise DatasetError(f"{what} is unreadable ({found}); replace or remove it")
