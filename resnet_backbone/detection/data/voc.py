"""Folders in PASCAL VOC's layout: `JPEGImages`, `Annotations`, `ImageSets/Main`."""

import difflib
import math
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from resnet_backbone.data.errors import IMAGE_EXTENSIONS, some
from resnet_backbone.detection.data.annotated import (
    AnnotatedFolder,
    AnnotatedImage,
    Object,
    image_size,
    read_class_names,
    read_text,
)
from resnet_backbone.engine.config import ConfigError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Annotation(NamedTuple):
    """One XML file: the size that it states, if any, and its objects with their class names and lines."""

    file: Path
    size: tuple[int, int] | None
    objects: list[tuple[str, int, Object]]


def voc_sources(folder: Path, split: str) -> list[Path]:
    """Return the files and folders that `read_voc` reads."""
    splits = [_split_file(folder, split)] if split else []
    return [folder / "JPEGImages", folder / "Annotations", folder / "classes.txt", *splits]


def read_voc(folder: Path, split: str) -> AnnotatedFolder:
    """Read the images of a split, or all annotated ones if `split` is empty.

    Boxes are 1-based and inclusive in VOC; the first pixel becomes (0, 0), as in Detectron2's `load_voc_instances`.
    Objects marked as difficult are ignored, as VOC's rules have it.

    Raises:
        ConfigError: a file is missing or malformed; the message names the file and the line.
    """
    annotations = {path.stem: _read_annotation(path) for path in sorted((folder / "Annotations").glob("*.xml"))}
    names, order = _class_names(folder, annotations)
    numbers = {name: number for number, name in enumerate(names)}
    files = {Path(name).stem: name for name in _image_names(folder)}
    images = []
    for stem in _stems(folder, split, annotations):
        annotation = annotations[stem]
        objects = []
        for name, line, found in annotation.objects:
            if name not in numbers:
                raise ConfigError(
                    f"{annotation.file}, line {line}: the class {name} is not in {folder / 'classes.txt'} "
                    f"({some(list(names))}). Add it there, or correct the name."
                )
            objects.append(found._replace(category=numbers[name]))
        file = f"JPEGImages/{files.get(stem, f'{stem}.jpg')}"
        images.append(AnnotatedImage(file, *_size(folder / file, annotation), objects))
    return AnnotatedFolder(images, names, order)


def _stems(folder: Path, split: str, annotations: dict[str, _Annotation]) -> list[str]:
    """The names, without suffix, of the split's images, in the order of its file."""
    if not split:
        return list(annotations)
    file, stems = _split_file(folder, split), []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if words := line.split():
            if words[0] not in annotations:
                raise ConfigError(
                    f"{file}, line {number}: there is no annotation {folder / 'Annotations' / words[0]}.xml. Put it "
                    "there, or remove the line."
                )
            stems.append(words[0])
    return stems


def _split_file(folder: Path, split: str) -> Path:
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        splits = [path.stem for path in sorted(file.parent.glob("*.txt"))]
        near = difflib.get_close_matches(split, splits, n=1, cutoff=0.0)
        hint = f"the nearest there is {near[0]}" if near else "there is none in that folder"
        raise ConfigError(f"{folder}:{split}: there is no list of images {file}; {hint}.")
    return file


def _image_names(folder: Path) -> list[str]:
    """The files in JPEGImages that are images; of several with the same stem, .jpg comes last and so wins."""
    names = [path.name for path in (folder / "JPEGImages").iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS]
    return sorted(names, key=lambda name: (name.endswith(".jpg"), name))


def _class_names(folder: Path, annotations: dict[str, _Annotation]) -> tuple[tuple[str, ...], str]:
    """The class names in order, and where the order comes from."""
    if (folder / "classes.txt").is_file():
        return read_class_names(folder / "classes.txt"), "in the order of classes.txt"
    found = {name for annotation in annotations.values() for name, _, _ in annotation.objects}
    if found <= set(CLASS_NAMES):
        return CLASS_NAMES, "PASCAL VOC's, in Detectron2's order"
    return tuple(sorted(found)), "in alphabetical order"


def _size(image: Path, annotation: _Annotation) -> tuple[int, int]:
    """The image's width and height; ConfigError if the annotation states another size than Detectron2 reads."""
    if not image.is_file() and annotation.size is not None:  # `datasets.check` counts what is missing
        return annotation.size
    size = image_size(image)
    if annotation.size is not None and annotation.size != size:
        raise ConfigError(
            f"{annotation.file} says that its image has {annotation.size[0]}×{annotation.size[1]} pixels, but "
            f"Detectron2 reads {size[0]}×{size[1]} from {image}, after turning it by its EXIF orientation if it has "
            "one. Correct either."
        )
    return size


def _read_annotation(file: Path) -> _Annotation:
    root, lines = _parse(file)

    def text(parent: ElementTree.Element, name: str) -> str:
        child = parent.find(name)
        if child is None or not (child.text or "").strip():
            raise ConfigError(
                f"{file}, line {lines[parent]}: <{parent.tag}> has no <{name}>. Expected an annotation in PASCAL VOC's "
                "form."
            )
        return child.text.strip()

    def number(parent: ElementTree.Element, name: str) -> float:
        word = text(parent, name)
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            line = lines[parent.find(name)]
            raise ConfigError(f"{file}, line {line}: <{name}> is {word!r}, expected a number.")
        return value

    size = root.find("size")
    if size is not None:
        size = int(number(size, "width")), int(number(size, "height"))
    objects = []
    for element in root.findall("object"):
        box = element.find("bndbox")
        if box is None:
            raise ConfigError(
                f"{file}, line {lines[element]}: the object has no <bndbox>. Expected one for each object."
            )
        left, top, right, bottom = (number(box, corner) for corner in CORNERS)
        if not (right >= left and bottom >= top):
            raise ConfigError(
                f"{file}, line {lines[box]}: the box ends before it begins (xmin {left:g}, ymin {top:g}, xmax "
                f"{right:g}, ymax {bottom:g})."
            )
        difficult = element.find("difficult") is not None and number(element, "difficult") != 0
        # Inclusive pixels counted from 1: a box from 1 to the width covers the image.
        found = Object(-1, (left - 1, top - 1, right - left + 1, bottom - top + 1), ignored=difficult)
        objects.append((text(element, "name"), lines[element], found))
    return _Annotation(file, size if size and min(size) > 0 else None, objects)  # some tools write a size of 0


def _parse(file: Path) -> tuple[ElementTree.Element, dict[ElementTree.Element, int]]:
    """Parse XML line by line; return its root, and the line of each element."""
    parser, lines = ElementTree.XMLPullParser(events=("start",)), {}
    try:
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            parser.feed(line)
            lines.update((element, number) for _, element in parser.read_events())
        parser.close()
    except ElementTree.ParseError as error:
        raise ConfigError(f"{file}, line {error.position[0]}: not XML ({str(error).partition(':')[0]}).") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    lines.update((element, number) for _, element in parser.read_events())
    return next(iter(lines)), lines
