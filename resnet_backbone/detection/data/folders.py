"""Annotated folders as data sets: converted once into a COCO file, and again whenever they change."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pycocotools.mask
from iopath.common.file_io import file_lock

from resnet_backbone.data.errors import content, some
from resnet_backbone.data.layouts import is_voc, is_yolo
from resnet_backbone.detection.data.annotated import AnnotatedFolder, Object, files_below
from resnet_backbone.detection.data.voc import read_voc, voc_sources
from resnet_backbone.detection.data.yolo import read_yolo, yolo_sources
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.weights import atomic_write

logger = logging.getLogger(__name__)

FORM = 1  # raise this whenever the same folder gives another COCO file


def find_folder(entry: str) -> tuple[Path, str] | None:
    """Return the folder and the split of an entry `FOLDER` or `FOLDER:SPLIT`; None if there is no such folder."""
    for folder, split in ((entry, ""), entry.rpartition(":")[::2]):
        if folder and Path(folder).expanduser().is_dir():
            return Path(folder).expanduser(), split
    return None


def convert(folder: Path, split: str, into: Path) -> tuple[Path, str]:
    """Write the COCO file of an annotated folder, unless it is there and the folder has not changed since.

    Several processes may call this at the same time: one converts, the others wait for it.

    Args:
        split: the images to take; empty for all.
        into: folder to write to.

    Returns:
        The COCO file, whose images' names are relative to `folder`, and a fingerprint of what it was made from.

    Raises:
        ConfigError: the folder has no known layout, or one of its files is missing or malformed.
    """
    if is_voc(folder):
        read, sources = read_voc, voc_sources(folder, split)
    elif is_yolo(folder):
        read, sources = read_yolo, yolo_sources(folder, split)
    else:
        raise ConfigError(
            f"the folder {folder} ({content(folder)}) has no layout that is known here. Expected JPEGImages and "
            "Annotations as in PASCAL VOC, or images and labels as in YOLO; or name its COCO file, FILE.json:IMAGES."
        )
    # Folders of the same name, and splits such as a/b and a_b, stay apart.
    place = hashlib.sha256(os.fsencode(f"{folder.absolute()}:{split}")).hexdigest()[:6]
    file = into / f"{short_name(folder, split)}-{place}.json"
    try:
        fingerprint = _fingerprint(sources)
        with file_lock(str(file)):
            coco = _read_converted(file, fingerprint)
            done = "has not changed since it was converted to"
            if coco is None:
                coco = _coco(read(folder, split), fingerprint)
                with atomic_write(file) as out:
                    out.write(json.dumps(coco, allow_nan=False).encode())
                done = "is converted to"
    except OSError as error:
        raise ConfigError(f"{folder} cannot be converted to {file}: {error.strerror or error}.") from error
    names = [category["name"] for category in coco["categories"]]
    logger.info("%s: %d classes, %s: %s", short_name(folder, split), len(names), coco["info"]["order"], some(names, 20))
    logger.info("%s %s %s", folder, done, file)
    return file, fingerprint


def short_name(folder: Path, split: str) -> str:
    """Return a name for the files of a data set, such as VOC2007_trainval."""
    return "_".join(filter(None, (folder.absolute().name, split.replace(os.sep, "_"))))


def _fingerprint(sources: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and times of all files in `sources`, which need not exist."""
    digest = hashlib.sha256(str(FORM).encode())
    for source in sources:
        files = files_below(source) if source.is_dir() else [("", source.stat())] if source.is_file() else ()
        for name, status in files:
            line = f"{source.absolute()}/{name} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(os.fsencode(line))
    return digest.hexdigest()


def _read_converted(file: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return an earlier conversion with this fingerprint; None if there is none, or the file is something else."""
    try:
        coco = json.loads(file.read_bytes())
        return coco if coco["info"]["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _coco(found: AnnotatedFolder, fingerprint: str) -> dict[str, Any]:
    annotations = []
    for number, image in enumerate(found.images, 1):
        for item in image.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": item.category + 1,
                    "bbox": item.box,
                    "area": _area(item, image.height, image.width),
                    "iscrowd": int(item.ignored),
                    **({"segmentation": [item.polygon]} if item.polygon else {}),
                }
            )
    return {
        "info": {"fingerprint": fingerprint, "order": found.order},
        "images": [
            {"id": number, "file_name": image.file, "width": image.width, "height": image.height}
            for number, image in enumerate(found.images, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(found.class_names, 1)],
    }


def _area(item: Object, height: int, width: int) -> float:
    if not item.polygon:
        return item.box[2] * item.box[3]
    return float(pycocotools.mask.area(pycocotools.mask.frPyObjects([list(item.polygon)], height, width))[0])
