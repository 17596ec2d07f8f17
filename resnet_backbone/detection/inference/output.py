"""What is written about images and videos: objects in COCO's result form, and pictures."""

import contextlib
import json
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image

from resnet_backbone.detection.drawing import draw
from resnet_backbone.detection.inference.ids import Ids
from resnet_backbone.detection.inference.sources import Frame, Read
from resnet_backbone.errors import InputError
from resnet_backbone.weights.files import atomic_write

DETECTIONS, IMAGES = "detections.json", "images.json"
_WAITING = 32  # pictures that may be drawn while the next ones are detected on


class Results:
    """DETECTIONS and IMAGES, written object by object and renamed at the end, also after an interruption."""

    def __init__(self, output: Path, class_names: Sequence[str], ids: Ids):
        self._output = output
        self._class_names = class_names
        self._ids = ids
        self._images: list[dict[str, Any]] = []
        self._objects = 0

    def __enter__(self) -> "Results":
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(atomic_write(self._output / DETECTIONS))
        self._file.write(b"[")
        return self

    def add(self, read: Read, found: Instances) -> None:
        number = len(self._images) + 1 if self._ids.images is None else self._ids.images[read.frame.source.file]
        height, width = read.pixels.shape[:2]
        name = {"file_name": str(read.frame.source.file)}
        if read.frame.number is not None:
            name["frame"] = read.frame.number
        self._images.append({"id": number, **name, "height": height, "width": width})
        for each in instances_to_coco_json(found, number):
            each["category_id"] = self._ids.categories[each["category_id"]]
            self._file.write((",\n" if self._objects else "\n").encode() + json.dumps(each).encode())
            self._objects += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if isinstance(error, OSError):  # such as a full disk
            return self._open.__exit__(kind, error, trace)
        self._file.write(b"\n]\n")
        self._open.close()
        categories = [{"id": i, "name": name} for i, name in zip(self._ids.categories, self._class_names, strict=True)]
        content = {"images": self._images, "annotations": [], "categories": categories}
        with atomic_write(self._output / IMAGES) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode())


class Pictures:
    """Pictures and videos with the objects drawn on them, under the sources' names."""

    def __init__(self, output: Path, class_names: Sequence[str], pool: ThreadPoolExecutor):
        self._output = output
        self._class_names = class_names
        self._pool = pool
        self._pending: deque[tuple[Frame, Future[np.ndarray]]] = deque()
        self._video: _VideoFile | None = None

    def __enter__(self) -> "Pictures":
        return self

    def add(self, read: Read, shown: Instances) -> None:
        self._pending.append((read.frame, self._pool.submit(self._draw, read, shown)))
        while len(self._pending) > _WAITING:
            self._finish_one()

    def _draw(self, read: Read, shown: Instances) -> np.ndarray:
        picture = draw(read.pixels, shown, self._class_names)
        if read.frame.number is None:
            path = self._output / read.frame.source.picture
            with atomic_write(path) as file:
                Image.fromarray(picture).save(file, Image.registered_extensions()[path.suffix.lower()], quality=90)
        return picture

    def _finish_one(self) -> None:
        frame, future = self._pending.popleft()
        picture = future.result()
        if self._video is not None and self._video.source is not frame.source:
            self._video.close()
            self._video = None
        if frame.number is not None:
            if self._video is None:
                self._video = _VideoFile(frame, self._output / frame.source.picture, picture.shape)
            self._video.write(picture)

    def __exit__(self, kind: type[BaseException] | None, *_: object):
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first error counts
            while self._pending:
                self._finish_one()
        if self._video is not None:
            self._video.close()


class _VideoFile:
    """A video of drawn frames, renamed when it is closed."""

    def __init__(self, first: Frame, path: Path, shape: tuple[int, ...]):
        self.source = first.source
        self._path = path
        self._temporary = path.with_name(f".{path.stem}.tmp.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = shape[:2]
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._temporary), cv2.CAP_FFMPEG, code, first.fps, (width, height))
        if not self._writer.isOpened():
            raise InputError(f"the video {self._path} cannot be written. Name another output folder.")

    def write(self, picture: np.ndarray) -> None:
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()
        os.replace(self._temporary, self._path)
