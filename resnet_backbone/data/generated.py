"""Generate data sets of eight textured shapes, for a demo that needs no download.

`write_classification` writes tar shards for `open_source`; `write_detection` writes images with COCO annotations.
Image `i` of a set depends only on the seed and `i`.
"""

import functools
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch.utils.data import Dataset

from resnet_backbone.data.drawing import (
    CLASS_NAMES,
    Outline,
    add_noise,
    background,
    line,
    paint,
    place_blob,
    place_shape,
    stamp,
)
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.workers import Loader

PARAMETERS_FILE = "parameters.json"

# Increment whenever the same seed yields different images, so that an older folder is not mistaken for the new data.
_VERSION = 2
_CLASSIFICATION, _DETECTION = 11, 12  # first words of the random streams' keys
BATCH = 64  # images that a process draws at a time
_LEAST_VISIBLE = 1 / 3  # share of an object's area; an object with less in sight is placed again


def write_classification(folder: str | Path, *, images: int, image_size: int = 72, seed: int, shards: int = 1) -> str:
    """Write a classification set, and return its shard pattern for `open_source`.

    The folder gets `train-000000.tar` and so on, `classes.txt` and `parameters.json`; the images cycle through the
    classes. Equal arguments give equal bytes. A folder written with the same arguments is left alone. The folder
    appears only when complete: it is written next to its final location under another name, then renamed.

    Raises DatasetError if the folder holds anything else.
    """
    if not 1 <= shards <= images:
        raise ValueError(f"{images} images cannot fill {shards} shards; expected 1 to {images}")
    folder = Path(folder)

    def write(target: Path) -> None:
        drawn = _in_all_processes(functools.partial(_classification_jpeg, seed, image_size), images)
        for shard in range(shards):
            with tarfile.open(target / f"train-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for index in range(images * shard // shards, images * (shard + 1) // shards):
                    data, label = next(drawn)
                    _add(archive, f"{index:08d}.jpg", data)
                    _add(archive, f"{index:08d}.cls", str(label).encode())
        (target / "classes.txt").write_text("".join(name + "\n" for name in CLASS_NAMES))

    _complete(
        folder,
        {"set": "classification", "images": images, "image_size": image_size, "shards": shards, "seed": seed},
        write,
    )
    return str(folder / ("train-000000.tar" if shards == 1 else f"train-{{000000..{shards - 1:06d}}}.tar"))


def write_detection(
    folder: str | Path, *, images: int, image_size: int = 160, seed: int, objects: tuple[int, int] = (1, 4)
) -> Path:
    """Write a detection set (`images/*.jpg`, `annotations.json`, `parameters.json`); return the annotations' path.

    Annotations use COCO's format: category ids 1 to 8, boxes `[x, y, width, height]` around an object's visible part,
    `area` its visible pixels. `objects` is the smallest and largest number of objects per image; there are fewer if
    they do not fit without hiding each other. Existing folders are handled as in `write_classification`.
    """
    if not 1 <= objects[0] <= objects[1]:
        raise ValueError(f"the number of objects is {tuple(objects)}; expected 1 <= smallest <= largest")
    folder = Path(folder)

    def write(target: Path) -> None:
        (target / "images").mkdir()
        records, annotations = [], []
        drawn = _in_all_processes(functools.partial(_detection_jpeg, seed, image_size, objects), images)
        for index, (data, found) in enumerate(drawn):
            name = f"{index:06d}.jpg"
            (target / "images" / name).write_bytes(data)
            records.append({"id": index + 1, "file_name": name, "height": image_size, "width": image_size})
            for item in found:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **item, "iscrowd": 0})
        content = {
            "info": {"description": f"generated shapes, seed {seed}", "version": str(_VERSION)},
            "images": records,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, 1)],
        }
        (target / "annotations.json").write_text(json.dumps(content))

    _complete(
        folder,
        {"set": "detection", "images": images, "image_size": image_size, "objects": list(objects), "seed": seed},
        write,
    )
    return folder / "annotations.json"


def classification_image(seed: int, index: int, size: int) -> tuple[np.ndarray, int]:
    """Draw image `index`, `(size, size, 3)` uint8 RGB, with its label: one whole shape, sometimes amid clutter."""
    rng = np.random.default_rng((_CLASSIFICATION, seed, index))
    label = index % len(CLASS_NAMES)
    image = background(size, size, rng)
    if rng.random() < 0.3:
        _paint_at_border(image, rng)
    radius = rng.uniform(0.3, 0.48) * size
    reach = max(size / 2 - 0.9 * radius, 0)
    shape = place_shape(CLASS_NAMES[label], size / 2 + rng.uniform(-reach, reach, 2), radius, rng)
    place = stamp(shape, size, size)
    paint(image, place, rng, vivid=True)
    if rng.random() < 0.25:
        _occlude(image, shape, place.coverage, rng)
    return add_noise(image, rng), label


def detection_image(
    seed: int, index: int, size: int, objects: tuple[int, int]
) -> tuple[np.ndarray, list[dict], np.ndarray]:
    """Draw image `index`; return it with its objects and each pixel's object.

    Returns the image `(size, size, 3)` uint8 RGB; each object's `category_id`, `bbox` and `area` as in COCO; and
    `(size, size)` int64 with the object's index in that list, -1 for the background.
    """
    rng = np.random.default_rng((_DETECTION, seed, index))
    image = background(size, size, rng)
    owner = np.full((size, size), -1)
    categories, full, visible = [], [], []
    for _ in range(rng.integers(objects[0], objects[1], endpoint=True)):
        for _attempt in range(10):
            category = int(rng.integers(len(CLASS_NAMES)))
            radius = np.exp(rng.uniform(np.log(0.11), np.log(0.28))) * size
            shape = place_shape(CLASS_NAMES[category], rng.uniform(0.6 * radius, size - 0.6 * radius, 2), radius, rng)
            place = stamp(shape, size, size)
            inside = place.coverage > 127
            beneath = place.window(owner)
            hidden = np.bincount(beneath[inside] + 1, minlength=len(full) + 1)[1:]
            left = [*(np.array(visible, int) - hidden), inside.sum()]
            if all(part >= _LEAST_VISIBLE * whole for part, whole in zip(left, [*full, shape.area], strict=True)):
                beneath[inside] = len(full)
                categories.append(category)
                full.append(shape.area)
                visible = left
                paint(image, place, rng, vivid=True)
                break
    found = []
    for number, category in enumerate(categories):
        rows, columns = np.nonzero(owner == number)
        x, y = int(columns.min()), int(rows.min())
        box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
        found.append({"category_id": category + 1, "bbox": box, "area": len(rows)})
    return add_noise(image, rng), found, owner


def _paint_at_border(image: np.ndarray, rng: np.random.Generator) -> None:
    """Paint a small shape of any class, more than half of it outside the image."""
    size = image.shape[0]
    radius = rng.uniform(0.1, 0.18) * size
    across = -0.3 * radius if rng.random() < 0.5 else size + 0.3 * radius
    center = [across, rng.uniform(0, size)]
    shape = place_shape(CLASS_NAMES[rng.integers(len(CLASS_NAMES))], center[:: rng.choice((-1, 1))], radius, rng)
    place = stamp(shape, size, size)
    if place is not None:
        paint(image, place, rng, vivid=True)


def _occlude(image: np.ndarray, shape: Outline, coverage: np.ndarray, rng: np.random.Generator) -> None:
    """Paint a blob or a line over part of a shape."""
    corners = shape.contours[0]
    if rng.random() < 0.5:
        line(image, corners[rng.integers(len(corners), size=2)] + rng.normal(0, 3, (2, 2)), rng)
        return
    # On the edge, and small enough to leave most of any shape visible.
    radius = rng.uniform(0.15, 0.3) * np.sqrt(shape.area)
    place = stamp(place_blob(corners[rng.integers(len(corners))], radius, rng), *image.shape[:2])
    if place is not None:
        paint(image, place, rng, vivid=False)


class _Drawn(Dataset):
    """What a function draws for each index."""

    def __init__(self, draw: Callable[[int], Any]):
        self._draw = draw

    def __getitem__(self, index: int) -> Any:
        return self._draw(index)


def _in_all_processes(draw: Callable[[int], Any], count: int) -> Iterator[Any]:
    """Yield `draw(0)`, `draw(1)` and so on, computed in as many processes as there are cores for this one."""
    processes = len(os.sched_getaffinity(0))
    batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    workers = min(processes, len(batches)) if processes > 1 and len(batches) > 1 else 0
    for batch in Loader(_Drawn(draw), batches, workers=workers, collate_fn=list):
        yield from batch


def _classification_jpeg(seed: int, size: int, index: int) -> tuple[bytes, int]:
    image, label = classification_image(seed, index, size)
    return _jpeg(image), label


def _detection_jpeg(seed: int, size: int, objects: tuple[int, int], index: int) -> tuple[bytes, list[dict]]:
    image, found, _ = detection_image(seed, index, size, objects)
    return _jpeg(image), found


def _jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, 92))[1].tobytes()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its times and owner are fixed, so equal data gives equal bytes
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _complete(folder: Path, parameters: dict, write: Callable[[Path], None]) -> None:
    """Create `folder` with `write(temporary folder)`, all or nothing, unless it exists with these parameters."""
    parameters = {"generated": "resnet_backbone", "version": _VERSION, **parameters}
    if _is_there(folder, parameters):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's folders are private to the user
        write(temporary)
        (temporary / PARAMETERS_FILE).write_text(json.dumps(parameters, indent=1) + "\n")
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process may have finished the same set in the meantime.
            if not _is_there(folder, parameters):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_there(folder: Path, parameters: dict) -> bool:
    """Whether the folder holds the set; raises DatasetError if it holds another set or anything else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise DatasetError(f"{folder} is a file; expected a folder for generated data, or none")
    if not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / PARAMETERS_FILE).read_text())
    except (OSError, ValueError):
        raise DatasetError(f"{folder} holds something other than generated data; name another folder") from None
    if found != parameters:
        differ = [key for key in {**found, **parameters} if found.get(key) != parameters.get(key)]
        there = ", ".join(f"{key} {found.get(key)}" for key in differ)
        asked = ", ".join(f"{key} {parameters.get(key)}" for key in differ)
        raise DatasetError(
            f"{folder} holds data generated with {there}, not {asked}; name another folder or remove this one"
        )
    return True
