"""What the readers of annotated folders return, and what they share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from resnet_backbone.data.errors import IMAGE_EXTENSIONS
from resnet_backbone.engine.config import ConfigError


class Object(NamedTuple):
    """An annotated object, in pixels of an image whose upper left corner is (0, 0).

    Attributes:
        category: class number, from 0.
        box: left, top, width, height.
        polygon: the outline x1, y1, x2, y2, …; empty if only the box is known.
        ignored: neither trained on nor counted as missed (COCO's `iscrowd`).
    """

    category: int
    box: tuple[float, float, float, float]
    polygon: tuple[float, ...] = ()
    ignored: bool = False


class AnnotatedImage(NamedTuple):
    """An image, by its path relative to the data set's folder, and its objects."""

    file: str
    width: int
    height: int
    objects: list[Object]


class AnnotatedFolder(NamedTuple):
    """A folder's images in their order, its class names by number, and where their order comes from."""

    images: list[AnnotatedImage]
    class_names: tuple[str, ...]
    order: str


def image_size(file: str | os.PathLike) -> tuple[int, int]:
    """Return the width and height of the image that Detectron2 reads from `file`, from the file's header alone.

    Detectron2 applies the EXIF orientation, so that a photograph taken upright may be wider in the file than it is.
    """
    try:
        if os.path.exists(file) and not os.path.isfile(file):  # opening a FIFO would wait forever
            raise OSError("it is no regular file")
        with Image.open(file) as image:
            # Not `image.getexif()`, which for a PNG without EXIF data decodes every pixel.
            turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ConfigError(
            f"the image {file} cannot be read ({' '.join(str(error).split())}). Replace it or remove it."
        ) from error


def images_below(folder: Path) -> list[str]:
    """Return the images at any depth below `folder`, sorted, as paths relative to it."""
    return sorted(file for file, _ in files_below(folder) if file.lower().endswith(IMAGE_EXTENSIONS))


def files_below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each file at any depth below `folder`, by its path relative to it, with its size and time."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                path = os.path.join(place, name)
                yield os.path.relpath(path, folder), os.stat(path) if os.path.exists(path) else os.lstat(path)


def read_class_names(file: Path) -> tuple[str, ...]:
    """Read a `classes.txt`: one name a line; empty lines do not count.

    Raises:
        ConfigError: the file has no name, or one twice.
    """
    names = tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
    check_class_names(names, file)
    return names


def check_class_names(names: tuple[str, ...], file: Path) -> None:
    """Raise ConfigError if `file` gives no class name, or one twice."""
    if not names:
        raise ConfigError(f"{file} names no class. Expected one name for each class.")
    if again := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise ConfigError(f"{file} names the class {again} twice. Expected different names.")


def read_text(file: Path) -> str:
    """Read UTF-8 text; raise ConfigError if the file is not that."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
