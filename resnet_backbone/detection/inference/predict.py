"""Detect objects on images and videos."""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.progress import image_bar
from resnet_backbone.detection.inference.detector import Detector, load_detector
from resnet_backbone.detection.inference.ids import Ids, consecutive, ids_of
from resnet_backbone.detection.inference.output import Pictures, Results
from resnet_backbone.detection.inference.sources import Frame, Read, Source, Video, find_sources, image_frame
from resnet_backbone.errors import InputError

EXIT_NOTHING_READ = 1
EXIT_CUT = 2
_AHEAD = 4  # batches that are read before they are needed


class Summary(NamedTuple):
    """What became of the inputs.

    Attributes:
        images: number of images and frames that were looked at.
        objects: number of objects that were drawn.
        unreadable: a sentence about each image or video that could not be read, or not to its end.
        cut: whether one of them is a video that ends before its last frame.
        seconds: from the first image to the last.
    """

    images: int
    objects: int
    unreadable: list[str]
    cut: bool
    seconds: float

    @property
    def exit_code(self) -> int:
        if self.cut:
            return EXIT_CUT
        return 0 if self.images else EXIT_NOTHING_READ

    def text(self) -> str:
        """Return a few lines for the terminal."""
        lines = [f"skipped: {sentence}" for sentence in self.unreadable[:20]]
        if len(self.unreadable) > 20:
            lines.append(f"… and {len(self.unreadable) - 20} more")
        skipped = f", {len(self.unreadable)} skipped" if self.unreadable else ""
        rate = self.images / self.seconds
        return "\n".join([*lines, f"{self.images} images{skipped}; {self.objects} objects; {rate:.3g} images/s"])


def predict(
    inputs: Sequence[str],
    *,
    weights: str | Path,
    output: Path,
    config_file: str | None = None,
    opts: Sequence[str] = (),
    threshold: float = 0.5,
    ids: Path | None = None,
) -> Summary:
    """Detect objects on images and videos; write what `detect_on` writes.

    Args:
        inputs: files, folders and patterns.
        weights, config_file, opts: as for `load_detector`.
        output: folder to write to.
        threshold: draw objects of at least this score.
        ids: a COCO file, whose ids the results get.

    Raises:
        InputError: an input does not exist or has no images, the output folder is among them, the detector cannot be
            loaded, or `ids` lacks an image or a class; nothing is written.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file, expected a folder.")
    sources = find_sources(inputs)
    for folder in filter(os.path.isdir, inputs):
        if output.resolve().is_relative_to(Path(folder).resolve()):
            raise InputError(
                f"the output folder {output} lies in the input {folder}, so that a second run would take its pictures "
                "for images. Name another output folder."
            )
    for source in sources:
        if (output / source.picture).resolve() == source.file.resolve():
            raise InputError(f"{source.file} would be overwritten by its picture. Name another output folder.")
    detector = load_detector(weights, config_file=config_file, opts=opts)
    given = None if ids is None else ids_of(ids, sources, detector.class_names)
    return detect_on(sources, detector, output, threshold=threshold, ids=given)


def detect_on(
    sources: Sequence[Source], detector: Detector, output: Path, *, threshold: float, ids: Ids | None = None
) -> Summary:
    """Write DETECTIONS, in COCO's result form; IMAGES, a COCO file without objects; and a picture for each source.

    Both together are what `COCO(IMAGES).loadRes(DETECTIONS)` takes. DETECTIONS has all that the detector returns;
    pictures show objects of at least `threshold`. An input that cannot be read is skipped. After an interruption, what
    was finished is there.

    Args:
        ids: None for consecutive ones.
    """
    began, images, objects = time.perf_counter(), 0, 0
    unread = _Unread()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(min(8, os.cpu_count() or 1)))
        bar = stack.enter_context(image_bar(total=_count(sources), file=sys.stderr))
        results = stack.enter_context(Results(output, detector.class_names, ids or consecutive(detector.class_names)))
        pictures = stack.enter_context(Pictures(output, detector.class_names, pool))
        waiting = _read_ahead(_frames(sources, unread), detector, pool, unread)
        while batch := list(islice(waiting, 2 * detector.batch_size)):
            for read, found in zip(batch, detector.detect([read.prepared for read in batch]), strict=True):
                shown = found[found.scores >= threshold]
                results.add(read, found)
                pictures.add(read, shown)
                images, objects = images + 1, objects + len(shown)
            bar.update(len(batch))
    return Summary(images, objects, unread.sentences, unread.cut, time.perf_counter() - began)


class _Unread:
    """Sentences about inputs that were not read, or not to their end."""

    def __init__(self):
        self.sentences: list[str] = []
        self.cut = False


def _frames(sources: Sequence[Source], unread: _Unread) -> Iterator[Frame]:
    for source in sources:
        if not source.is_video:
            yield image_frame(source)
            continue
        try:
            video = Video(source)
        except DatasetError as error:
            unread.sentences.append(str(error))
            continue
        try:
            yield from video.frames()
        except DatasetError as error:
            unread.sentences.append(str(error))
            unread.cut = True


def _read_ahead(
    frames: Iterator[Frame], detector: Detector, pool: ThreadPoolExecutor, unread: _Unread
) -> Iterator[Read]:
    """Read and resize frames in other threads; yield them in order."""

    def read(frame: Frame) -> Read:
        pixels = frame.read()
        return Read(frame, pixels, detector.prepare(pixels))

    pending: deque[Future[Read]] = deque()
    more = True
    while more or pending:
        more = (frame := next(frames, None)) is not None
        if more:
            pending.append(pool.submit(read, frame))
        if pending and (not more or len(pending) > _AHEAD * detector.batch_size):
            try:
                yield pending.popleft().result()
            except DatasetError as error:
                unread.sentences.append(str(error))


def _count(sources: Sequence[Source]) -> int:
    """Return the number of images, and of frames that videos state."""
    total = 0
    for source in sources:
        with contextlib.suppress(DatasetError):  # it is skipped later
            total += Video(source).count if source.is_video else 1
    return total
