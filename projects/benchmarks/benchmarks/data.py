"""JPEG loading and augmentation in images per second: the package's loader vs. torchvision's and Pillow's."""

import contextlib
import functools
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image

from benchmarks.photographs import select_photographs, write_photographs, write_shard
from benchmarks.pretrain import Batch, Conduct, Task, make_config, train_on
from benchmarks.reference import PaperTransform, preset_transform, reference_batches
from benchmarks.timing import Clock, Comparison, Side
from resnet_backbone.data.functional import PCA_VALUES, PCA_VECTORS
from resnet_backbone.data.sources import open_source
from resnet_backbone.detection.config import get_config as get_detection_config
from resnet_backbone.detection.data.mapper import Mapper
from resnet_backbone.engine.config import CfgNode, load_config
from resnet_backbone.pretraining.config import get_config
from resnet_backbone.pretraining.pipelines import build_pipeline

CORE_UNIT, UNIT = "images/s per core", "images/s"
OURS, FULL, SHARD, DEVICE = "ours", "ours, full decoding", "ours, shard", "ours, on the GPU"
PRESET, PAPER = "torchvision", "Pillow and NumPy"
MAPPER, STOCK_MAPPER = "our mapper", "Detectron2's mapper"
FROM_FILES, IN_MEMORY = "from files", "from memory"
MEANING = {
    OURS: "the package's loader on a folder, JPEGs decoded at a reduced size where the crop allows it",
    FULL: "the same, JPEGs decoded at their full size (INPUT.REDUCED_DECODING False)",
    SHARD: "as the first, from a tar shard instead of a folder",
    DEVICE: "decoded and augmented by the GPU (DATALOADER.PIPELINE device), workers only read files",
    PRESET: "torchvision's reference: ImageFolder, RandomResizedCrop, flip, PILToTensor, DataLoader",
    PAPER: "the paper's augmentation: shorter side drawn and resized, RandomCrop, flip, PCA color shift in NumPy",
    MAPPER: "a detector's: JPEGs decoded by OpenCV and resized by torch (MODEL.ACCELERATE), shorter side 640 to 800",
    STOCK_MAPPER: "its DatasetMapper, by Pillow: the same values to within two levels of 255",
    FROM_FILES: "the whole training, from JPEGs on",
    IN_MEMORY: "the same on one batch that lies in memory: its ratio is the share of that speed that is reached",
}
# The paper's range (section 3.4) relative to its crop of 224; it scales with the crop.
SHORT_SIDE = (256 / 224, 480 / 224)
PCA_STD = 0.1

Open = Callable[[], Iterator[Batch]]


@dataclass(frozen=True, kw_only=True)
class LoadingWork:
    """The amount of data to load.

    Attributes:
        config_file: the recipe.
        images: folder searched recursively for JPEGs; None: generate some at each (height, width) in `sizes`.
        count: images per size, or images picked from the folder.
        workers: loader processes; 0: load in this process.
        batch, crop: images per batch, and their height and width.
        rounds: turns per side.
        cpu_time: measure CPU seconds, as in `Clock`; only without workers.
    """

    config_file: Path
    images: Path | None = None
    sizes: Sequence[tuple[int, int]] = ((375, 500), (480, 640), (960, 1280))
    count: int
    workers: int
    batch: int
    crop: int
    rounds: int
    cpu_time: bool = False


def compare_loading(work: LoadingWork, report: Callable[[str], object]) -> Iterator[Comparison]:
    """Compare the package's loader with the two references on CPU cores; `report` gets a line before each.

    Raises:
        InputError: the folder has no JPEG.
    """
    with tempfile.TemporaryDirectory() as scratch, _one_thread():
        for name, folder in _image_sets(work, Path(scratch)):
            report(f"loading {name}")
            yield _compare_preset(name, folder, work)
            yield _compare_paper(name, folder, work)
            yield _compare_mappers(name, folder, work)


def compare_on_gpu(work: LoadingWork, report: Callable[[str], object]) -> Iterator[Comparison]:
    """Compare loading with the GPU's decoder against the same number of workers, in images per second."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in _image_sets(work, Path(scratch)):
            report(f"loading {name} on the GPU")
            cfg = _config(work, "random_resized")
            on_gpu = _config(work, "random_resized", "MODEL.DEVICE", "cuda", "DATALOADER.PIPELINE", "device")
            sides = {
                DEVICE: _ours(folder, on_gpu),
                OURS: _ours(folder, cfg),
                PRESET: _reference(folder, work, preset_transform),
            }
            task = f"crop of random area, {name}, {work.workers} workers"
            yield _compare(task, UNIT, sides, work, clock=Clock("cuda"))


def compare_training(task: Task, conduct: Conduct, loading: LoadingWork, report: Callable[[str], object]) -> Comparison:
    """Compare training from files with training on one in-memory batch: the cost of waiting for data."""
    pipeline = "device" if conduct.on_gpu else "workers"
    clock = Clock(conduct.device, cpu_time=conduct.cpu_time)
    with tempfile.TemporaryDirectory() as scratch:
        name, folder = next(_image_sets(loading, Path(scratch)))
        report(f"training {task.network} on {name}")
        words = ("DATALOADER.NUM_WORKERS", loading.workers, "DATALOADER.PIPELINE", pipeline)
        cfg = make_config(task, conduct, *words, *_augmentation("random_resized", task.size))
        data = build_pipeline(cfg, open_source(folder))

        def turns(*_: Any) -> Iterator[Any]:
            in_memory = data.images_of(next(iter(data(0))))
            yield from repeat(in_memory, conduct.warm_up)
            for _ in range(conduct.rounds):
                from_files = data(0)
                yield from islice(from_files, _prefetched(loading.workers) + 1)
                yield from clock.watch(FROM_FILES, islice(from_files, task.iterations))
                del from_files  # stops its workers, which would keep loading during the other's turn
                yield from clock.watch(IN_MEMORY, repeat(in_memory, task.iterations))

        train_on(cfg, task.num_classes, turns, data.images_of)
    shape = (task.batch, 3, task.size, task.size)
    settings = f"{loading.workers} workers, DATALOADER.PIPELINE {pipeline}, crop of random area"
    return Comparison.of(
        clock,
        task=f"training {task.network} on {name}",
        unit=UNIT,
        first=FROM_FILES,
        sides={FROM_FILES: Side(settings, shape), IN_MEMORY: Side("one batch, again and again", shape)},
        work=task.batch * task.iterations,
    )


def _image_sets(work: LoadingWork, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield each image set's name and root of class folders; a folder `NAME` has a shard `NAME.tar` next to it."""
    if work.images is not None:
        folder = scratch / "selected"
        files = select_photographs(work.images, folder / "class", count=work.count)
        write_shard(scratch / "selected.tar", files)
        yield f"{len(files)} of {'/'.join(work.images.resolve().parts[-2:])}", folder
        return
    for height, width in work.sizes:
        folder = scratch / f"{width}x{height}"
        files = write_photographs(folder / "class", size=(height, width), count=work.count)
        write_shard(scratch / f"{folder.name}.tar", files)
        yield f"{width}×{height}", folder


def _compare_preset(name: str, folder: Path, work: LoadingWork) -> Comparison:
    sides = {
        OURS: _ours(folder, _config(work, "random_resized")),
        FULL: _ours(folder, _config(work, "random_resized", "INPUT.REDUCED_DECODING", False)),
        SHARD: _ours(folder.with_suffix(".tar"), _config(work, "random_resized")),
        PRESET: _reference(folder, work, preset_transform),
    }
    return _compare(f"crop of random area, {name}", CORE_UNIT, sides, work)


def _compare_paper(name: str, folder: Path, work: LoadingWork) -> Comparison:
    def transform(crop: int) -> PaperTransform:
        return PaperTransform(
            short_side=_short_side(crop), crop=crop, pca_std=PCA_STD, values=PCA_VALUES, vectors=PCA_VECTORS
        )

    sides = {
        OURS: _ours(folder, _config(work, "absolute")),
        FULL: _ours(folder, _config(work, "absolute", "INPUT.REDUCED_DECODING", False)),
        PAPER: _reference(folder, work, transform),
    }
    return _compare(f"the paper's crop, {name}", CORE_UNIT, sides, work)


def _compare_mappers(name: str, folder: Path, work: LoadingWork) -> Comparison:
    """Compare a detector's training images, resized as Detectron2's configurations do, in this process."""
    cfg = get_detection_config()
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    mappers = {MAPPER: Mapper(cfg), STOCK_MAPPER: DatasetMapper(cfg)}
    records = [_record(file) for file in files]
    clock = Clock(cpu_time=work.cpu_time)

    def load(mapper: DatasetMapper) -> None:
        np.random.seed(0)  # the same sizes and flips
        for _ in range(3):
            deque(map(mapper, records), maxlen=0)

    for mapper in mappers.values():
        mapper(records[0])
    for _ in range(work.rounds):
        for side, mapper in mappers.items():
            clock.time(side, functools.partial(load, mapper))
    shape = tuple(mappers[MAPPER](records[0])["image"].shape)
    return Comparison.of(
        clock,
        task=f"a detector's images, {name}",
        unit=CORE_UNIT,
        first=MAPPER,
        sides={side: Side(MEANING[side], shape) for side in mappers},
        work=3 * len(records),
    )


def _record(file: str) -> dict[str, Any]:
    """Return a photograph with eight boxes in Detectron2's form."""
    with Image.open(file) as image:
        width, height = image.size
    corners = np.linspace(0, 0.5, 8)
    boxes = [[c * width, c * height, (c + 0.4) * width, (c + 0.4) * height] for c in corners]
    objects = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i} for i, box in enumerate(boxes)]
    return {"file_name": file, "height": height, "width": width, "annotations": objects}


def _compare(
    task: str, unit: str, sides: dict[str, Open], work: LoadingWork, *, clock: Clock | None = None
) -> Comparison:
    """Load the images in turns, with a newly opened loader each turn."""
    clock = clock or Clock(cpu_time=work.cpu_time)
    batches = _batches(work)
    shapes = {}
    for side, open_batches in sides.items():
        shapes[side] = tuple(next(open_batches())[0].shape)  # doubles as an untimed first turn
    for _ in range(work.rounds):
        for side, open_batches in sides.items():
            loaded = open_batches()
            deque(islice(loaded, _prefetched(work.workers) + 1), maxlen=0)  # opening is not timed
            clock.time(side, lambda loaded=loaded: deque(islice(loaded, batches), maxlen=0))
            del loaded
    cores = max(1, work.workers) if unit == CORE_UNIT else 1
    return Comparison.of(
        clock,
        task=task,
        unit=unit,
        first=next(iter(sides)),
        sides={side: Side(MEANING[side], shape) for side, shape in shapes.items()},
        work=batches * work.batch / cores,
    )


def _config(work: LoadingWork, crop_type: str, *words: Any) -> CfgNode:
    words = (
        *("MODEL.DEVICE", "cpu", "SEED", 1, "SOLVER.IMS_PER_BATCH", work.batch),
        *("DATALOADER.NUM_WORKERS", work.workers, *_augmentation(crop_type, work.crop), *words),
    )
    return load_config(get_config(), work.config_file, [str(word) for word in words])


def _augmentation(crop_type: str, crop: int) -> tuple[Any, ...]:
    pca_std = PCA_STD if crop_type == "absolute" else 0.0
    return (
        *("INPUT.CROP.TYPE", crop_type, "INPUT.CROP.SIZE", (crop, crop)),
        *("INPUT.MIN_SIZE_TRAIN", _short_side(crop), "INPUT.PCA_COLOR_STD", pca_std),
    )


def _short_side(crop: int) -> tuple[int, int]:
    return round(SHORT_SIDE[0] * crop), round(SHORT_SIDE[1] * crop)


def _ours(images: Path, cfg: CfgNode) -> Open:
    batches = build_pipeline(cfg, open_source(images))
    return lambda: batches(0)


def _reference(folder: Path, work: LoadingWork, transform: Callable[[int], Callable]) -> Open:
    return lambda: reference_batches(
        folder,
        transform(work.crop),
        batch_size=work.batch,
        batches=_batches(work) + 2 * _prefetched(work.workers) + 1,
        workers=work.workers,
    )


def _batches(work: LoadingWork) -> int:
    """Batches per turn: three passes over the images, or more for many workers, which finish batches together."""
    return max(3 * work.count // work.batch, 4 * work.workers)


def _prefetched(workers: int) -> int:
    """Most batches a DataLoader's workers prefetch; after these, the rate is the loading rate."""
    return 2 * workers


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limit loading in this process to one core, like a worker."""
    threads, of_opencv = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(of_opencv)
