"""Images to load: generated ones with the detail and file size of photographs, or a selection of the user's own."""

import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from resnet_backbone.errors import InputError

EXTENSIONS = (".jpg", ".jpeg")
QUALITY = 90
AMPLITUDE = 8.0  # gray levels of the finest noise; yields 3.2 bits per pixel at this quality


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Generate a `(height, width, 3)` uint8 image whose spectrum falls off with frequency as in photographs.

    It sums noise at every octave, mostly in brightness. The amplitude of natural images falls roughly as 1/frequency
    (Field 1987), which gives every octave the same contrast; here the coarse ones get slightly more.
    """
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 110.0, np.float32)
    scale = 1
    while scale < min(height, width):
        shape = (height // scale + 2, width // scale + 2)
        gray, color = (rng.standard_normal((*shape, channels), np.float32) for channels in (1, 3))
        noise = gray + 0.3 * color
        image += AMPLITUDE * scale**0.2 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        scale *= 2
    return image.clip(0, 255).astype(np.uint8)


def write_photographs(folder: Path, *, size: tuple[int, int], count: int) -> list[Path]:
    """Write `count` generated JPEGs of `size` (height, width) into `folder`."""
    folder.mkdir(parents=True)
    files = [folder / f"{number:04d}.jpg" for number in range(count)]
    for number, file in enumerate(files):
        cv2.imwrite(str(file), photograph(*size, seed=number), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return files


def select_photographs(source: Path, folder: Path, *, count: int) -> list[Path]:
    """Copy at most `count` JPEGs, spaced evenly over all those under `source`, into `folder`.

    Raises:
        InputError: the folder does not exist or has no JPEG.
    """
    found = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(source)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    )
    if not found:
        state = "holds no JPEG" if source.is_dir() else "is no folder"
        raise InputError(
            f"--images {source} {state}; give a folder with {' or '.join(EXTENSIONS)} files in it or below"
        )
    folder.mkdir(parents=True)
    chosen = [found[number * len(found) // count] for number in range(count)] if len(found) > count else found
    return [Path(shutil.copyfile(file, folder / f"{number:04d}.jpg")) for number, file in enumerate(chosen)]


def write_shard(file: Path, images: Sequence[Path]) -> None:
    """Write images as a single-class tar shard."""
    label = file.with_suffix(".cls")
    label.write_text("0")
    with tarfile.open(file, "w") as archive:
        for image in images:
            archive.add(image, image.name)
            archive.add(label, f"{image.stem}.cls")
    label.unlink()
