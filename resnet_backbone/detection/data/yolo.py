"""Folders in YOLO's layout: `images` and `labels`, with one text file of normalized boxes or outlines an image."""

import logging
import os
from pathlib import Path
from typing import Any

import yaml

from resnet_backbone.data.errors import some
from resnet_backbone.data.layouts import is_yolo_pair, yolo_splits
from resnet_backbone.detection.data.annotated import (
    AnnotatedFolder,
    AnnotatedImage,
    Object,
    check_class_names,
    files_below,
    image_size,
    images_below,
    read_class_names,
    read_text,
)
from resnet_backbone.engine.config import ConfigError

logger = logging.getLogger(__name__)

ROUNDING = 1e-3  # how far beyond the image a number may be, for being rounded


def yolo_sources(folder: Path, split: str) -> list[Path]:
    """Return the files and folders that `read_yolo` reads."""
    names = ("data.yaml", "classes.txt", "labels/classes.txt")
    return [*_places(folder, split), *(folder / name for name in names)]


def read_yolo(folder: Path, split: str) -> AnnotatedFolder:
    """Read the images of a split, or all if `split` is empty; an image without a label file has no objects.

    Raises:
        ConfigError: a file is missing or malformed; the message names the file and the line.
    """
    images_folder, labels_folder = _places(folder, split)
    if not labels_folder.is_dir():
        raise ConfigError(f"{images_folder} has images, but there is no folder {labels_folder} with their labels.")
    names, order = _class_names(folder)
    prefix = images_folder.relative_to(folder)
    labels = {file for file, _ in files_below(labels_folder) if file.endswith(".txt") and file != "classes.txt"}
    images, used = [], set()
    for file in images_below(images_folder):
        width, height = image_size(images_folder / file)
        objects = []
        if (label := os.path.splitext(file)[0] + ".txt") in labels:
            used.add(label)
            objects = _read_labels(labels_folder / label, names, width, height)
        images.append(AnnotatedImage(str(prefix / file), width, height, objects))
    if alone := sorted(labels - used):
        logger.warning("%d label files in %s have no image: %s", len(alone), labels_folder, some(alone))
    return AnnotatedFolder(images, names, order)


def _places(folder: Path, split: str) -> tuple[Path, Path]:
    """The folders of images and of labels."""
    splits = yolo_splits(folder)
    if split in splits:
        return folder / split / "images", folder / split / "labels"
    if is_yolo_pair(folder):
        if (folder / "images" / split).is_dir():
            return folder / "images" / split, folder / "labels" / split
        splits = sorted(path.name for path in (folder / "images").iterdir() if path.is_dir())
    if not split:
        raise ConfigError(f"{folder} has a folder for each split. Name one: {folder}:{splits[0]}.")
    raise ConfigError(
        f"{folder}:{split}: there is no folder {folder / 'images' / split} nor {folder / split / 'images'}. "
        + (f"There are the splits {some(splits)}." if splits else f"All images together are {folder}.")
    )


def _class_names(folder: Path) -> tuple[tuple[str, ...], str]:
    """The class names by number, and the file that they come from."""
    file = folder / "data.yaml"
    content = _read_yaml(file) if file.is_file() else {}
    if "kpt_shape" in content:
        raise ConfigError(
            f"{file} has kpt_shape: labels with keypoints are not converted. Give the data set as a COCO file."
        )
    if "names" in content:
        return _names_in(content["names"], file), "by number, from data.yaml"
    for place in ("classes.txt", "labels/classes.txt"):  # the second is where LabelImg puts it
        if (folder / place).is_file():
            return read_class_names(folder / place), f"by number, from {place}"
    raise ConfigError(
        f"nothing names the classes of {folder}. Expected {file} with a list of names, or {folder / 'classes.txt'} "
        "with one name a line, in the order of the labels' numbers."
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not a YAML file: {' '.join(str(error).split())}.") from error
    return content if isinstance(content, dict) else {}


def _names_in(names: Any, file: Path) -> tuple[str, ...]:
    """The class names of a data.yaml, whose `names` are a list, or a mapping from class numbers."""
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise ConfigError(f"{file}: the numbers in names are {some(list(map(str, names)))}; expected 0, 1, 2, ….")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise ConfigError(
            f"{file}: names is {names!r}, expected a list of class names, or a mapping from their numbers."
        )
    names = tuple(map(str, names))
    check_class_names(names, file)
    return names


def _read_labels(file: Path, names: tuple[str, ...], width: int, height: int) -> list[Object]:
    """Read the objects of one image of this size."""
    objects = []
    for line_number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {line_number}"
        try:
            category, *numbers = map(float, line.split())
        except ValueError:
            raise ConfigError(f"{where}: {line.strip()!r} is not a row of numbers.") from None
        if category not in range(len(names)):
            raise ConfigError(
                f"{where}: the class is {category:g}, expected 0 to {len(names) - 1} ({some(list(names))})."
            )
        if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
            raise ConfigError(
                f"{where} has {len(numbers)} numbers after the class, expected 4 (center and size of a box) or the x "
                "and y of at least 3 points."
            )
        if wrong := next((n for n in numbers if not -ROUNDING <= n <= 1 + ROUNDING), None):
            raise ConfigError(f"{where} has the number {wrong:g}, expected 0 to 1: fractions of the image's sides.")
        if len(numbers) == 4:
            x, y, w, h = (n * side for n, side in zip(numbers, (width, height) * 2, strict=True))
            box, polygon = (x - w / 2, y - h / 2, w, h), ()
        else:
            polygon = tuple(n * side for n, side in zip(numbers, (width, height) * (len(numbers) // 2), strict=True))
            xs, ys = polygon[::2], polygon[1::2]
            box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
        if min(box[2:]) <= 0:
            raise ConfigError(f"{where}: the object has no area. Remove the line.")
        objects.append(Object(int(category), box, polygon))
    return objects
