"""Images and videos by file, folder or pattern."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from resnet_backbone.data.errors import IMAGE_EXTENSIONS, DatasetError, nearest_existing
from resnet_backbone.detection.data.mapper import read_image
from resnet_backbone.engine.paths import expand
from resnet_backbone.errors import InputError

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
# Containers state a number of frames that may be a little off.
_FRAMES_OFF = 0.02


class Source(NamedTuple):
    """An image or a video.

    Attributes:
        file: its path.
        picture: where its picture goes, relative to the output folder; no two have the same.
    """

    file: Path
    picture: Path

    @property
    def is_video(self) -> bool:
        return self.file.suffix.lower() in VIDEO_EXTENSIONS


class Frame(NamedTuple):
    """An image, or one frame of a video.

    Attributes:
        source: where it is from.
        read: returns the pixels, `(H, W, 3)` uint8 RGB, or raises a DatasetError.
        number: of a video's frame, from 0; None for an image.
        fps: the video's frames per second.
    """

    source: Source
    read: Callable[[], np.ndarray]
    number: int | None = None
    fps: float | None = None


class Read(NamedTuple):
    """A frame with its pixels `(H, W, 3)` uint8 RGB, and as a model's input."""

    frame: Frame
    pixels: np.ndarray
    prepared: dict[str, Any]


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Return all images and videos that files, folders (with all below them) and patterns (`'day1/*.jpg'`) stand for.

    A file that several inputs stand for is there once.

    Raises:
        InputError: one of them does not exist, or has no image or video in it.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for text in inputs:
        path = Path(expand(text, "the input"))
        if path.is_dir():
            files = [(file, file.relative_to(path)) for file in _below(path)]
            if not files:
                raise InputError(
                    f"the folder {path} has no images or videos in it; their names end in "
                    f"{', '.join((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))}."
                )
        elif path.exists():
            files = [(path, Path(path.name))]
        elif glob.has_magic(str(path)):
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [(file, Path(file.name)) for file in matches if file.is_file()]
            if not files:
                raise InputError(f"no file matches {path}.")
        else:
            raise InputError(f"there is no {path}: {nearest_existing(path)}.")
        for file, name in files:
            found.setdefault(os.path.abspath(file), (file, name))
    taken: set[Path] = set()
    sources = []
    for file, name in found.values():
        picture = _picture(name)
        number = 2
        while picture in taken:
            picture, number = _picture(name.with_stem(f"{name.stem}_{number}")), number + 1
        taken.add(picture)
        sources.append(Source(file, picture))
    return sources


def _picture(name: Path) -> Path:
    """Return a picture's name: the image's own if Pillow can write what it ends in; of a video, an MP4."""
    suffix = name.suffix.lower()
    if suffix in VIDEO_EXTENSIONS:
        return name.with_suffix(".mp4")
    return name if suffix in IMAGE_EXTENSIONS else name.with_name(f"{name.name}.png")


def _below(folder: Path) -> list[Path]:
    """Return all images and videos in a folder and those in it, but not what is hidden."""
    found = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(here, name)
            for name in sorted(names)
            if name.lower().endswith((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)) and not name.startswith(".")
        ]
    return found


class Video:
    """A video's frames, one after the other.

    Attributes:
        count: number of frames that the container states; 0 if it states none.
        fps: frames per second.

    Raises:
        DatasetError: OpenCV cannot open it.
    """

    def __init__(self, source: Source):
        # Both libraries would print their own words about a file that they cannot open.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        self._source = source
        self._capture = cv2.VideoCapture(str(source.file), cv2.CAP_FFMPEG)
        if not source.file.is_file() or not self._capture.isOpened():
            raise DatasetError(f"the video {source.file} cannot be read. Convert it, for instance to H.264 in .mp4.")
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.fps = self._capture.get(cv2.CAP_PROP_FPS) or 25.0

    def frames(self) -> Iterator[Frame]:
        """Yield the frames.

        Raises:
            DatasetError: the video ends before its last frame, or has none.
        """
        number = 0
        while (read := self._capture.read())[0]:
            pixels = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
            yield Frame(self._source, lambda pixels=pixels: pixels, number, self.fps)
            number += 1
        self._capture.release()
        if number < self.count * (1 - _FRAMES_OFF) - 1 or not number:
            raise DatasetError(f"the video {self._source.file} ends after {number} of {self.count} frames.")


def image_frame(source: Source) -> Frame:
    """Return an image as the only frame of its source."""
    return Frame(source, lambda: read_image(str(source.file), "RGB"))
