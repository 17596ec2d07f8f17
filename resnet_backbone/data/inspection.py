"""What is to be found in an encoded image, and in all images of a data set, by several processes."""

import hashlib
import io
import itertools
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple, Protocol, TextIO

import cv2
import numpy as np
from PIL import Image

from resnet_backbone.data.decode import decode
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.progress import image_bar
from resnet_backbone.data.workers import prepare_worker
from resnet_backbone.errors import InputError

TINY = 8  # pixels

_FORMATS = {  # Pillow's names; MPO is a JPEG followed by more pictures, as written by phones
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".bmp": ("BMP", "DIB"),
    ".webp": ("WEBP",),
    ".ppm": ("PPM",),
}
_CHUNK = 32  # images handed to a process at once


class Inspection(NamedTuple):
    """One image's findings by name, height and width, first 8 bytes of a hash, format, and message.

    Height, width and format are 0, 0 and "" if the image cannot be decoded.
    """

    findings: frozenset[str]
    height: int
    width: int
    digest: int
    form: str
    message: str


def digest_of(data: bytes) -> int:
    """Return the first 8 bytes of a hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def unreadable(data: bytes, error: DatasetError) -> Inspection:
    """Return what is known of an image that cannot be decoded."""
    return Inspection(frozenset({"unreadable" if data else "empty"}), 0, 0, digest_of(data), "", str(error))


def inspect(data: bytes, name: str) -> Inspection:
    """Inspect one encoded image: decode it as pretraining does, and again by Pillow, which is strict."""
    try:
        height, width = decode(data, what=name).shape[:2]
    except DatasetError as error:
        return unreadable(data, error)
    found, form, message = look_closer(data, name, (height, width), load=True)
    return Inspection(found, height, width, digest_of(data), form, message)


def look_closer(data: bytes, name: str, size: tuple[int, int], *, load: bool) -> tuple[frozenset[str], str, str]:
    """Return the findings, the format, and a sentence about damage for a decodable image.

    Args:
        size: height and width.
        load: whether to have Pillow decode it, too, which complains about missing data.
    """
    found, form, message = _opened_by_pillow(data, load=load)
    expected = _FORMATS.get(os.path.splitext(name)[1].lower())
    if form and expected and form not in expected:
        found.add("wrong_extension")
    if min(size) < TINY:
        found.add("tiny")
    return frozenset(found), form, f"{name} is damaged ({message})" if message else ""


def _opened_by_pillow(data: bytes, *, load: bool) -> tuple[set[str], str, str]:
    found, form = set(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                form, mode = image.format or "", image.mode
                found |= {
                    kind
                    for kind, is_so in (
                        ("grayscale", mode in ("1", "L", "LA", "La") or mode.startswith(("I", "F"))),
                        ("palette", mode in ("P", "PA")),
                        ("transparent", mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info),
                        # Pillow silently reduces 16-bit colors; a PNG's header has the depth at byte 24.
                        ("sixteen_bit", mode.startswith("I") or (form == "PNG" and data[24] == 16)),
                        ("cmyk", mode == "CMYK"),
                        ("animated", form != "MPO" and getattr(image, "n_frames", 1) > 1),
                        ("turned", image.getexif().get(0x0112, 1) not in (0, 1)),
                    )
                    if is_so
                }
                if load:
                    image.seek(0)
                    image.load()
    except Image.DecompressionBombError:
        found.add("huge")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        return found | {"damaged"}, form, str(error) or type(error).__name__
    return found, form, ""


class Images(Protocol):
    """Images that can be inspected one by one, and sent to another process."""

    def inspect(self, index: int) -> Inspection: ...

    def describe(self, index: int) -> str:
        """Name an image for messages."""


def selected(total: int, limit: int | None) -> np.ndarray:
    """Return the indices of all of `total` images, or of `limit` evenly spaced ones."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1")
    count = total if limit is None else min(limit, total)
    return np.arange(count) * total // max(count, 1)


def inspect_all(images: Images, indices: np.ndarray, *, workers: int, progress: TextIO | None) -> Iterator[Inspection]:
    """Yield the inspections of these images in order.

    Args:
        workers: number of inspecting processes; 0: use this one.
        progress: where to show a bar with progress and remaining time; None: no bar.
    """
    if workers < 0:
        raise InputError(f"workers is {workers}; expected at least 0")
    inspections = itertools.chain.from_iterable(_in_chunks(images, indices, workers))
    yield from image_bar(inspections, total=len(indices), file=progress)


def _in_chunks(images: Images, indices: np.ndarray, workers: int) -> Iterator[list[Inspection]]:
    chunks = (indices[begin : begin + _CHUNK] for begin in range(0, len(indices), _CHUNK))
    if workers == 0:
        _begin(images)
        yield from map(_inspect_chunk, chunks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(images,))
    waiting, done = deque(), 0
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_inspect_chunk, chunk))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
                done += _CHUNK
        while waiting:
            yield waiting.popleft().result()
            done += _CHUNK
    except BrokenProcessPool:
        raise DatasetError(
            f"a process that was looking at images died, {done} images from the start or soon after (at "
            f"{images.describe(int(indices[done]))}): out of memory, or a decoder crashes on an image; try again with "
            "fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_images: Images


def _begin_worker(images: Images) -> None:
    prepare_worker(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # its warnings name no file
    _begin(images)


def _begin(images: Images) -> None:
    global _images
    _images = images


def _inspect_chunk(indices: np.ndarray) -> list[Inspection]:
    return [_images.inspect(int(index)) for index in indices]
