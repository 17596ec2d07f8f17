"""Decode image bytes to RGB pixels."""

import io
import os
import warnings

import cv2
import numpy as np
from PIL import Image

from resnet_backbone.data.errors import DatasetError

# Resizing the shorter side to a few hundred pixels makes the longer one this many times as long; of a detector's image,
# whose longer side is bounded, it would leave less than a pixel of the shorter one.
MAX_ASPECT_RATIO = 100

# OpenCV's flags for decoding at full size, a half, a quarter and an eighth. A color flag beside them overrides the
# grayscale.
REDUCED_FLAGS = {
    1: cv2.IMREAD_IGNORE_ORIENTATION,
    2: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def decode(data: bytes, *, what: str, reduction: int = 1) -> np.ndarray:
    """Decode an image to `(H, W, 3)` uint8 RGB.

    Grayscale, palette, alpha (dropped), 16-bit (the upper byte) and CMYK images all become RGB. The EXIF orientation is
    ignored, as in torchvision's `ImageFolder` and Pillow's `open`. Unreadable or truncated bytes, pixels of 32 bits and
    shapes beyond MAX_ASPECT_RATIO raise a DatasetError, in which `what` names the image.

    A `reduction` of 2, 4 or 8 decodes JPEGs, and only JPEGs, at that fraction of their size, rounded up. Each pixel is
    approximately the mean of those it replaces: libjpeg drops the high frequencies of its 8x8 blocks.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | REDUCED_FLAGS[reduction])
    except cv2.error:  # empty, or an image of an impossible size
        image = None
    if image is None:  # Pillow may decode what OpenCV rejects; if not, it says why.
        image = _decode_with_pillow(data, what, reduction)
    if found := too_long(*image.shape[1::-1]):
        raise DatasetError(f"{what} is unreadable ({found}); replace or remove it")
    return image


def read_ends(descriptor: int, offset: int = 0, size: int | None = None) -> tuple[bytes, bytes]:
    """Return the first 12 and the last 64 bytes of a file, or of `size` bytes of it from `offset` on."""
    size = os.fstat(descriptor).st_size if size is None else size
    tail = min(size, 64)
    return os.pread(descriptor, min(size, 12), offset), os.pread(descriptor, tail, offset + size - tail)


def looks_whole(head: bytes, tail: bytes) -> bool:
    """Return whether a JPEG or PNG has its end, from what `read_ends` gives; True for other image formats.

    One that does not may still be whole (some cameras write something behind the end): decode it to find out.
    """
    if head.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in tail
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail
    return head.startswith((b"BM", b"GIF8", b"II*\0", b"MM\0*", b"P5", b"P6")) or head[8:] == b"WEBP"


def too_long(width: int, height: int) -> str | None:
    """Say that an image of this size exceeds MAX_ASPECT_RATIO; None if it does not."""
    if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
        return None
    return f"{width}×{height} pixels; expected sides that differ by a factor of {MAX_ASPECT_RATIO} at most"


def to_eight_bits(image: Image.Image, form: str | None) -> Image.Image:
    """Reduce 16-bit gray to its upper byte, which Pillow's `convert("RGB")` would clip; return other images unchanged.

    Pillow itself reduces 16-bit colors, of PNG to the upper byte, of PPM rounded.

    Args:
        form: the file's form, as in Pillow's `Image.format`.

    Raises:
        ValueError: 32-bit pixels, whose range a file does not say.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):  # 16-bit in these forms
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose range is unknown; expected 8 or 16 bits")
    return image


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read height and width from a JPEG's header; None if the bytes do not start like a JPEG.

    They are in the frame header (ITU-T T.81, B.2.2), after the tables and metadata. Every segment before it has a
    marker and its length.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker < 0xC0 or 0xD0 <= marker <= 0xDA:  # has no length, or follows the frame header
            return None
        elif marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


def _decode_with_pillow(data: bytes, what: str, reduction: int) -> np.ndarray:
    if not data:
        raise DatasetError(f"{what} is empty (0 bytes); replace or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return np.array(to_eight_bits(image, image.format).convert("RGB").reduce(reduction))
    except Image.UnidentifiedImageError:
        found = f"{len(data)} bytes that are no image of a known format"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        found = f"{len(data)} bytes that cannot be decoded: {error}"
    raise DatasetError(f"{what} is unreadable ({found}); replace or remove it")
